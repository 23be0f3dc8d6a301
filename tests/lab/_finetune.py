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
