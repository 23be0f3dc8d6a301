"""A run that was interrupted and resumed equals the run left alone, bit for bit on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from _lab import (
    FINISHED,
    Cli,
    Cut,
    assert_same_run,
    cut_before_step,
    exit_code,
    optimizer_steps,
    options,
    records,
    sentences,
    summary,
    timeless,
    tree,
    write_text,
)

from lorapre.lab.callbacks import CheckpointMarker

pytestmark = pytest.mark.usefixtures("sketched")
STEPS_PER_EPOCH = 31
RUN = options(
    model="tiny.json",
    data="text.txt",
    tokenizer="bpe:300",
    batch_size=8,
    accumulation=2,
    sequence_length=16,
    steps=70,
    log_every=1,
    eval_every=20,
    seed=5,
)


@pytest.fixture(scope="module")
def alone(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run left alone."""
    folder = tmp_path_factory.mktemp("alone")
    for name in ("tiny.json", "text.txt"):
        shutil.copy2(lab / name, folder / name)
    torch.set_num_threads(1)  # as for every test, of which the first comes after this
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert exit_code("pretrain", *RUN, "--save-every", "30", "--out", "run") == 0
    assert len(records(folder / "run")) == 70 + 4
    return folder / "run"


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", "from lorapre.lab.cli import main; main()", "pretrain", *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)


def kill_once(process: subprocess.Popen[bytes], reached: Any) -> None:
    """SIGKILL as soon as ``reached()``; the run must not have ended before."""
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def logged(folder: Path, step: int) -> bool:
    metrics = folder / "metrics.jsonl"
    return metrics.exists() and f'{{"step": {step},' in metrics.read_text()


@pytest.mark.slow
def test_a_run_killed_before_and_after_its_first_checkpoint_ends_as_the_run_left_alone(
    pretrain: Cli, here: Path, alone: Path
) -> None:
    run = here / "run"
    kill_once(start(here, *RUN, "--save-every", "30", "--out", "run"), lambda: logged(run, 4))
    assert not (run / "checkpoints" / "checkpoint-30").exists()
    assert not (run / "summary.json").exists()

    # Killed anew in the second epoch, so that the first step after resuming lies in the first.
    kill_once(start(here, "--resume", "--out", "run"), lambda: logged(run, STEPS_PER_EPOCH + 6))
    assert (run / "checkpoints" / "checkpoint-30" / "complete").exists()
    assert not (run / "checkpoints" / "checkpoint-60").exists()

    assert pretrain("--resume", "--out", "run").code == 0
    assert_same_run(run, alone)


@pytest.mark.parametrize(
    ("save_every", "cut"),
    [
        pytest.param(STEPS_PER_EPOCH, STEPS_PER_EPOCH + 3, id="from a checkpoint at the end of an epoch"),
        pytest.param(7, 2 * STEPS_PER_EPOCH + 1, id="at the first step of an epoch"),
        pytest.param(60, 3, id="without any checkpoint"),
    ],
)
def test_a_run_cut_anywhere_and_resumed_ends_as_the_run_left_alone(
    pretrain: Cli, here: Path, alone: Path, save_every: int, cut: int
) -> None:
    with cut_before_step(cut):
        outcome = pretrain(*RUN, "--save-every", str(save_every), "--out", "run")
    assert outcome.code == 130
    assert "lorapre pretrain --resume --out run" in outcome.out
    assert pretrain("--resume", "--out", "run").code == 0
    assert_same_run(here / "run", alone)


