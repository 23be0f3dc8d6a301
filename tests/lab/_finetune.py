"""What the tests of fine-tuning share: small files of each format, the command called in this process."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from _lab import Outcome, exit_code


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def pairs(count: int = 40) -> list[dict[str, str]]:
    """Prompts and responses of different lengths, none twice."""
    return [{"prompt": f"say {'x' * (i % 7)}{i}", "response": f"{i} {'y' * (i % 5 + 1)}"} for i in range(count)]


def finetune(capsys: pytest.CaptureFixture[str], *arguments: str) -> Outcome:
    """``lorapre finetune ARGUMENTS`` in this process; an exception that is not an exit is the test's."""
    capsys.readouterr()
    code = exit_code("finetune", *arguments)
    captured = capsys.readouterr()
    return Outcome(code, captured.out, captured.err)


#: Two passes and a part over 24 examples in batches of 8.
SHORT: dict[str, Any] = {
    "data": "own.jsonl", "valid_examples": 4, "max_examples": 20, "batch_size": 8, "steps": 7, "log_every": 1,
    "save_every": 2, "max_length": 64,
}  # fmt: skip
ADAPTED = {"method": "lorapre-adamw", "adapter": "lora", "adapter_rank": 8, "rank": 2, "lr": 0.01}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "packed": {"packing": True, "accumulation": 2},
    "lora": {"method": "lora", "dropout": 0.1, "lr": 0.01},
    "lora+": {"method": "lora+", "lr": 0.01},
    "lora-pro": {"method": "lora-pro", "lr": 0.01},
    "loft": {"method": "loft", "lr": 0.01},
    "dora": {"method": "dora", "lr": 0.01},
    "lorapre on lora": ADAPTED,
    "galore": {"method": "galore-ours", "rank": 4},
}
