"""What happens within a run: learning rates, accumulation, epochs, precision, streams."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from _lab import Cli, assert_same_run, cut_before_step, losses, options, records, sentences, summary, write_model
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import Trainer

from lorapre.lab.optimizers import OPTIMIZERS
from lorapre.lab.run_folder import RunFolder
from lorapre.lab.training import _LabTrainer, starting_point

pytestmark = pytest.mark.usefixtures("sketched")
SHORT = options(model="tiny.json", data="text.txt", tokenizer="bpe:300", batch_size=8, sequence_length=16, log_every=1)


def share_of_peak(schedule: str, step: int, steps: int, warmup: int, floor: float) -> float:
    """The rate of step 1, 2, ... as a share of the peak: up from 0 in ``warmup`` steps, then down to ``floor``."""
    done = step - 1
    if done < warmup:
        return done / warmup
    progress = (done - warmup) / (steps - warmup)
    if schedule == "cosine":
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
    return 1.0 if schedule == "constant" else floor + (1 - floor) * (1 - progress)


@pytest.fixture
def rates() -> Iterator[list[list[float]]]:
    """Learning rates of all groups at every step that an optimizer takes."""
    seen: list[list[float]] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        seen.append([float(group["lr"]) for group in optimizer.param_groups])

    handle = register_optimizer_step_pre_hook(look)
    yield seen
    handle.remove()


@pytest.mark.parametrize(
    ("schedule", "warmup", "floor"),
    [
        ("cosine", 0.1, 0.1),
        ("cosine", 0.25, 0.0),
        ("linear", 0.1, 0.1),
        ("linear", 0.0, 0.5),
        ("constant", 0.3, 0.1),
    ],
)
def test_learning_rates_follow_the_schedule_and_keep_their_ratio(
    pretrain: Cli, here: Path, rates: list[list[float]], schedule: str, warmup: float, floor: float
) -> None:
    lr, dense_lr, steps = 2e-3, 7e-3, 20
    arguments = options(steps=steps, lr=lr, dense_lr=dense_lr, schedule=schedule, warmup=warmup, out="run")
    arguments += [] if schedule == "constant" else options(min_lr_ratio=floor)
    assert pretrain(*SHORT, *arguments).code == 0
    shares = [share_of_peak(schedule, step, steps, round(warmup * steps), floor) for step in range(1, steps + 1)]
    assert max(shares) == 1.0
    logged = [record["lr"] for record in records(here / "run") if "loss" in record]
    assert logged == pytest.approx([lr * share for share in shares], rel=1e-6, abs=1e-12)
    matrices, *others = zip(*rates, strict=True)
    assert list(matrices) == pytest.approx(logged, rel=1e-9)
    assert len(others) == 2  # embeddings and head; norms
    for group in others:
        assert list(group) == pytest.approx([dense_lr * share for share in shares], rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS.keys() - {"adamw-8bit"}))  # it compiles, for half a minute
def test_without_a_learning_rate_the_optimizers_own_is_the_peak(
    pretrain: Cli, here: Path, rates: list[list[float]], optimizer: str
) -> None:
    entry = OPTIMIZERS[optimizer]
    if entry.installed_version() is None:
        pytest.skip(f"needs {entry.package}")
    arguments = options(steps=3, schedule="constant", warmup=0, optimizer=optimizer, out="run")
    assert pretrain(*SHORT, *arguments).code == 0
    # Where two optimizers share the work, each of them is seen too, with its own groups.
    whole = [step for step in rates if set(step) == {entry.default_lr, entry.default_dense_lr}]
    assert len(whole) == 3
    for step in whole:
        assert step[-2:] == [entry.default_dense_lr] * 2  # embeddings and head; norms
    facts = summary(here / "run")
    assert (facts["lr"], facts["dense_lr"]) == (entry.default_lr, entry.default_dense_lr)
    # Adam-mini's formula counts a little too much, as its limitations say.
    assert (facts["matrix_state_bytes"] == facts["formula_bytes"]) is (optimizer != "adam-mini")


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The sequences of every forward pass in training."""
    seen: list[torch.Tensor] = []
    original = Trainer.training_step

    def step(self: Trainer, model: Any, inputs: Any, *rest: Any, **more: Any) -> torch.Tensor:
        seen.append(inputs["input_ids"].clone())
        return original(self, model, inputs, *rest, **more)

    monkeypatch.setattr(Trainer, "training_step", step)
    return seen


def test_every_step_has_the_whole_batch_also_where_an_epoch_ends(
    pretrain: Cli, here: Path, batches: list[torch.Tensor]
) -> None:
    # 254 sequences: 31 steps of 8 and 6 left over, which is one half of a step and a bit.
    assert pretrain(*SHORT, *options(steps=65, accumulation=2, warmup=0, out="run")).code == 0
    assert [len(batch) for batch in batches] == [4] * 65 * 2
    assert records(here / "run")[-1]["tokens"] == sum(batch.numel() for batch in batches)
    epochs = [torch.cat(batches[start : start + 62]) for start in (0, 62)]
    for epoch in epochs:
        assert len(epoch.unique(dim=0)) == 31 * 8  # no sequence twice
    assert not torch.equal(epochs[0], epochs[1])
    left_out = [{tuple(row.tolist()) for row in epoch} for epoch in epochs]
    assert left_out[0] != left_out[1]  # the sequences that do not fill a step change from epoch to epoch