def test_a_half_written_checkpoint_is_removed_and_not_resumed_from(
    pretrain: Cli, here: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = CheckpointMarker.on_save

    def interrupted(self: CheckpointMarker, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == 40:
            raise Cut
        mark(self, args, state, control, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointMarker, "on_save", interrupted)
        assert pretrain(*RUN, "--save-every", "20", "--out", "run").code == 130
    half = here / "run" / "checkpoints" / "checkpoint-40"
    assert half.is_dir()
    assert not (half / "complete").exists()
    (half / "model.safetensors").write_bytes(b"cut short")  # to be noticed if it were read

    with cut_before_step(30):
        assert pretrain("--resume", "--out", "run").code == 130
    assert not half.exists()
    assert records(here / "run")[-1]["step"] == 29  # it went on from 20, not from 40

    assert pretrain("--resume", "--out", "run").code == 0
    assert_same_run(here / "run", alone)


def test_the_command_to_go_on_with_quotes_the_folder(pretrain: Cli, tiny: list[str], here: Path) -> None:
    with cut_before_step(2):
        outcome = pretrain(*tiny, "--out", "my run")
    assert "lorapre pretrain --resume --out 'my run'" in outcome.out


def test_what_a_run_killed_while_it_wrote_its_model_left_is_removed(pretrain: Cli, here: Path, alone: Path) -> None:
    with cut_before_step(25):
        pretrain(*RUN, "--save-every", "20", "--out", "run")
    (here / "run" / ".model.tmp-1").mkdir()
    (here / "run" / ".model.tmp-1" / "model.safetensors").write_bytes(b"half")
    (here / "run" / ".loss.tmp-1.png").write_bytes(b"half")
    assert pretrain("--resume", "--out", "run").code == 0
    assert {path.name for path in (here / "run").iterdir()} == {path.name for path in alone.iterdir()}


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_damaged_checkpoint_is_named_and_without_it_the_run_goes_on(
    pretrain: Cli, here: Path, alone: Path, file: str
) -> None:
    with cut_before_step(45):
        pretrain(*RUN, "--save-every", "20", "--out", "run")
    damaged = here / "run" / "checkpoints" / "checkpoint-40"
    (damaged / file).write_bytes((damaged / file).read_bytes()[:200])
    with optimizer_steps() as taken:
        outcome = pretrain("--resume", "--out", "run")
    assert outcome.code == 2
    assert all(word in outcome.message for word in ("--resume", "checkpoint-40", "cannot be read", "Remove"))
    assert taken == []
    shutil.rmtree(damaged)
    assert pretrain("--resume", "--out", "run").code == 0
    assert_same_run(here / "run", alone)


def test_a_last_line_of_metrics_that_was_cut_short_is_dropped(pretrain: Cli, here: Path, alone: Path) -> None:
    with cut_before_step(45):
        pretrain(*RUN, "--save-every", "20", "--out", "run")
    metrics = here / "run" / "metrics.jsonl"
    whole = metrics.read_text()
    # 40 is the checkpoint's step: what follows it is written again, whole or cut.
    lines = whole.splitlines(keepends=True)
    assert json.loads(lines[-1])["step"] == 44
    metrics.write_text("".join(lines[:-1]) + lines[-1][:25])
    assert pretrain("--resume", "--out", "run").code == 0
    assert_same_run(here / "run", alone)


@pytest.mark.parametrize("steps", [20, 23])  # at a validation, and between two
def test_a_run_killed_after_its_last_step_trains_no_other_step(pretrain: Cli, here: Path, steps: int) -> None:
    arguments = [*RUN, "--save-every", "6", "--out", "run"]
    arguments[arguments.index("--steps") + 1] = str(steps)
    assert pretrain(*arguments).code == 0
    shutil.copytree(here / "run", here / "whole")
    shutil.rmtree(here / "run" / "model")
    (here / "run" / "summary.json").unlink()
    (here / "run" / "loss.png").unlink()
    with optimizer_steps() as taken:
        assert pretrain("--resume", "--out", "run").code == 0
    assert taken == []
    assert_same_run(here / "run", here / "whole")
    assert (here / "run" / "loss.png").exists()


def test_resuming_a_finished_run_trains_nothing_and_prints_its_summary(pretrain: Cli, here: Path, alone: Path) -> None:
    shutil.copytree(alone, here / "run")
    before = tree(here / "run")
    with optimizer_steps() as taken:
        outcome = pretrain("--resume", "--out", "run")
    assert outcome.code == 0
    assert taken == []
    assert tree(here / "run") == before
    assert f"{summary(alone)['valid_loss']:.4f}" in outcome.out
    assert "lorapre-adamw" in outcome.out


def test_an_interrupted_twin_is_resumed_and_the_finished_run_kept(
    pretrain: Cli, here: Path, finished: tuple[Path, str]
) -> None:
    whole, _ = finished
    arguments = options(
        model="tiny.json",
        data="text.txt",
        valid_data="valid.txt",
        **FINISHED,
        compare="adamw",
        out="run",
    )
    with cut_before_step(33, run="compare-adamw"):
        assert pretrain(*arguments).code == 130
    weights = here / "run" / "model" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert pretrain("--resume", "--out", "run").code == 0
    assert weights.stat().st_mtime_ns == written
    for part in (".", "compare-adamw"):
        assert timeless(records(here / "run" / part)) == timeless(records(whole / part))
        model = Path(part, "model", "model.safetensors")
        assert (here / "run" / model).read_bytes() == (whole / model).read_bytes()
    assert set(summary(here / "run")["compare"]) == {"adamw"}


def test_no_option_is_needed_to_resume_and_the_same_ones_may_be_repeated(
    pretrain: Cli, tiny: list[str], here: Path
) -> None:
    with cut_before_step(3):
        pretrain(*tiny, "--out", "run")
    assert pretrain(*tiny, "--resume", "--out", "run").code == 0
    assert summary(here / "run")["steps"] == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lr", "0.125"], ["--lr 0.125", "None"]),
        (["--steps", "5"], ["--steps 5", "began with --steps 4"]),
        (["--tokens", "640"], ["--tokens 640", "began with --steps 4"]),
        (["--batch-size", "4"], ["--batch-size 4", "began with 8"]),
        (["--optimizer", "adamw"], ["--optimizer adamw", "began with lorapre-adamw"]),
        (["--compare", "adamw"], ["--compare ['adamw']", "began with []"]),
        (["--data", "valid.txt"], ["--data ['valid.txt']", "text.txt"]),
        (["--seed", "1"], ["--seed 1", "began with 0"]),
        (["--bf16"], ["--bf16 True", "began with False"]),
        (["--preset", "galore-60m"], ["--preset", "config.yaml"]),
        (["--config", "other.yaml"], ["--config", "config.yaml"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_resuming_refuses_other_options_and_names_them(
    pretrain: Cli, tiny: list[str], here: Path, arguments: list[str], words: list[str]
) -> None:
    with cut_before_step(2):
        pretrain(*tiny, "--out", "run")
    before = tree(here / "run")
    with optimizer_steps() as taken:
        outcome = pretrain("--resume", "--out", "run", *arguments)
    assert outcome.code == 2
    assert all(word in outcome.message for word in words), outcome.message
    assert taken == []
    assert tree(here / "run") == before


@pytest.mark.parametrize(
    ("file", "documents", "word"),
    [
        pytest.param("text.txt", sentences(61), "description", id="another document"),
        pytest.param("text.txt", list(reversed(sentences(60))), "train_sha256", id="the same ones in another order"),
        pytest.param("valid.txt", list(reversed(sentences(4, seed=1))), "valid_sha256", id="the same to validate on"),
    ],
)
def test_resuming_refuses_changed_data_and_names_what_changed(
    pretrain: Cli, tiny: list[str], here: Path, alone: Path, file: str, documents: list[str], word: str
) -> None:
    # A tokenizer that does not follow the data, which would tell on it.
    arguments = [*tiny, *options(tokenizer=alone / "model", valid_data="valid.txt", out="run")]
    with cut_before_step(2):
        assert pretrain(*arguments).code == 130
    before = tree(here / "run")
    write_text(here / file, documents)
    with optimizer_steps() as taken:
        outcome = pretrain("--resume", "--out", "run")
    assert outcome.code == 2
    assert "--resume --out run: the data is not what the run began with" in outcome.message
    assert f"{word} was" in outcome.message
    assert taken == []
    assert tree(here / "run") == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resume"], ["--resume", "--out"]),
        (["--resume", "--out", "nowhere"], ["nowhere", "no run to resume", "Leave --resume out"]),
    ],
    ids=["no folder", "no such folder"],
)
def test_resuming_says_so_where_there_is_no_run(
    pretrain: Cli, here: Path, arguments: list[str], words: list[str]
) -> None:
    outcome = pretrain(*arguments)
    assert outcome.code == 2
    assert all(word in outcome.message for word in words), outcome.message
    assert not (here / "nowhere").exists()


def test_a_damaged_config_of_a_run_is_named(pretrain: Cli, tiny: list[str], here: Path) -> None:
    with cut_before_step(2):
        pretrain(*tiny, "--out", "run")
    (here / "run" / "config.yaml").write_text("steps: many\n")
    outcome = pretrain("--resume", "--out", "run")
    assert outcome.code == 2
    assert "--steps many" in outcome.message


def test_a_dry_run_of_a_run_to_resume_only_prints(pretrain: Cli, tiny: list[str], here: Path) -> None:
    with cut_before_step(2):
        pretrain(*tiny, "--out", "run")
    before = tree(here / "run")
    with optimizer_steps() as taken:
        outcome = pretrain("--resume", "--out", "run", "--dry-run")
    assert outcome.code == 0
    assert "steps" in outcome.out
    assert taken == []
    assert tree(here / "run") == before
