"""The finished runs on the disk."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from study.plan import Key, rounded

Row = dict[str, Any]
_Key = TypeVar("_Key")


@dataclass(frozen=True)
class Best:
    """A contestant at its best rate on one model and length.

    Attributes:
        lr: the rate with the lowest loss of the first seed that was used.
        losses: over the seeds, of those that did not diverge; empty if all rates diverged.
        diverged: how many seeds did at this rate.
        by_rate: loss of the first seed by rate, ascending; infinite where it diverged.
        row: of the first seed at this rate.
    """

    lr: float
    losses: tuple[float, ...]
    diverged: int
    by_rate: Mapping[float, float]
    row: Row

    @property
    def mean(self) -> float:
        """Over the seeds; infinite if there is none."""
        return sum(self.losses) / len(self.losses) if self.losses else math.inf

    @property
    def spread(self) -> float | None:
        """Largest minus smallest loss over the seeds; None of a single one."""
        return max(self.losses) - min(self.losses) if len(self.losses) > 1 else None


class RowFile(Generic[_Key]):
    """Finished runs, one JSON line each, in a file that is only ever appended to, by one process.

    A last line that was cut short, by an end in mid-write, is removed when the file is opened.

    Args:
        path: of the file, which need not exist.
        key: what makes two rows those of one training.

    Raises:
        ValueError: another line is no JSON.
    """

    def __init__(self, path: Path, key: Callable[[Row], _Key]) -> None:
        self.path, self._key = path, key
        self._rows: dict[_Key, Row] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = 0
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            try:
                row = json.loads(line)
            except ValueError:
                if whole + len(line) == len(content) and not line.endswith(b"\n"):
                    break
                raise ValueError(f"{self.path}, line {number}: is no JSON. Remove the line.") from None
            self._rows[self._key(row)] = row
            whole += len(line)
        if whole < len(content):
            os.truncate(self.path, whole)
        elif content and not content.endswith(b"\n"):
            with self.path.open("ab") as file:
                file.write(b"\n")

    def add(self, row: Row) -> None:
        """Append ``row``, so that it outlasts whatever ends this process; numbers that JSON lacks become null."""
        row = _finite(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._rows[self._key(row)] = row

    @property
    def all(self) -> list[Row]:
        """Every training once, in the order of the file; of a training that was made twice the last row."""
        return list(self._rows.values())

    def check_protocol(self, protocol: Mapping[str, float]) -> None:
        """Make sure that all rows were trained as ``protocol`` says.

        Raises:
            ValueError: one was not, and cannot stand in a table with the others.
        """
        for row in self.all:
            for name, value in protocol.items():
                if row[name] != value:
                    raise ValueError(
                        f"{self.path}: holds runs with {name} {row[name]}, and this profile's have {value}. Give "
                        "another --work."
                    )


class Rows(RowFile[Key]):
    """The study's rows."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, _key)

    @property
    def losses(self) -> dict[Key, float]:
        """Final loss by training; infinite where it diverged."""
        return {key: _loss(row) for key, row in self._rows.items()}

    def settings(self) -> list[tuple[str, int]]:
        """Models and lengths that there are rows of, in the order of the file."""
        return list(dict.fromkeys((key.model, key.tokens) for key in self._rows))

    def best(self, model: str, tokens: int) -> dict[str, Best]:
        """Each contestant at its best rate, in the order of the file."""
        groups: dict[str, dict[tuple[float, int], Row]] = {}
        for key, row in self._rows.items():
            if (key.model, key.tokens) == (model, tokens):
                groups.setdefault(key.contestant, {})[key.lr, key.seed] = row
        found = {}
        for contestant, rows in groups.items():
            first = min(seed for _, seed in rows)
            by_rate = {lr: _loss(row) for (lr, seed), row in sorted(rows.items()) if seed == first}
            lr = min(by_rate, key=lambda rate: by_rate[rate])
            seeds = [_loss(row) for (rate, _), row in rows.items() if rate == lr]
            finite = tuple(loss for loss in seeds if loss < math.inf)
            found[contestant] = Best(lr, finite, len(seeds) - len(finite), by_rate, rows[lr, first])
        return found


def _key(row: Row) -> Key:
    return Key(row["model"], row["tokens"], row["contestant"], rounded(row["lr"]), row["seed"])


def _loss(row: Row) -> float:
    return math.inf if row["loss"] is None else float(row["loss"])


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
