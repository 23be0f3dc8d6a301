"""The fine-tuning tables (``benchmarks/finetune``): their runs are those of the lab's commands, and sessions go on.

Only light modules are imported here: the pool's workers import this file.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from finetune.plan import Run
from finetune.profiles import Contestant, Profile, Task
from finetune.rows import Rows, unpacked

TASK = Task("sums", "train.jsonl", "gsm8k", None, "test.jsonl", ("question", "answer"), 6, 4, 60, 30.0, 10)
OURS, ADAPTER, FULL = Contestant("lorapre-adamw", 4), Contestant("lora", 4), Contestant("full-adamw", None)
FIRST = Contestant("lorapre-adamw", 4, (("second_moment", "full"),))
PROFILE = Profile(
    TASK, {OURS: 1e-2, ADAPTER: 1e-2, FULL: 1e-2}, {FIRST: OURS}, batch_size=4, max_length=96, valid_examples=12,
    dense_lr=5e-3, bf16=False, validations=2,
)  # fmt: skip


def write_sums(folder: Path) -> None:
    """Sums as GSM8K writes its answers; the test's are others than the training's."""
    for name, numbers in (("train", range(60)), ("test", range(60, 70))):
        lines = [{"question": f"{i}+{i % 7}", "answer": f"#### {i + i % 7}"} for i in numbers]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def material(tmp_path: Path) -> Path:
    """The tiny model of ``lorapre finetune``, and sums."""
    from lorapre.lab.finetune.tiny import tiny_model, tiny_tokenizer

    folder = tmp_path / "material"
    tiny_model(0).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    write_sums(folder)
    return folder


def a_run(contestant: Contestant, kind: str = "search", seed: int = 0, lr: float = 1e-2) -> Run:
    return Run("search", kind, "sums", str(contestant), lr, seed)


@pytest.mark.parametrize("contestant", [OURS, FIRST, ADAPTER, FULL], ids=str)
def test_a_run_ends_with_the_loss_and_curve_of_lorapre_finetune_and_the_answers_of_lorapre_evaluate(
    material: Path, tmp_path: Path, contestant: Contestant
) -> None:
    from finetune.training import Trainer, run_config
    from rich.console import Console

    from lorapre.lab.evaluate.config import build_evaluate_config
    from lorapre.lab.evaluate.run import run_evaluation
    from lorapre.lab.finetune.job import run_finetuning

    trainer = Trainer(material, PROFILE)
    trainer.train(a_run(contestant, seed=3, lr=3e-2))  # leaves nothing behind
    made = trainer.train(a_run(contestant, "test", seed=2))
    config = run_config(PROFILE, material, contestant, a_run(contestant, seed=2))
    run = tmp_path / "run"
    intervals = {"eval_every": -(-made["steps"] // 2), "merge": contestant is ADAPTER}
    summary = run_finetuning(config.model_copy(update=intervals), run, Console(quiet=True))
    assert made["loss"] == pytest.approx(summary["valid_loss"], abs=1e-6)
    assert made["loss_before"] == pytest.approx(summary["valid_loss_before"], abs=1e-6)
    assert (made["state_bytes"], made["steps"]) == (summary["state_bytes"], summary["steps"])
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve = [(record["step"], record["valid_loss"]) for record in metrics if "valid_loss" in record]
    assert [step for step, _ in made["curve"]] == [step for step, _ in curve]
    assert [loss for _, loss in made["curve"]] == pytest.approx([loss for _, loss in curve], abs=1e-6)
    assert made["peak_bytes"] is None  # a CPU cannot tell one run's
    model = str(run / ("merged" if contestant is ADAPTER else "model"))
    given = {"model": model, "chat": True, "prompt": "question", "max_new_tokens": 6, "batch_size": 4}
    asked = build_evaluate_config(given, "gsm8k", [str(material / "test.jsonl")])
    run_evaluation(asked, tmp_path / "evaluation", Console(quiet=True))
    items = [json.loads(line) for line in (tmp_path / "evaluation" / "gsm8k.jsonl").read_text().splitlines()]
    assert unpacked(made["right"]) == [item["correct"] for item in items]
    assert made["samples"] == [item["completion"] for item in items[:2]]
    assert (made["asked"], sum(made["finish"].values())) == (10, 10)


@pytest.mark.parametrize("most", [None, 20])
def test_the_tokens_of_a_seed_are_those_of_lorapre_finetune_in_their_order(material: Path, most: int | None) -> None:
    from finetune.tokens import base_data, of_seed
    from finetune.training import prepare_tokens, run_config

    from lorapre.lab.finetune.preparation import load_data, plan_run

    profile = replace(PROFILE, train_examples=most, max_length=48)
    plans = [plan_run(run_config(profile, material, FULL, a_run(FULL, seed=seed))) for seed in (0, 5)]
    prepare_tokens(material, profile)
    (kept,) = material.glob("tokens-*.pickle")
    made = kept.stat().st_mtime_ns
    base = base_data(plans[0], material, TASK)
    assert kept.stat().st_mtime_ns == made
    for plan, found in zip(plans, (base, of_seed(plans[1], base)), strict=True):
        expected = load_data(plan)
        assert found.train.digest() == expected.train.digest()
        assert found.valid.digest() == expected.valid.digest()
        assert [one.where for one in found.train.kept] == [one.where for one in expected.train.kept]
        assert (found.rows, found.steps) == (expected.rows, expected.steps)
    assert base.train.digest() != found.train.digest()
    prepare_tokens(material, replace(profile, max_length=40))
    assert len(list(material.glob("tokens-*.pickle"))) == 2


def test_the_state_of_the_matrices_leaves_out_embeddings_and_norms_and_is_the_adapters_whole(material: Path) -> None:
    from finetune.training import Trainer

    from lorapre.lab.finetune.tiny import tiny_model
    from lorapre.lab.optimizers import OPTIMIZERS, matrix_parameters

    trainer = Trainer(material, PROFILE)
    matrices = matrix_parameters(tiny_model(0))
    full, adapter, first = (trainer.train(a_run(one)) for one in (FULL, ADAPTER, FIRST))
    # AdamW: two numbers a weight and a step counter a matrix.
    assert full["matrix_state_bytes"] == sum(8 * param.numel() + 4 for param in matrices)
    assert full["matrix_state_bytes"] < full["state_bytes"]
    assert adapter["matrix_state_bytes"] == adapter["state_bytes"] > 0
    formula = OPTIMIZERS["lorapre-adamw"].formula({"second_moment": "full"})
    assert first["matrix_state_bytes"] == sum(formula(*param.shape, 4) for param in matrices)


def test_a_run_that_diverges_has_no_loss_and_no_answers_and_the_next_one_is_as_ever(material: Path) -> None:
    from finetune.training import Trainer

    trainer = Trainer(material, PROFILE)
    before = trainer.train(a_run(ADAPTER))
    diverged = trainer.train(a_run(FULL, "test", lr=1e30))
    assert (diverged["loss"], diverged["state_bytes"]) == (None, None)
    assert "right" not in diverged
    assert trainer.train(a_run(ADAPTER))["loss"] == before["loss"]


def test_a_speed_run_validates_at_its_end_alone(material: Path) -> None:
    from finetune.training import Trainer

    row = Trainer(material, PROFILE).train(a_run(ADAPTER, "speed"))
    assert [step for step, _ in row["curve"]] == [0, row["steps"]]
    assert row["examples_per_s"] > 0


# Sessions.


class Imitation:
    """A trainer in a worker, whose losses are lowest at the rate 0.02."""

    def train(self, run: Run) -> dict[str, Any]:
        began = time.time()
        time.sleep(0.05)
        contestant = PROFILE.contestants[run.contestant]
        return {
            "stage": run.stage, "kind": run.kind, "task": run.task, "contestant": run.contestant, "lr": run.lr,
            "seed": run.seed, "method": contestant.method, "rank": contestant.rank, "options": {}, **PROFILE.protocol,
            "loss": abs(math.log2(run.lr / 0.02)), "prepared": 0.0, "trained": 0.1, "tested": 0.0, "seconds": 0.1,
            "began": began, "ended": time.time(), "pid": os.getpid(),
        }  # fmt: skip

    def recover(self) -> bool:
        return True


def make_imitation(material: Path, profile: Profile) -> Imitation:
    return Imitation()


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes sessions of imitated runs on the rows in ``work``."""
    from finetune import session

    monkeypatch.setattr(session, "make_trainer", make_imitation)
    monkeypatch.setattr(session, "prepare_tokens", lambda *_: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    folder = tmp_path / "material"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    write_sums(folder)
    rows = tmp_path / "work" / "rows.jsonl"

    def make(
        stages: str, only: str = "", *, first: str | None = None, jobs: int = 1, profile: Profile = PROFILE
    ) -> list[dict[str, Any]]:
        urgent = None if first is None else re.compile(first)
        one = session.Session(profile, Rows(rows), stages.split(","), math.inf, re.compile(only), urgent)
        one.make_runs(folder, jobs)
        return [json.loads(line) for line in rows.read_text().splitlines()]

    return make


EVERY = "search,seeds,ranks,speed"


def test_a_session_goes_on_where_another_one_ended_and_makes_nothing_twice(session: Any) -> None:
    assert {row["contestant"] for row in session("search", "lora@4")} == {"lora@4"}
    every = session(EVERY)
    keys = [(row["kind"], row["contestant"], row["lr"], row["seed"]) for row in every]
    assert len(set(keys)) == len(keys)
    # The first rate, its neighbours, one beyond the best; a rank begins with the best of its base.
    rates = {name: sorted(lr for kind, one, lr, _ in keys if (kind, one) == ("search", name)) for _, name, *_ in keys}
    assert rates == {
        **{name: [0.005, 0.01, 0.02, 0.04] for name in ("lorapre-adamw@4", "lora@4", "full-adamw")},
        "lorapre-adamw@4+second_moment=full": [0.01, 0.02, 0.04],
    }
    tested = [(one, lr, seed) for kind, one, lr, seed in keys if kind == "test"]
    assert sorted(tested) == sorted((name, 0.02, seed) for name in rates for seed in (1, 2, 3))
    assert session(EVERY) == every


def test_runs_that_are_to_be_first_are_made_before_all_others_whatever_their_stage(session: Any) -> None:
    rows = session("search,seeds", first=r" full-adamw lr")
    made = [(row["contestant"], row["kind"]) for row in rows]
    assert made[:7] == [("full-adamw", "search")] * 4 + [("full-adamw", "test")] * 3
    assert [kind for _, kind in made[7:]] == ["search"] * 8 + ["test"] * 6
    assert {one for one, _ in made[7:]} == {"lorapre-adamw@4", "lora@4"}


def test_a_speed_run_has_the_machine_for_itself(session: Any) -> None:
    rows = session(EVERY, jobs=2)
    assert len({row["pid"] for row in rows}) == 2
    speed = [row for row in rows if row["kind"] == "speed"]
    assert len(speed) == 3
    for one in speed:
        others = [row for row in rows if row is not one]
        assert all(row["ended"] <= one["began"] or row["began"] >= one["ended"] for row in others)


def test_rows_of_another_protocol_or_other_material_are_not_mixed_with_new_ones(session: Any, tmp_path: Path) -> None:
    from lorapre.lab.errors import UserError

    before = session("search", "lora@4")
    with pytest.raises(ValueError, match=r"dense_lr 0\.005, and this profile's have 0\.1"):
        session("search", profile=replace(PROFILE, dense_lr=0.1))
    (tmp_path / "material" / "train.jsonl").write_text("changed")
    with pytest.raises(UserError, match=r"train\.jsonl was"):
        session("search")
    (tmp_path / "material" / "test.jsonl").unlink()
    with pytest.raises(ValueError, match=r"has no test\.jsonl\. Make it with --prepare data"):
        session("search")
    assert [json.loads(line) for line in (tmp_path / "work" / "rows.jsonl").read_text().splitlines()] == before


def test_a_run_is_expected_to_take_as_long_as_the_last_one_of_its_kind(tmp_path: Path) -> None:
    from finetune.session import Session

    rows = Rows(tmp_path / "rows.jsonl")
    one = Session(PROFILE, rows, ("search",), math.inf)
    test = replace(a_run(ADAPTER), kind="test")
    assert one.estimate(test) == 0
    made = Imitation().train(a_run(ADAPTER))
    rows.add(made | {"seconds": 10.0})
    assert one.estimate(a_run(ADAPTER, lr=0.1)) == 10
    assert one.estimate(a_run(OURS)) == 10
    rows.add(made | {"contestant": str(OURS), "kind": "test", "seconds": 40.0, "tested": 25.0})
    assert one.estimate(test) == 10 + 25
    rows.add(made | {"kind": "test", "seconds": 32.0, "tested": 20.0})
    assert one.estimate(test) == 32


def test_the_command_says_what_is_to_come_and_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from finetune.command import main

    def run(*arguments: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["finetune", *arguments])
            main(time.monotonic(), None)

    work = ["--work", str(tmp_path / "work")]
    run("--task", "gsm8k", "--dry-run", *work)
    told = capsys.readouterr().out
    assert "search: 42 x search" in told  # 14 methods, 3 rates
    assert "seeds: 42 x test" in told  # 14 methods, 3 seeds
    assert "ranks: 24 x search" in told  # 8 contestants, 3 rates
    assert not (tmp_path / "work").exists()
    with pytest.raises(SystemExit, match=r"has no model/config\.json\. Make it with --prepare model"):
        run("--task", "gsm8k", "--material", str(tmp_path / "none"), *work)
    with pytest.raises(SystemExit, match="2"):
        run("--task", "gsm8k", "--stages", "search,search")
    assert "each once" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run("--prepare", "model")
    assert "Give --gguf" in capsys.readouterr().err
