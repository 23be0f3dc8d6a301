"""The finished runs on the disk."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from study.plan import rounded
from study.rows import Row, RowFile

from finetune.plan import Key


class Rows(RowFile[Key]):
    """One line a run."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, key_of)

    @property
    def losses(self) -> dict[Key, float]:
        """Held-out loss by run; infinite where it diverged."""
        return {key_of(row): math.inf if row["loss"] is None else float(row["loss"]) for row in self.all}


def key_of(row: Row) -> Key:
    """What makes two rows those of one run."""
    return Key(row["kind"], row["contestant"], rounded(row["lr"]), row["seed"])


def packed(verdicts: Iterable[bool]) -> str:
    """Verdicts on the questions, in their order, as text: 1 is right."""
    return "".join("1" if verdict else "0" for verdict in verdicts)


def unpacked(text: str) -> list[bool]:
    """What `packed` was given."""
    return [character == "1" for character in text]
