"""Bad input: one paragraph on standard error, exit code 2, nothing trained, no run folder left."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from _lab import Cli, Outcome, cut_before_step, optimizer_steps, sentences, tree, write_model, write_text
from safetensors import SafetensorError
from transformers import PreTrainedModel

from lorapre.lab.models import resolve_model

pytestmark = pytest.mark.usefixtures("sketched")


def nothing(_: Path) -> None:
    pass


class Case(NamedTuple):
    """``change`` arguments of a good run (None leaves one out); the message then has all of ``words``."""

    change: dict[str, Any]
    words: list[str]
    prepare: Callable[[Path], object] = nothing


def yaml(text: str) -> Callable[[Path], object]:
    return lambda here: (here / "options.yaml").write_text(text)


def model(**entries: Any) -> Callable[[Path], object]:
    return lambda here: write_model(here / "other.json", **entries)


def small_checkpoint(here: Path) -> None:
    write_model(here / "small.json", vocab_size=280)
    resolve_model("small.json").build(0).save_pretrained(here / "small")


def checkpoint_without_weights(here: Path) -> None:
    small_checkpoint(here)
    (here / "small" / "model.safetensors").unlink()


def damaged_checkpoint(here: Path) -> None:
    small_checkpoint(here)
    weights = here / "small" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


CASES: dict[str, Case] = {
    # data
    "missing file": Case({"data": "nope.txt"}, ["data", "nope.txt", "correct the path"]),
    "a file whose name looks like markup": Case({"data": "nope[/red].txt"}, ["nope[/red].txt"]),
    "one of several files missing": Case({"data": ["text.txt", "nope.txt"]}, ["nope.txt"]),
    "empty corpus": Case({"data": "e.txt"}, ["no text", "give"], lambda here: (here / "e.txt").write_text("")),
    "blank corpus": Case({"data": "e.txt"}, ["no text", "give"], lambda here: (here / "e.txt").write_text(" \n\n ")),
    "undecodable bytes": Case(
        {"data": "latin.txt"},
        ["latin.txt", "UTF-8", "0xe9", "iconv"],
        lambda here: (here / "latin.txt").write_bytes("café".encode("latin-1")),
    ),
    "damaged archive": Case(
        {"data": "a.txt.gz"}, ["a.txt.gz", "damaged"], lambda here: (here / "a.txt.gz").write_bytes(b"not gzip")
    ),
    "no such field": Case(
        {"data": "a.jsonl", "text_field": "body"},
        ["a.jsonl", "'body'", "'text'"],
        lambda here: (here / "a.jsonl").write_text(json.dumps({"text": "hello"})),
    ),
    "missing validation file": Case({"valid_data": "nope.txt"}, ["valid_data", "nope.txt"]),
    "mixed data": Case({"data": ["stdlib", "text.txt"]}, ["stdlib", "text.txt"]),
    "folder that is no dataset": Case({"data": "hf:./bare"}, ["hf:./bare"], lambda here: (here / "bare").mkdir()),
    "fewer tokens than a batch": Case(
        {"batch_size": 4096}, ["--data text.txt", "--batch-size 4096", "Give more text", "--sequence-length"]
    ),
    "validation shorter than a sequence": Case({"valid_tokens": 10}, ["--valid-tokens 10", "--sequence-length 16"]),
    "valid fraction 1": Case({"valid_fraction": 1}, ["--valid-fraction 1", "less than 1"]),
    # tokenizer
    "tiny tokenizer": Case({"tokenizer": "bpe:10"}, ["tokenizer", "bpe:10", "257"]),
    "no tokenizer": Case({"tokenizer": " "}, ["--tokenizer", "names no tokenizer", "leave it out"]),
    "tokenizer beyond memory": Case({"tokenizer": "bpe:99999999999"}, ["bpe:99999999999", "at most 10,000,000"]),
    "no number": Case({"tokenizer": "bpe:many"}, ["tokenizer", "bpe:many"]),
    "missing tokenizer": Case({"tokenizer": "./nope"}, ["tokenizer", "./nope"]),
    # model
    "unknown model": Case({"model": "llama-9000"}, ["--model llama-9000", "llama-3m", "llama-7b"]),
    "missing config.json": Case({"model": "nope.json"}, ["--model nope.json", "No such file"]),
    "config.json without model_type": Case(
        {"model": "other.json"},
        ["--model other.json", '"model_type": "llama"'],
        lambda here: (here / "other.json").write_text("{}"),
    ),
    "config.json of an unknown model_type": Case(
        {"model": "other.json"}, ["--model other.json", "elephant"], model(model_type="elephant")
    ),
    "config.json of an image model": Case({"model": "other.json"}, ["--model other.json"], model(model_type="vit")),
    "config.json that is a list": Case(
        {"model": "other.json"}, ["--model other.json"], lambda here: (here / "other.json").write_text("[1]")
    ),
    "config.json that is no JSON": Case(
        {"model": "other.json"}, ["--model other.json"], lambda here: (here / "other.json").write_text("hidden: 1")
    ),
    "heads that do not divide the width": Case(
        {"model": "other.json"}, ["--model other.json", "32"], model(num_attention_heads=3)
    ),
    "unknown activation": Case({"model": "other.json"}, ["--model other.json", "foo"], model(hidden_act="foo")),
    "folder without config.json": Case(
        {"model": "empty"}, ["--model empty", "save_pretrained"], lambda here: (here / "empty").mkdir()
    ),
    "checkpoint without weights": Case(
        {"model": "small", "tokenizer": "bpe:270"}, ["--model small", "save_pretrained"], checkpoint_without_weights
    ),
    "damaged checkpoint": Case(
        {"model": "small", "tokenizer": "bpe:270"}, ["--model small", "save_pretrained"], damaged_checkpoint
    ),
    "vocabulary of a checkpoint below the tokenizer's": Case(
        {"model": "small"}, ["--model small", "280", "--tokenizer"], small_checkpoint
    ),
    "vocabulary of a config.json below the tokenizer's": Case(
        {"model": "other.json"}, ["--model other.json", "280", "--tokenizer"], model(vocab_size=280)
    ),
    "sequence longer than the positions": Case({"sequence_length": 65}, ["--sequence-length 65", "64"]),
    # optimizer
    "unknown optimizer": Case({"optimizer": "adagrad"}, ["--optimizer adagrad", "lorapre-adamw", "adamw"]),
    "unknown twin": Case({"compare": "adagrad"}, ["--compare adagrad", "lorapre-adamw"]),
    "twin of itself": Case({"compare": "lorapre-adamw"}, ["--compare", "lorapre-adamw", "once"]),
    "rank 0": Case({"rank": 0}, ["--rank 0", ">= 1", "0.25"]),
    "rank -3": Case({"rank": -3}, ["--rank -3", ">= 1"]),
    "rank 1.5": Case({"rank": 1.5}, ["--rank 1.5", "between 0 and 1"]),
    "rank nan": Case({"rank": "nan"}, ["--rank nan"]),
    "rank abc": Case({"rank": "abc"}, ["--rank abc", "0.25"]),
    "rank of every matrix": Case({"rank": 32}, ["--rank 32", "tiny.json", "32", "0.25"]),
    "rank 5/4": Case({"rank": "5/4"}, ["--rank 5/4", "between 0 and 1", "1/32"]),
    "option of no optimizer": Case({"set": "dampng=1"}, ["--set dampng=1", "'dampng'", "damping=0.0001", "leave it"]),
    "option without a value": Case({"set": "eps"}, ["--set eps", "NAME=VALUE"]),
    "option set twice": Case({"set": ["eps=1", "eps=2"]}, ["--set eps=2", "twice"]),
    "option of no type": Case({"set": "scale=much"}, ["--set scale=much", "number", "scale=1.0"]),
    "option that the optimizer refuses": Case({"set": "damping=0"}, ["--set damping=0", "above 0", "leave it out"]),
    "option out of a rival's range": Case(
        {"optimizer": "galore", "set": "update_proj_gap=0"}, ["--set update_proj_gap=0", "equal to 1", "scale=0.25"]
    ),
    "option that the lab sets": Case({"set": "betas=[0.9,0.95]"}, ["--set betas=[0.9,0.95]", "--beta1"]),
    "option of an optimizer that has none": Case(
        {"optimizer": "muon", "set": "eps=1"}, ["--set eps=1", "muon takes no options", "lorapre-adamw"]
    ),
    "option in YAML": Case(
        {"config": "options.yaml"}, ["--set damping=-1.0", "above 0"], yaml("options: {damping: -1}")
    ),
    "options in YAML that are none": Case({"config": "options.yaml"}, ["--set 3", "dictionary"], yaml("options: 3")),
    "negative lr": Case({"lr": -0.1}, ["--lr -0.1", "greater than 0"]),
    "nan lr": Case({"lr": "nan"}, ["--lr nan", "finite"]),
    "infinite lr": Case({"dense_lr": "inf"}, ["--dense-lr inf", "finite"]),
    "beta1 of 1": Case({"beta1": 1}, ["--beta1 1", "less than 1"]),
    "nan beta2": Case({"beta2": "nan"}, ["--beta2 nan"]),
    # training
    "unknown schedule": Case({"schedule": "step"}, ["--schedule step", "cosine", "linear", "constant"]),
    "no steps": Case({"steps": 0}, ["--steps 0", "1"]),
    "steps and tokens": Case({"tokens": 1000}, ["--steps 4", "--tokens 1000", "give one"]),
    "tokens below a step": Case({"steps": None, "tokens": 100}, ["--tokens 100", "128"]),
    "batch that cannot be split": Case({"accumulation": 3}, ["--batch-size 8", "--accumulation 3", "multiple of 3"]),
    "checkpoints between records": Case({"log_every": 2, "save_every": 3}, ["--save-every 3", "--log-every 2"]),
    "one checkpoint": Case({"keep_checkpoints": 1}, ["--keep-checkpoints 1", "2"]),
    "negative seed": Case({"seed": -1}, ["--seed -1"]),
    # layers
    "unknown preset": Case({"preset": "galore-9b"}, ["--preset galore-9b", "galore-60m"]),
    "missing YAML": Case({"config": "nope.yaml"}, ["--config nope.yaml", "No such file"]),
    "broken YAML": Case({"config": "options.yaml"}, ["--config options.yaml", "not valid YAML"], yaml("steps: [1\nx")),
    "YAML without a mapping": Case({"config": "options.yaml"}, ["--config options.yaml", "list"], yaml("- steps")),
    "empty YAML": Case({"config": "options.yaml"}, ["--config options.yaml"], yaml("")),
    "unknown key in YAML": Case(
        {"config": "options.yaml"}, ["options.yaml", "'stepz'", "sequence_length"], yaml("stepz: 3")
    ),
    "a number as a key in YAML": Case({"config": "options.yaml"}, ["options.yaml", "3"], yaml("3: steps")),
    "wrong type in YAML": Case({"config": "options.yaml"}, ["--warmup much", "number"], yaml("warmup: much")),
    # what the parser itself refuses
    "lr that is no number": Case({"lr": "abc"}, ["--lr", "number"]),
    "unknown option": Case({"learning_rate": 1}, ["--learning-rate"]),
    # out
    "a file as out": Case({"out": "text.txt"}, ["--out text.txt", "file"]),
    "a file as the parent of out": Case({"out": "text.txt/run"}, ["--out text.txt/run", "Give a folder"]),
    "a name too long": Case({"out": "x" * 300}, ["--out xxx", "name too long"]),
}


def arguments(here: Path, change: dict[str, Any]) -> list[str]:
    good: dict[str, Any] = {
        "model": "tiny.json",
        "data": "text.txt",
        "tokenizer": "bpe:300",
        "batch_size": 8,
        "sequence_length": 16,
        "steps": 4,
        "out": "run",
    }
    parts: list[str] = []
    for name, value in {**good, **change}.items():
        for one in value if isinstance(value, list) else [value]:
            parts += [] if one is None else [f"--{name.replace('_', '-')}", str(one)]
    return parts


def assert_refused(outcome: Outcome, words: list[str]) -> None:
    assert outcome.code == 2, outcome
    assert [word for word in words if word not in outcome.message] == [], outcome.message
    assert "Traceback" not in outcome.err + outcome.out
    assert outcome.err.count("╭") == outcome.err.count("╰") == 1
    body = [line.strip("│ ") for line in outcome.err.splitlines() if line.startswith("│")]
    assert all(body), "more than one paragraph"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_bad_input_is_refused_in_one_paragraph_before_anything_is_trained_or_left(
    pretrain: Cli, here: Path, case: Case
) -> None:
    case.prepare(here)
    before = tree(here)
    with optimizer_steps() as taken:
        outcome = pretrain(*arguments(here, case.change))
    assert_refused(outcome, case.words)
    assert taken == []
    assert tree(here) == before


def test_the_run_that_these_cases_spoil_is_a_good_one(pretrain: Cli, here: Path) -> None:
    assert pretrain(*arguments(here, {})).code == 0
    assert (here / "run" / "summary.json").exists()


@pytest.mark.parametrize("state", ["finished", "interrupted", "somebody's"])
def test_an_existing_folder_is_left_untouched(pretrain: Cli, here: Path, state: str) -> None:
    if state == "finished":
        pretrain(*arguments(here, {}))
    elif state == "interrupted":
        with cut_before_step(3):
            pretrain(*arguments(here, {}))
    else:
        (here / "run").mkdir()
        (here / "run" / "thesis.tex").write_text("forty years of work")
    before = tree(here)
    assert before
    with optimizer_steps() as taken:
        outcome = pretrain(*arguments(here, {}))
    assert_refused(outcome, ["--out run", "another --out"])
    if state == "interrupted":
        assert "--resume --out run" in outcome.message
    assert taken == []
    assert tree(here) == before


def test_an_empty_folder_may_be_filled(pretrain: Cli, here: Path) -> None:
    (here / "run").mkdir()
    assert pretrain(*arguments(here, {})).code == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(pretrain: Cli, here: Path) -> None:
    (here / "locked").mkdir(mode=0o500)
    outcome = pretrain(*arguments(here, {"out": "locked/run"}))
    assert_refused(outcome, ["--out locked/run", "Permission denied"])
    assert not (here / "locked" / "run").exists()


def test_a_cache_that_cannot_be_written_is_refused(pretrain: Cli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPRE_CACHE", str(here / "text.txt"))
    before = tree(here)
    assert_refused(pretrain(*arguments(here, {})), ["LORAPRE_CACHE", "text.txt"])
    assert tree(here) == before


def test_a_disk_too_small_for_the_checkpoints_is_refused(
    pretrain: Cli, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(here)
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=123_000))
    assert_refused(pretrain(*arguments(here, {})), ["--out run", "123.00 kB free", "--keep-checkpoints"])
    assert tree(here) == before


def test_a_run_that_goes_on_needs_no_room_for_the_checkpoints_that_it_has(
    pretrain: Cli, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cut_before_step(4):
        assert pretrain(*arguments(here, {"save_every": 1})).code == 130
    has = sum(path.stat().st_size for path in (here / "run").rglob("*") if path.is_file())
    parameters = 39_840
    needed = (3 * 3 + 1) * 4 * parameters  # two checkpoints and a third, of at most three numbers a weight; the model
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - has))
    assert_refused(pretrain(*arguments(here, {"out": "other"})), ["--out other", "free"])
    assert pretrain("--resume", "--out", "run").code == 0


# What a full disk looks like: to Python, to safetensors, and to torch.save.
FULL_DISK = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
]


@pytest.mark.parametrize("error", FULL_DISK, ids=lambda error: f"{type(error).__name__} {error}"[:30])
def test_a_disk_that_fills_up_in_mid_run_is_named_and_the_run_can_go_on(
    pretrain: Cli, here: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    save, saved = PreTrainedModel.save_pretrained, []

    def full(self: PreTrainedModel, folder: str | Path, *rest: Any, **more: Any) -> None:
        saved.append(Path(folder))
        if len(saved) == 2:
            (Path(folder) / "model.safetensors").parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / "model.safetensors").write_bytes(b"\0" * 100)
            raise error
        save(self, folder, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", full)
        outcome = pretrain(*arguments(here, {"save_every": 1}))
    assert outcome.code == 1
    assert "--out run: its disk is full" in outcome.message
    assert "lorapre pretrain --resume --out run" in outcome.message
    assert "Traceback" not in outcome.err
    assert not (here / "run" / "checkpoints" / "checkpoint-2" / "complete").exists()

    assert pretrain("--resume", "--out", "run").code == 0
    assert pretrain(*arguments(here, {"save_every": 1, "out": "whole"})).code == 0
    weights = [(here / out / "model" / "model.safetensors").read_bytes() for out in ("run", "whole")]
    assert weights[0] == weights[1]


def test_another_error_in_mid_run_is_not_taken_for_a_full_disk(
    pretrain: Cli, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        pretrain(*arguments(here, {"save_every": 1}))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_run_that_ends_before_it_begins_leaves_nothing_and_offers_no_way_on(
    pretrain: Cli, here: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("lorapre.lab.preparation.load_corpus", stop)
    before = tree(here)
    outcome = pretrain(*arguments(here, {}))
    assert outcome.code in (1, 130)
    assert "Nothing was trained" in outcome.out + outcome.message
    assert "--resume" not in outcome.out + outcome.err
    assert tree(here) == before


@pytest.mark.parametrize(
    ("optimizer", "eval_every", "message"),
    [
        ("lorapre-adamw", 6, "LoRAPreAdamW: the gradient of parameter"),
        ("lorapre-adamw", 1, "The validation loss is nan at step"),
        ("adamw", 6, "The training loss is nan at step"),  # it does not look at its gradients
    ],
)
def test_a_training_that_diverges_ends_in_a_paragraph_and_keeps_its_metrics(
    pretrain: Cli, here: Path, optimizer: str, eval_every: int, message: str
) -> None:
    options = {"lr": 1e30, "dense_lr": 1e30, "max_grad_norm": 0, "steps": 6, "log_every": 1}
    outcome = pretrain(*arguments(here, {**options, "optimizer": optimizer, "eval_every": eval_every}))
    assert outcome.code == 1
    assert f"The training has diverged: {message}" in outcome.message
    assert "smaller --lr" in outcome.message
    assert "Traceback" not in outcome.err
    assert (here / "run" / "metrics.jsonl").exists()


def test_a_stream_that_turns_bad_in_mid_run_is_named_and_the_folder_kept(pretrain: Cli, here: Path) -> None:
    data = here / "set"
    data.mkdir()
    lines = [json.dumps({"text": text}) for text in sentences(40)] + [json.dumps({"text": None})]
    (data / "train.jsonl").write_text("\n".join(lines))
    write_text(here / "valid.txt", sentences(3, seed=1))
    outcome = pretrain(*arguments(here, {"data": f"hf:{data}", "valid_data": "valid.txt", "steps": 60}))
    assert outcome.code == 2
    assert "'text'" in outcome.message
    assert "null" in outcome.message
