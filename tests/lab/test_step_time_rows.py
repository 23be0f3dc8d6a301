"""``benchmarks/step_time``: what a run keeps, goes on with, says and prints."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from step_time import command, report
from step_time.contestants import KINDS, REFERENCE
from step_time.goals import goals
from step_time.measure import Bench, said
from step_time.plan import Plan
from step_time.rows import Results, StepRow, TrainingRow, Unmeasured

from lorapre.lab.errors import UserError

CPU = torch.device("cpu")
COMMITTED = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "step-time-cpu"
#: The smallest run: one row takes milliseconds.
TINY = ("--models", "llama-1m", "--rounds", "1", "--steps", "1", "--layers", "1")
THREE = ("--contestants", "lorapre-adamw,adamw-foreach,sgd")


def run(*arguments: str) -> None:
    command.main(time.monotonic(), None, list(arguments))


def read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "step_time.json").read_text(encoding="utf-8"))
    return content


def row(**changes: Any) -> StepRow:
    given = StepRow("cuda", "llama-1b", "float32", "LoRAPreAdamW", 64, 8.0, 0.6, 1000, 18)
    return replace(given, layers=24, parameter_bytes=100_000, kernels=16, copies=0, **changes)


def test_a_run_goes_on_with_the_rows_that_are_missing(tmp_path: Path) -> None:
    run(*TINY, *THREE, "--ranks", "8", "--out", str(tmp_path))
    first = read(tmp_path)
    assert [(one["optimizer"], one["rank"]) for one in first["rows"]] == [
        (REFERENCE, None), ("LoRAPreAdamW", 8), ("AdamW, foreach", None), ("SGD, fused", None)
    ]  # fmt: skip
    # the fields of rows from before
    known = {"device", "model", "dtype", "optimizer", "rank", "step_ms", "ratio_to_fused_adamw", "extra_bytes",
             "launches"}  # fmt: skip
    assert all(known <= set(one) for one in first["rows"])
    to_foreach = [one["ratio_to_foreach_adamw"] for one in first["rows"]]  # on a CPU in the same rounds
    assert to_foreach[2] == 1.0
    assert all(ratio > 0 for ratio in to_foreach)
    first["rows"][1]["step_ms"] = 123.0  # would not be found again by chance
    del first["rows"][3]
    (tmp_path / "step_time.json").write_text(json.dumps(first), encoding="utf-8")
    run(*TINY, *THREE, "--ranks", "8,16", "--out", str(tmp_path))
    second = read(tmp_path)["rows"]
    assert second[:3] == first["rows"]
    assert [(one["optimizer"], one["rank"]) for one in second[3:]] == [("LoRAPreAdamW", 16), ("SGD, fused", None)]
    run(*TINY, *THREE, "--ranks", "8", "--again", "LoRAPre", "--out", str(tmp_path))
    third = {(one["optimizer"], one["rank"]): one for one in read(tmp_path)["rows"]}
    assert len(third) == 5
    assert third["LoRAPreAdamW", 8]["step_ms"] != 123.0
    assert third["LoRAPreAdamW", 16] == second[3]


def test_rows_are_written_as_they_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true, made = Bench.row, 0

    def interrupted(self: Bench, *arguments: Any) -> StepRow:
        nonlocal made
        made += 1
        if made == 3:
            raise KeyboardInterrupt
        return true(self, *arguments)

    monkeypatch.setattr(Bench, "row", interrupted)
    with pytest.raises(SystemExit, match="go on with the same command"):
        run(*TINY, "--ranks", "8,16", "--out", str(tmp_path))
    assert [one["rank"] for one in read(tmp_path)["rows"]] == [None, 8]


def test_no_row_begins_after_the_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(*TINY, "--ranks", "8", "--contestants", "lorapre-adamw", "--out", str(tmp_path))
    command.main(
        time.monotonic() - 60, None, [*TINY, *THREE, "--ranks", "8,16", "--budget", "59s", "--out", str(tmp_path)]
    )
    assert [one["rank"] for one in read(tmp_path)["rows"]] == [None, 8]
    assert "3 rows are left" in capsys.readouterr().out


def test_rows_of_another_torch_are_not_mixed(tmp_path: Path) -> None:
    results = Results.load(COMMITTED)
    with pytest.raises(UserError, match=r"torch 2\.13\.0\+cpu, and this is 9\.9\. Give another"):
        results.go_on({"hardware": results.origin["hardware"], "versions": {"torch": "9.9"}})
    (tmp_path / "step_time.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be read"):
        Results.load(tmp_path)


def test_what_is_not_installed_or_fails_is_said_and_costs_no_other_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    true: Callable[[str], str] = importlib.metadata.version

    def version(name: str) -> str:
        if name == "galore-torch":
            raise importlib.metadata.PackageNotFoundError(name)
        return true(name)

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("no such library")

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr("step_time.contestants.LoRAPreMuon", broken)
    chosen = "galore,graph,lorapre-muon,sgd"
    with pytest.raises(SystemExit, match="failed: LoRAPreMuon 8: OSError: no such library"):
        run(*TINY, "--other-ranks", "8", "--contestants", chosen, "--out", str(tmp_path))
    said = capsys.readouterr().out
    page = (tmp_path / "table.md").read_text(encoding="utf-8")
    for line in (
        "not measured: galore-torch is not installed (step, llama-1m, float32, GaLore, 8)",
        "not measured: CUDA graphs need a GPU (step, llama-1m, float32, LoRAPreAdamW, CUDA graph, 8)",
        "not measured: OSError: no such library (step, llama-1m, float32, LoRAPreMuon, 8)",
    ):
        assert line in said
        assert f"- {line}" in page
    assert [one["optimizer"] for one in read(tmp_path)["rows"]] == [REFERENCE, "SGD, fused"]
    monkeypatch.undo()
    run(*TINY, "--other-ranks", "8", "--contestants", "lorapre-muon", "--out", str(tmp_path))
    assert "LoRAPreMuon" in [one["optimizer"] for one in read(tmp_path)["rows"]]
    assert {one["key"][-2] for one in read(tmp_path)["unmeasured"]} == {"GaLore", "LoRAPreAdamW, CUDA graph"}


def test_whole_training_steps_are_set_against_fused_adamw(tmp_path: Path) -> None:
    run(*TINY, "--ranks", "8", "--contestants", "lorapre-adamw", "--training", "llama-1m", "--training-ranks", "4",
        "--batch", "llama-1m=2", "--sequence", "16", "--out", str(tmp_path))  # fmt: skip
    rows = read(tmp_path)["training"]
    assert [(one["optimizer"], one["rank"]) for one in rows] == [(REFERENCE, None), ("LoRAPreAdamW", 4)]
    for one in rows:
        assert one["tokens_per_second"] == pytest.approx(32 / (one["step_ms"] / 1e3), rel=1e-3, abs=0.06)  # of tenths
    assert (tmp_path / "training.png").stat().st_size > 10_000


def test_the_kernels_reason_for_leaving_a_matrix_to_torch_is_kept_for_every_row() -> None:
    from lorapre.backends import dispatch

    for _ in range(2):  # the library itself says it once
        with said() as notes:
            dispatch._say_once("Matrices are stepped in plain torch: a reason.")
        assert notes == ["Matrices are stepped in plain torch: a reason."]


# What is printed.


def test_a_line_of_the_table_has_every_figure_in_its_unit() -> None:
    ours = replace(
        row(),
        step_ms=8.125,
        bytes_moved=19.3e9,
        flops=4.64e11,
        copy_share=0.789,
        product_share=0.1234,
        extra_bytes=1234,
    )
    foreach = replace(row(), optimizer="AdamW, foreach", rank=None, step_ms=32.5, ratio_to_fused_adamw=2.4, flops=0.0)
    partial = replace(foreach, model="llama-7b", layers=12, extra_bytes=None, launches=None, kernels=None, copies=None)
    lines = report.step_table([ours, foreach, partial]).splitlines()[2:]
    assert lines == [
        "| llama-1b | float32 | AdamW, foreach | – | 32.5 | 2.40 | 1.00 | – | – | – | – | 1.00 % | 18 (16) | 0 |",
        "| llama-1b | float32 | LoRAPreAdamW | 64 | 8.12 | 0.60 | 0.25 | 19.3 | 79 % | 0.464 | 12 % | 1.23 % | 18 (16) "
        "| 0 |",
        "| llama-7b (12 of 32 layers) | float32 | AdamW, foreach | – | 32.5 | 2.40 | 1.00 | – | – | – | – | – | – "
        "| – |",
    ]
    assert all(line.count("|") == report.STEP_HEADER.splitlines()[1].count("|") for line in lines)
    (line,) = report.step_table([replace(row(), ratio_to_foreach_adamw=1.4)]).splitlines()[2:]
    assert "| 8 | 0.60 | 1.40 |" in line, "and where it was measured in the same rounds, that"


def test_the_footnotes_give_what_was_shared_out_and_replayed() -> None:
    galore = replace(row(), optimizer="GaLore", plain_ms=40.0, rare_ms=20_000.0, rare_every=200, rare_layers=1)
    replayed = replace(row(), optimizer="LoRAPreAdamW, CUDA graph", same_bits=False)
    assert report.footnotes([galore, replayed]) == [
        "† llama-1b float32 GaLore r = 64: 40 ms a plain step; every 200 steps 20000 ms more, measured on 1 of 24 "
        "layers and multiplied, here shared out.",
        "llama-1b float32 LoRAPreAdamW, CUDA graph r = 64: replays leave OTHER BITS than launched steps in weights and "
        "state.",
    ]


def test_goals_are_judged_by_the_worst_row(tmp_path: Path) -> None:
    steps = [
        row(),
        replace(row(), rank=8, ratio_to_fused_adamw=0.4),
        replace(row(), rank=128, ratio_to_fused_adamw=0.81, extra_bytes=2001),
        replace(row(), rank=512, ratio_to_fused_adamw=1.5, launches=21),
        replace(row(), optimizer="LoRAPreAdamW, CUDA graph", same_bits=True),
        replace(row(), device="cpu", rank=16, ratio_to_fused_adamw=9.0),
    ]
    training = [
        TrainingRow("cuda", "llama-1b", "LoRAPreAdamW", rank, 8, 1024, 100.0, 81920.0, ratio)
        for rank, ratio in ((32, 0.995), (128, 1.01))
    ]
    found = {goal.what: (goal.found, goal.met) for goal in goals(Results(tmp_path, {}, steps, training))}
    assert found == {
        "llama-1b, float32, r <= 64: at most 0.6 of fused AdamW's time": ("0.60 at r = 64", True),
        "llama-1b, float32, r = 65 to 128: at most 0.8 of fused AdamW's time": ("0.81 at r = 128", False),
        "llama-1b, float32, r = 129 to 512: at most 1.5 of fused AdamW's time": ("1.50 at r = 512", True),
        "at most 2% of the weights' bytes on top during a step": ("2.00% (llama-1b, float32, r = 128)", False),
        "at most 20 kernel launches a step": ("21 (llama-1b, float32, r = 512)", False),
        "replays of a captured step leave the bits of launched ones": ("1 of 1 rows", True),
        "training at 0.99 of fused AdamW's tokens a second or above": ("0.995 (llama-1b, r = 32)", True),
    }


def test_the_committed_rows_of_the_cpu_are_still_read_and_published(tmp_path: Path) -> None:
    shutil.copyfile(COMMITTED / "step_time.json", tmp_path / "step_time.json")
    before = read(tmp_path)
    run("--publish", "--out", str(tmp_path))
    assert read(tmp_path) == before
    page = (tmp_path / "table.md").read_text(encoding="utf-8")
    for one in before["rows"]:
        rank = "–" if one["rank"] is None else one["rank"]
        begin = f"| llama-60m | float32 | {one['optimizer']} | {rank} | "
        assert f"{begin}{report._figures(one['step_ms'])} | {one['ratio_to_fused_adamw']:.2f} |" in page
    assert f"{before['hardware']}, {before['threads']} threads" in page
    assert f"{before['date'][:10]}, python {before['versions']['python']}" in page
    assert (tmp_path / "ratio.png").read_bytes()[:4] == b"\x89PNG"


def test_readme_gets_the_section_between_its_marks_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "benchmarks" / "results" / "step-time"
    folder.mkdir(parents=True)
    origin = {"hardware": "1 x GPU", "date": "2026-11-23T00:00:00", "versions": {"torch": "2.11"}, "seed": 0}
    other = replace(row(), dtype="bfloat16", step_ms=5.0, ratio_to_fused_adamw=0.55, extra_bytes=500)
    reference = replace(row(), optimizer=REFERENCE, rank=None, step_ms=13.7, ratio_to_fused_adamw=1.0, extra_bytes=0)
    results = Results(folder, origin, [row(), other, reference])
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    report.README.write_text(f"a\n{report.BEGIN}\nold\n{report.END}\nz\n", encoding="utf-8")
    report.write_readme(results)
    text = report.README.read_text(encoding="utf-8")
    assert text.startswith(f"a\n{report.BEGIN}\n| one step on the matrices of llama-1b | float32, ms | ")
    assert text.endswith(f"{report.END}\nz\n")
    assert "old" not in text
    assert (
        "| AdamW, fused | 13.7 | 1.00 | – | – | 18 | 0.00 % |\n"
        "| LoRAPreAdamW, r = 64 | 8 | 0.60 | 5 | 0.55 | 18 | 1.00 % |\n" in text
    )
    report.README.write_text("no marks", encoding="utf-8")
    with pytest.raises(UserError, match=r"README\.md lacks the lines"):
        report.write_readme(results)
    with pytest.raises(UserError, match="is not in benchmarks/results"):
        report.write_readme(Results(tmp_path, origin, [row()]))


def test_a_missing_row_is_forgotten_once_it_is_there(tmp_path: Path) -> None:
    results = Results(tmp_path)
    missing = Unmeasured(row().key, "out of memory")
    results.add(missing)
    assert Results.load(tmp_path).unmeasured == [missing]
    results.add(row())
    results.add(missing)  # a later failure does not undo it
    loaded = Results.load(tmp_path)
    assert loaded.unmeasured == []
    assert loaded.steps == [row()]


def test_a_plan_has_no_captured_step_in_training() -> None:
    plan = Plan(("llama-1m",), ("float32",), [KINDS["graph"], KINDS["sgd"]], (8,), (8,), ("llama-1m",), (8,))
    titles = {job.dtype: [one.title for one in job.rows] for job in plan.jobs()}
    assert titles[None] == [REFERENCE, "SGD, fused"]
    assert titles["float32"] == ["LoRAPreAdamW, CUDA graph", "SGD, fused"]
