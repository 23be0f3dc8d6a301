"""What the lab's tests share: a tiny model and text, the command line called in this process, runs cut short."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lorapre.lab import cli
from lorapre.lab.callbacks import MetricsWriter

#: 2 layers of width 32. Dropout, so that a resumed run must restore the generators too.
TINY: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "attention_dropout": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
#: The finished comparison of conftest: 50 steps are more than an epoch.
FINISHED: Mapping[str, Any] = {
    "tokenizer": "bpe:300",
    "batch_size": 8,
    "accumulation": 2,
    "sequence_length": 16,
    "steps": 50,
    "log_every": 1,
    "eval_every": 20,
    "save_every": 15,
    "seed": 3,
}
WORDS = "the a cat dog runs sees big small red old house tree and or then near".split()  # noqa: SIM905
#: In metrics.jsonl and summary.json these depend on the clock and the process, all else on the configuration alone.
CLOCK = {"seconds", "tokens_per_second", "optimizer_ms", "training_ms", "peak_bytes"}


def write_model(path: Path, **changes: Any) -> Path:
    """A config.json."""
    path.write_text(json.dumps({**TINY, **changes}))
    return path


def sentences(count: int, seed: int = 0) -> list[str]:
    """Documents of 60 words."""
    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) for _ in range(60)) + "." for _ in range(count)]


def write_text(path: Path, documents: Sequence[str]) -> Path:
    """Documents in one file, each closed by a separator."""
    path.write_text("".join(f"{document}\n<|endoftext|>\n" for document in documents))
    return path


def options(**given: Any) -> list[str]:
    """Command-line arguments: ``batch_size=8`` is ``--batch-size 8``, True a flag, a list a repeated option."""
    arguments: list[str] = []
    for name, value in given.items():
        for one in value if isinstance(value, list) else [value]:
            arguments += [f"--{name.replace('_', '-')}", *([] if one is True else [str(one)])]
    return arguments


@dataclass(frozen=True)
class Outcome:
    """How a call of the command line ended."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The error as one line, without its frame."""
        lines = [line.strip("│╭╮╰╯─ ") for line in self.err.splitlines()]
        return " ".join(" ".join(lines).split())


Cli = Callable[..., Outcome]


#: A comparison of about a second a run: two rates at a quarter of the length, the better one in full.
SMALL_COMPARISON: dict[str, Any] = {
    "model": "tiny.json",
    "data": "text.txt",
    "tokenizer": "bpe:300",
    "batch_size": 8,
    "sequence_length": 16,
    "steps": 12,
    "log_every": 1,
    "valid_tokens": 200,
    "optimizers": "lorapre-adamw,adamw",
    "lr_grid": "x1,x4",
    "search": "quick",
}


def make_comparison(work: Path, cache: Path, given: Sequence[str], **model: Any) -> Path:
    """The folder of the finished comparison that ``given`` asks for, in ``work``; ``model`` changes ``tiny.json``."""
    write_model(work / "tiny.json", **model)
    write_text(work / "text.txt", sentences(60))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        patch.setenv("LORAPRE_CACHE", str(cache))
        assert exit_code("compare", *given, "--out", "out") == 0
    return work / "out"


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> Outcome:
    """``lorapre pretrain ARGUMENTS`` in this process; an exception that is not an exit is the test's."""
    capsys.readouterr()
    code = exit_code("pretrain", *arguments)
    captured = capsys.readouterr()
    return Outcome(code, captured.out, captured.err)


def exit_code(*arguments: str) -> int:
    """Of ``lorapre ARGUMENTS`` in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lorapre", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    code = ended.value.code
    return code if isinstance(code, int) else int(bool(code))


class Cut(KeyboardInterrupt):
    """Ends a run in its midst."""


@contextmanager
def cut_before_step(step: int, *, run: str = "") -> Iterator[None]:
    """Within this, a run (``run``: the one in a folder of that name alone) ends before step ``step`` begins."""
    original = MetricsWriter.on_step_begin

    def begin(self: MetricsWriter, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step + 1 == step and run in str(self._folder.path):
            raise Cut
        original(self, args, state, control, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsWriter, "on_step_begin", begin)
        yield


@contextmanager
def optimizer_steps() -> Iterator[list[torch.optim.Optimizer]]:
    """The optimizer of every step taken within this."""
    seen: list[torch.optim.Optimizer] = []
    handle = register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: seen.append(optimizer))
    try:
        yield seen
    finally:
        handle.remove()


def records(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, every line of it."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(content: Any) -> Any:
    """``content`` without what depends on the clock."""
    if isinstance(content, dict):
        return {key: timeless(value) for key, value in content.items() if key not in CLOCK}
    return [timeless(entry) for entry in content] if isinstance(content, list) else content


def summary(folder: Path) -> dict[str, Any]:
    """summary.json."""
    content: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return content


def losses(folder: Path) -> list[float]:
    """The training losses of metrics.jsonl."""
    return [record["loss"] for record in records(folder) if "loss" in record]


def assert_same_run(actual: Path, expected: Path) -> None:
    """Equal metrics and weights, to the bit; the clock aside."""
    assert timeless(records(actual)) == timeless(records(expected))
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (actual, expected)]
    assert weights[0] == weights[1]
    assert timeless(summary(actual)) == timeless(summary(expected))


def tree(folder: Path) -> dict[str, str]:
    """Every file and folder below ``folder`` with a hash of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }
