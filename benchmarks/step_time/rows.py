"""What has been measured, kept in ``step_time.json``, which is written anew after every row."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from lorapre.lab.errors import UserError
from lorapre.lab.run_folder import write_json

NAME = "step_time.json"


@dataclass(frozen=True)
class StepRow:
    """One optimizer on the matrices of one model. None is what could not be measured, or was not when rows had less.

    Attributes:
        step_ms: median; with ``rare_ms`` the median of plain steps and the share of what is rare.
        ratio_to_fused_adamw: to the median of fused AdamW's steps in the same rounds.
        ratio_to_foreach_adamw: likewise, on a CPU.
        extra_bytes: most that a step holds beyond what was held before, on a GPU.
        launches: kernels of one step; ``copies`` are not among them.
        layers: how many of the model's layers were stepped.
        parameter_bytes: of the weights.
        kernels: of different names among the launches.
        copies: copies and fills of one step.
        bytes_moved: at least, by the algorithm (`step_time.costs`), ``flops`` likewise.
        copy_share: bytes a second by that count, over those of a copy in the same process.
        product_share: operations a second, over those of a large product of the dtype (TF32 for float32).
        plain_ms: median of steps without what is rare.
        rare_ms: what a step with it takes more, extrapolated from ``rare_layers`` layers.
        rare_every: steps over which it is shared out.
        same_bits: a captured step, replayed, left the same bits in weights and state as launched ones.
        note: what a reader should know.
    """

    device: str
    model: str
    dtype: str
    optimizer: str
    rank: int | None
    step_ms: float
    ratio_to_fused_adamw: float
    extra_bytes: int | None
    launches: int | None
    layers: int | None = None
    parameter_bytes: int | None = None
    kernels: int | None = None
    copies: int | None = None
    bytes_moved: float | None = None
    flops: float | None = None
    copy_share: float | None = None
    product_share: float | None = None
    plain_ms: float | None = None
    rare_ms: float | None = None
    rare_every: int | None = None
    rare_layers: int | None = None
    same_bits: bool | None = None
    ratio_to_foreach_adamw: float | None = None
    note: str = ""
    date: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        return "step", self.device, self.model, self.dtype, self.optimizer, self.rank


@dataclass(frozen=True)
class TrainingRow:
    """Whole training steps (forward, backward, optimizer) on random tokens; ``ratio`` is of tokens a second.

    ``optimizer_share_ms``: what was added to the measured step for work that is rare.
    """

    device: str
    model: str
    optimizer: str
    rank: int | None
    batch: int
    sequence: int
    step_ms: float
    tokens_per_second: float
    ratio_to_fused_adamw: float
    optimizer_share_ms: float = 0.0
    note: str = ""
    date: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        return "training", self.device, self.model, self.optimizer, self.rank


@dataclass(frozen=True)
class Unmeasured:
    """Why there is no such row; ``key`` is that of the row."""

    key: tuple[Any, ...]
    reason: str

    @property
    def line(self) -> str:
        name = ", ".join(str(part) for part in self.key[2:] if part is not None)
        return f"not measured: {self.reason} ({self.key[0]}, {name})"


_Row = TypeVar("_Row", StepRow, TrainingRow)


@dataclass
class Results:
    """All rows of a folder.

    Attributes:
        folder: where `NAME` lies.
        origin: hardware, versions, date, seed, and the machine's limits, as of the last process that measured.
    """

    folder: Path
    origin: dict[str, Any] = field(default_factory=dict)
    steps: list[StepRow] = field(default_factory=list)
    training: list[TrainingRow] = field(default_factory=list)
    unmeasured: list[Unmeasured] = field(default_factory=list)

    @classmethod
    def load(cls, folder: Path) -> Results:
        """What ``folder`` holds, or nothing.

        Raises:
            UserError: its file is not one of these.
        """
        path = folder / NAME
        if not path.exists():
            return cls(folder)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            steps = [_read(StepRow, row) for row in content.pop("rows")]
            training = [_read(TrainingRow, row) for row in content.pop("training", [])]
            unmeasured = [Unmeasured(tuple(one["key"]), one["reason"]) for one in content.pop("unmeasured", [])]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"--out {folder}: {path} cannot be read ({type(error).__name__}: {error}). Remove it, or give another "
                "folder."
            ) from None
        return cls(folder, content, steps, training, unmeasured)

    def go_on(self, origin: dict[str, Any]) -> None:
        """Take ``origin`` as that of the rows to come.

        Raises:
            UserError: the rows were made on other hardware or with another torch.
        """
        for name, before, now in (
            ("hardware", self.origin.get("hardware"), origin["hardware"]),
            ("torch", self.origin.get("versions", {}).get("torch"), origin["versions"]["torch"]),
        ):
            if self.origin and before != now:
                raise UserError(
                    f"--out {self.folder}: its rows were made with {name} {before}, and this is {now}. Give another "
                    "folder."
                )
        self.origin = origin

    def has(self, key: tuple[Any, ...]) -> bool:
        """Whether there is a row of this key."""
        return key in [row.key for row in self.steps] + [row.key for row in self.training]

    def add(self, row: StepRow | TrainingRow | Unmeasured) -> None:
        """Put ``row`` in place of one of the same key, or at the end, and write the file.

        A reason does not replace a row.
        """
        self.unmeasured = [one for one in self.unmeasured if one.key != row.key]
        if isinstance(row, StepRow):
            self.steps = _with(self.steps, row)
        elif isinstance(row, TrainingRow):
            self.training = _with(self.training, row)
        elif not self.has(row.key):
            self.unmeasured.append(row)
        self.write()

    def drop(self, keys: set[tuple[Any, ...]]) -> None:
        """Forget the rows of these keys; the file follows with the next row."""
        self.steps = [row for row in self.steps if row.key not in keys]
        self.training = [row for row in self.training if row.key not in keys]

    def write(self) -> None:
        """Write the file, atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            **self.origin,
            "rows": [asdict(row) for row in self.steps],
            "training": [asdict(row) for row in self.training],
            "unmeasured": [asdict(one) for one in self.unmeasured],
        }
        write_json(self.folder / NAME, content)


def _read(kind: type[_Row], row: dict[str, Any]) -> _Row:
    known = {one.name for one in fields(kind)}
    return kind(**{name: value for name, value in row.items() if name in known})


def _with(rows: list[_Row], row: _Row) -> list[_Row]:
    found = [row if one.key == row.key else one for one in rows]
    if not any(one is row for one in found):
        found.append(row)
    return found