def test_accumulation_changes_nothing_but_rounding(pretrain: Cli, here: Path) -> None:
    write_model(here / "calm.json", attention_dropout=0.0)
    for pieces in (1, 2, 8):
        arguments = options(steps=36, model="calm.json", accumulation=pieces, out=f"run{pieces}")
        assert pretrain(*SHORT, *arguments).code == 0
    for pieces in (2, 8):
        assert losses(here / f"run{pieces}") == pytest.approx(losses(here / "run1"), abs=1e-4)
        gap = summary(here / f"run{pieces}")["valid_loss"] - summary(here / "run1")["valid_loss"]
        assert abs(gap) < 1e-4


def test_the_first_loss_is_the_mean_over_the_predicted_positions_of_the_first_batch(
    pretrain: Cli, here: Path, batches: list[torch.Tensor]
) -> None:
    write_model(here / "calm.json", attention_dropout=0.0)
    assert pretrain(*SHORT, *options(steps=2, model="calm.json", accumulation=2, seed=4, out="run")).code == 0
    from lorapre.lab.models import resolve_model

    sequences = torch.cat(batches[:2])
    with torch.no_grad():
        logits = resolve_model("calm.json").build(4)(sequences).logits.double()
    nats = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 300), sequences[:, 1:].reshape(-1))
    assert losses(here / "run")[0] == pytest.approx(nats.item(), abs=1e-5)


def test_bf16_trains_on_the_cpu_and_rounds(pretrain: Cli, here: Path) -> None:
    write_model(here / "calm.json", attention_dropout=0.0)
    for name, flag in (("narrow", ["--bf16"]), ("wide", [])):
        assert pretrain(*SHORT, *options(steps=4, model="calm.json", warmup=0, out=name), *flag).code == 0
    narrow, wide = losses(here / "narrow"), losses(here / "wide")
    assert np.isfinite(narrow).all()
    assert all(a != b for a, b in zip(narrow, wide, strict=True))
    assert narrow == pytest.approx(wide, abs=0.05)
    assert (here / "narrow" / "model" / "model.safetensors").stat().st_size > 39_840 * 4  # weights stay float32


@pytest.fixture
def stream(here: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder that ``hf:`` opens as it does a dataset of the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(here.parent / "hf"))
    folder = here.parent / "set"
    folder.mkdir()
    for split, documents in (("train", sentences(40)), ("validation", sentences(4, seed=1))):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return f"hf:{folder}"


def test_a_stream_trains_beyond_its_end_and_can_be_resumed(pretrain: Cli, here: Path, stream: str) -> None:
    arguments = options(steps=30, seed=2, save_every=8, accumulation=2)
    arguments = [*SHORT, *arguments]
    arguments[arguments.index("text.txt")] = stream
    whole = pretrain(*arguments, "--out", "whole")
    assert whole.code == 0
    assert "streamed" in summary(here / "whole")["data"]
    assert losses(here / "whole")[-1] < losses(here / "whole")[0] - 0.5
    with cut_before_step(27):
        assert pretrain(*arguments, "--out", "run").code == 130
    assert pretrain("--resume", "--out", "run").code == 0
    assert_same_run(here / "run", here / "whole")


def test_a_record_is_the_mean_since_the_one_before_and_the_last_step_has_one(pretrain: Cli, here: Path) -> None:
    arguments = [*SHORT, *options(steps=8)]
    assert pretrain(*arguments, "--out", "every").code == 0
    assert pretrain(*arguments, "--log-every", "3", "--out", "third").code == 0
    every, third = losses(here / "every"), records(here / "third")
    assert [record["step"] for record in third if "loss" in record] == [3, 6, 8]
    means = [np.mean(every[:3]), np.mean(every[3:6]), np.mean(every[6:])]
    assert losses(here / "third") == pytest.approx(means, rel=1e-6)


def test_the_clock_stands_still_while_the_run_is_validated_and_saved(
    pretrain: Cli, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowed(action: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*arguments: Any, **given: Any) -> Any:
            time.sleep(1)
            return action(*arguments, **given)

        return slow

    monkeypatch.setattr(_LabTrainer, "evaluate", slowed(_LabTrainer.evaluate))
    monkeypatch.setattr(Trainer, "_save_checkpoint", slowed(Trainer._save_checkpoint))
    assert pretrain(*SHORT, *options(steps=4, eval_every=2, save_every=1, out="run")).code == 0
    found = summary(here / "run")
    assert found["seconds"] < 2  # of six of sleep
    assert found["tokens_per_second"] > found["tokens"] / 2
    assert records(here / "run")[-1]["seconds"] < 2


def test_on_a_machine_of_several_gpus_a_process_keeps_to_one_whatever_it_trains(tmp_path: Path) -> None:
    arguments: Any = SimpleNamespace(n_gpu=2, _n_gpu=2, process_index=0, world_size=1)
    assert starting_point(arguments, RunFolder(tmp_path), resume=False) == (None, [])
    assert arguments._n_gpu == 1
