"""What the command line shows: help, dry run, progress, summary."""

from __future__ import annotations

import importlib.metadata
import re
import socket
import sys
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer.rich_utils
from _lab import Cli, exit_code, summary, tree, write_text
from rich.cells import cell_len
from rich.console import Console

from lorapre import LoRAPreAdamW, LoRAPreLion, LoRAPreMuon, LoRAPreSGD, estimate_memory, param_groups
from lorapre.lab import callbacks, cli
from lorapre.lab.callbacks import ProgressBar
from lorapre.lab.config import PRESETS, PretrainConfig, build_config, option_name
from lorapre.lab.models import LLAMAS, resolve_model
from lorapre.lab.optimizers import OPTIMIZERS
from lorapre.lab.pretrain import run_pretraining
from lorapre.optim.summary import format_bytes

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def widest(text: str) -> int:
    return max(cell_len(line) for line in re.split(r"[\r\n]", CONTROL.sub("", text)))


@pytest.fixture
def narrow(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(typer.rich_utils, "MAX_WIDTH", 80)


def show_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["lorapre", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    return CONTROL.sub("", capsys.readouterr().out)


@pytest.mark.usefixtures("narrow")
def test_help_fits_80_columns_and_lists_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = show_help(capsys, monkeypatch, "--help")
    assert widest(text) <= 80
    assert "pretrain" in text
    assert "LoRA-Pre" in text


@pytest.mark.usefixtures("narrow")
def test_help_of_pretrain_fits_80_columns_and_lists_every_option(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = show_help(capsys, monkeypatch, "pretrain", "--help")
    assert widest(text) <= 80
    names = {option_name(name).removeprefix("--") for name in PretrainConfig.model_fields}
    names |= {"preset", "config", "out", "resume", "dry-run", "help"}
    assert names - set(re.findall(r"^│ --([a-z0-9-]+)", text, re.MULTILINE)) == set()
    assert "…" not in text


@pytest.mark.usefixtures("here")
def test_help_names_every_choice_and_the_true_defaults(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(typer.rich_utils, "MAX_WIDTH", 2000)
    monkeypatch.setenv("COLUMNS", "2000")
    text = show_help(capsys, monkeypatch, "pretrain", "--help")
    rows = {match[1].replace("-", "_"): match[0] for match in re.finditer(r"^│ --([a-z0-9-]+) .*$", text, re.MULTILINE)}
    for size in LLAMAS:
        assert f"-{size.removeprefix('llama-')}" in rows["model"]
    assert "`lorapre optimizers` lists" in rows["optimizer"]
    for preset in PRESETS:
        assert preset in rows["preset"]
    for schedule in ("cosine", "linear", "constant"):
        assert schedule in rows["schedule"]
    checked = 0
    config = PretrainConfig()
    for name in PretrainConfig.model_fields:
        stated = re.search(r"default (-?[\d.]+\d|\d)( %)?", rows["set" if name == "options" else name])
        if stated and not stated[2]:
            actual = config.total_steps if name == "steps" else getattr(config, name)
            assert float(stated[1]) == actual, name
            checked += 1
    assert checked >= 10
    assert "llama-3m (default)" in rows["model"]
    assert config.model == "llama-3m"
    assert f"{config.optimizer} (default)" in rows["optimizer"]


@pytest.mark.usefixtures("here")
def test_optimizers_lists_every_name_with_its_state_and_what_it_lacks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    installed = importlib.metadata.version

    def version(name: str) -> str:
        if name == "galore-torch":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert exit_code("optimizers") == 0
    printed = capsys.readouterr().out.splitlines()
    lines = {line[1:].split()[0]: line for line in printed if re.match(r"│\S", line)}
    assert lines.keys() == OPTIMIZERS.keys()
    assert " 1.00 " in lines["adamw"]
    # Two moments as four factors of a quarter of the rank: 2 (p + q) r = p q, half of AdamW's 2 p q.
    assert " 0.50 " in lines["lorapre-adamw-paper"]
    # One momentum as two factors: (p + q) r = p q / 2, a quarter of it.
    for name in ("lorapre-muon", "lorapre-muon-paper", "lorapre-sgd", "lorapre-lion"):
        assert " 0.25 " in lines[name]
    assert "needs galore-torch" in lines["galore"]
    below = " ".join(line for line in printed if not line.startswith(("│", "┃")))
    assert re.search(r"--set of lorapre-adamw, .*: .*second_moment", below)
    assert re.search(r"--set of lorapre-muon, lorapre-muon-paper: momentum, nesterov, .*adjust_lr_fn", below)
    assert re.search(r"--set of lorapre-lion: betas, ", below)


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("narrow", "_offline")
def test_a_dry_run_of_a_preset_says_all_within_80_columns_and_touches_no_file(
    pretrain: Cli, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPRE_CACHE", str(here / "cache"))
    before = tree(here)
    outcome = pretrain("--preset", "galore-60m", "--dry-run")
    assert outcome.code == 0, outcome
    assert widest(outcome.out) <= 80
    assert tree(here) == before
    words = " ".join(outcome.out.split())
    # By hand: embeddings and head 2 x 32,000 x 512, 8 layers, norms; matrices at rank 128, all else dense.
    dense, vectors = 2 * 32_000 * 512, 17 * 512
    shapes = 8 * ([(512, 512)] * 4 + [(512, 1376)] * 3)
    parameters = dense + vectors + sum(p * q for p, q in shapes)
    state = sum(2 * (p + q) * 128 * 4 for p, q in shapes) + 8 * (dense + vectors) + 4 * (len(shapes) + 2 + 17)
    adamw = 8 * parameters + 4 * (len(shapes) + 2 + 17)
    steps = 1_100_000_000 // (512 * 256)
    assert f"llama-60m, {parameters:,} parameters, vocabulary of 32,000" in words
    assert "hf:allenai/c4:en" in words
    assert "lorapre-adamw-paper, rank 128" in words
    assert f"{steps:,}" in words
    assert f"{steps * 512 * 256:,} (512 x 256 a step" in words
    assert f"{parameters * 4 / 1e6:.2f} MB" in words
    assert f"{state / 1e6:.2f} MB" in words
    assert f"AdamW: {adamw / 1e6:.2f} MB" in words


@pytest.mark.usefixtures("narrow", "_offline")
@pytest.mark.parametrize("preset", [None, *sorted(PRESETS)])
def test_every_preset_and_the_default_have_a_dry_run(pretrain: Cli, here: Path, preset: str | None) -> None:
    outcome = pretrain("--dry-run", *([] if preset is None else ["--preset", preset]))
    assert outcome.code == 0
    assert widest(outcome.out) <= 80
    config = build_config({}, preset=preset)
    assert f"{config.total_steps:,}" in outcome.out
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--tokenizer", "bpe:many"], "bpe:many"),
        (["--tokenizer", "./nothing"], "'./nothing' does not exist"),
        (["--tokenizer", "tiny.json"], "'tiny.json' cannot be read"),
        (["--data", "nothing.txt"], "'nothing.txt' does not exist"),
        (["--data", "text.txt", "--valid-data", "text.txt"], "text.txt is in data and in valid_data"),
        (["--rank", "0"], "--rank 0"),
        (["--optimizer", "adagrad"], "--optimizer adagrad"),
        (["--model", "llama-9000"], "llama-9000"),
        (["--batch-size", "7", "--accumulation", "2"], "--batch-size 7"),
        (["--optimizer", "adamw", "--diagnose", "5"], "--diagnose 5"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_dry_run_refuses_what_the_run_would(pretrain: Cli, here: Path, arguments: list[str], word: str) -> None:
    outcome = pretrain("--dry-run", *arguments)
    assert outcome.code == 2
    assert word in outcome.message


@pytest.mark.parametrize("flag", [[], ["--dry-run"]])
def test_a_machine_that_cannot_compile_is_told_before_anything_is_read(
    pretrain: Cli, here: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch, flag: list[str]
) -> None:
    def fail(function: Any) -> Any:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", fail)
    outcome = pretrain(*tiny, "--compile", "--out", "run", *flag)
    assert outcome.code == 2
    assert all(word in outcome.message for word in ("--compile", "No working C++ compiler", "leave it out"))
    assert not (here / "run").exists()


def test_a_log_file_gets_ten_lines_of_progress_for_each_optimizer(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    assert "\x1b" not in printed
    for optimizer in ("lorapre-adamw", "adamw"):
        lines = re.findall(
            rf"^{optimizer} step (\d+)/50 loss (\d\.\d{{3}}) ppl (\d+\.\d) [\d.]+k tok/s$", printed, re.MULTILINE
        )
        assert [int(step) for step, *_ in lines] == list(range(5, 51, 5))
        part = folder if optimizer == "lorapre-adamw" else folder / "compare-adamw"
        metrics = (part / "metrics.jsonl").read_text()
        for step, loss, perplexity in lines:
            value = float(re.search(rf'"step": {step},.*?"loss": ([\d.]+)', metrics)[1])  # type: ignore[index]
            assert loss == f"{value:.3f}"
            assert float(perplexity) == pytest.approx(2.718281828**value, rel=0.02)


def test_the_summary_is_printed_with_both_runs_and_the_bigram_model(finished: tuple[Path, str], lab: Path) -> None:
    folder, printed = finished
    facts = summary(folder)
    rows = [line for line in printed.splitlines() if line.startswith("│")]
    assert [row.split()[1] for row in rows] == ["lorapre-adamw", "adamw", "bigram"]
    for row, loss in zip(
        rows, (facts["valid_loss"], facts["compare"]["adamw"]["valid_loss"], facts["bigram_loss"]), strict=True
    ):
        assert f" {loss:.4f} " in row
    assert max(cell_len(row) for row in rows) <= 80
    share = facts["state_bytes"] / facts["adamw_state_bytes"]
    assert f"{share:.1%} of AdamW's" in printed
    assert f"run folder: {folder}" in printed


def test_names_that_look_like_markup_are_printed_as_they_are(pretrain: Cli, tiny: list[str], here: Path) -> None:
    write_text(here / "[red]text[bold].txt", (here / "text.txt").read_text().split("\n<|endoftext|>\n")[:-1])
    (here / "tiny[bold].json").write_bytes((here / "tiny.json").read_bytes())
    arguments = [*tiny, "--out", "[/blue]"]
    arguments[arguments.index("text.txt")] = "[red]text[bold].txt"
    arguments[arguments.index("tiny.json")] = "tiny[bold].json"
    announced = pretrain(*arguments, "--dry-run")
    assert "[red]text[bold].txt" in announced.out
    outcome = pretrain(*arguments)
    assert outcome.code == 0
    for name in ("[red]text[bold].txt (60", "tiny[bold].json, ", "run folder: [/blue] "):
        assert name in outcome.out
    assert (here / "[/blue]" / "summary.json").exists()


def test_a_run_without_out_goes_to_a_folder_of_its_own(pretrain: Cli, tiny: list[str], here: Path) -> None:
    assert pretrain(*tiny).code == 0
    (run,) = (here / "runs").iterdir()
    assert re.fullmatch(r"lorapre-adamw-\d{8}-\d{6}", run.name)
    assert (run / "summary.json").exists()


def test_a_terminal_gets_a_bar_with_loss_speed_and_eta_within_80_columns(here: Path) -> None:
    screen = StringIO()
    console = Console(force_terminal=True, width=80, file=screen, highlight=False)
    config = PretrainConfig(
        model="tiny.json", data=["text.txt"], tokenizer="bpe:300", batch_size=8, sequence_length=16, steps=12,
        log_every=1, optimizer="lorapre-adamw-paper",
    )  # fmt: skip
    run_pretraining(config, here / "run", console)
    shown = screen.getvalue()
    assert widest(shown) <= 80
    last = [line for line in re.split(r"[\r\n]", CONTROL.sub("", shown)) if "12/12" in line][-1]
    loss = (here / "run" / "metrics.jsonl").read_text().split('"step": 12,')[1].split('"loss": ')[1]
    assert re.search(rf"━+ 12/12 loss {float(loss.split(',')[0]):.3f} ppl [\d.]+ [\d.]+k tok/s ETA 0:00", last)
    assert "\x1b[?25h" in shown[shown.rindex("\x1b[?25l") :]  # the cursor is back


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_bar_of_a_long_run_stays_on_one_line_of_80_columns(optimizer: str) -> None:
    screen = StringIO()
    bar = ProgressBar(Console(force_terminal=True, width=80, file=screen), optimizer, 512 * 256)
    state: Any = SimpleNamespace(global_step=0, max_steps=99_999)
    unused: Any = None
    bar.on_train_begin(unused, state, unused)
    bar._started -= 36_000
    bar._progress.tasks[0].start_time = -36_000
    state.global_step = 49_999
    bar.on_step_end(unused, state, unused)
    bar.on_log(unused, state, unused, logs={"loss": 10.1234})
    screen.truncate(0)
    bar._progress.refresh()
    bar.stop()
    text = CONTROL.sub("", screen.getvalue()).replace("\0", "").strip()
    frames = [frame for frame in re.split(r"[\r\n]+", text) if frame.strip()]
    assert max(map(cell_len, frames)) <= 80
    for frame in frames:
        assert "49999/99999 loss 10.123 ppl 24919.4 182.0k tok/s ETA " in frame, frame
        assert re.search(r"ETA \d+:\d\d:\d\d *$", frame), frame
        assert "━━━" in frame


def test_the_eta_of_a_resumed_run_counts_its_own_steps_alone() -> None:
    screen = StringIO()
    bar = ProgressBar(Console(force_terminal=True, width=100, file=screen), "adamw", 128)
    state: Any = SimpleNamespace(global_step=900, max_steps=1000)
    unused: Any = None
    bar.on_train_begin(unused, state, unused)
    task = bar._progress.tasks[0]
    clock = bar._progress.get_time()
    task.start_time, task.stop_time = clock - 100, clock  # 100 s for 10 steps: 90 more take 900 s
    state.global_step = 910
    bar.on_step_end(unused, state, unused)
    (column,) = [column for column in bar._progress.columns if isinstance(column, callbacks._Remaining)]
    assert str(column(task)) == "ETA 15:00"
    bar.stop()


@pytest.mark.usefixtures("sketched")
@pytest.mark.parametrize(
    "given",
    [
        *(["adamw"], ["muon"], ["galore-ours"], ["sltrain"], ["low-rank"], ["lorapre-adamw"]),
        *(["lorapre-muon"], ["lorapre-muon-paper"], ["lorapre-sgd"], ["lorapre-lion"]),
        ["lorapre-adamw", "--set", "second_moment=full", "--set", "state_dtype=bfloat16"],
    ],
    ids=" ".join,
)
def test_a_dry_run_counts_what_the_run_then_holds(pretrain: Cli, here: Path, tiny: list[str], given: list[str]) -> None:
    printed = pretrain(*tiny, "--optimizer", *given, "--dry-run").out
    assert pretrain(*tiny, "--optimizer", *given, "--out", "run").code == 0
    facts = summary(here / "run")
    assert (
        f"optimizer state  {format_bytes(facts['state_bytes'])} (AdamW: {format_bytes(facts['adamw_state_bytes'])})"
        in printed
    )
    assert f"weights          {format_bytes(4 * facts['parameters'])} " in printed


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [
        ("lorapre-adamw", LoRAPreAdamW),
        ("lorapre-muon", LoRAPreMuon),
        ("lorapre-sgd", LoRAPreSGD),
        ("lorapre-lion", LoRAPreLion),
    ],
)
@pytest.mark.parametrize("rank", [8, 1])  # at 1 the embeddings' AdamW needs more than the matrices
def test_a_dry_run_knows_the_scratch_of_our_optimizers_and_of_the_adamw_beside_them(
    pretrain: Cli, tiny: list[str], optimizer: str, kind: Any, rank: int
) -> None:
    model = resolve_model("tiny.json").build(0, device="meta")
    # The model's vocabulary is the tokenizer's, 300, as in its file.
    matrices = [group for group in param_groups(model, rank=rank) if group.get("compress", True)]
    dense = [2 * 300 * 32, 5 * 32]  # of a group AdamW takes a list of all numbers, or three times the largest tensor
    beside = 4 * max(dense[0] * 3 // 2, dense[1])
    own = estimate_memory(matrices, optimizer=kind, device="cpu").scratch  # where the suite runs
    assert (own > beside) is (rank == 8) or kind in (LoRAPreAdamW, LoRAPreMuon)
    expected = max(own, beside)
    given = ["--optimizer", optimizer, "--rank", str(rank), "--dry-run"]
    printed = " ".join(pretrain(*tiny, *given).out.split())
    assert f"step scratch at most {format_bytes(expected)} " in printed
    assert "step scratch not known" in " ".join(pretrain(*tiny, "--optimizer", "muon", "--dry-run").out.split())
