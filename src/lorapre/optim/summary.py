"""What an optimizer did with each parameter, for people: compressed or dense, and in how many bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from lorapre.routing import MatrixView


@dataclass(frozen=True)
class SummaryRow:
    """All tensors of one shape that are treated alike."""

    shape: tuple[int, ...]
    rank: int | None  # None: dense
    tensors: int
    numel: int
    state_bytes: int
    adamw_bytes: int


@dataclass(frozen=True)
class OptimizerSummary:
    """Bytes are counted from the state tensors themselves, step counters included.

    ``adamw_bytes`` is what torch.optim.AdamW would hold in the same state dtype: two numbers a weight.
    """

    rows: tuple[SummaryRow, ...]

    def _total(self, field: str, compressed: bool | None) -> int:
        return sum(
            getattr(row, field) for row in self.rows if compressed is None or (row.rank is not None) == compressed
        )

    @property
    def compressed_tensors(self) -> int:
        return self._total("tensors", True)

    @property
    def dense_tensors(self) -> int:
        return self._total("tensors", False)

    @property
    def compressed_bytes(self) -> int:
        return self._total("state_bytes", True)

    @property
    def dense_bytes(self) -> int:
        return self._total("state_bytes", False)

    @property
    def state_bytes(self) -> int:
        return self._total("state_bytes", None)

    @property
    def adamw_bytes(self) -> int:
        return self._total("adamw_bytes", None)

    def __str__(self) -> str:
        lines = [f"{'shape':>20} {'tensors':>8} {'numbers':>14} {'rank':>6} {'state':>11} {'AdamW':>11}"]
        for row in self.rows:
            lines.append(
                f"{' x '.join(map(str, row.shape)) or 'scalar':>20} {row.tensors:>8} {row.numel:>14,} "
                f"{'dense' if row.rank is None else row.rank:>6} {format_bytes(row.state_bytes):>11} "
                f"{format_bytes(row.adamw_bytes):>11}"
            )
        lines.append(
            f"compressed: {self.compressed_tensors} tensors, {format_bytes(self.compressed_bytes)}; "
            f"dense: {self.dense_tensors} tensors, {format_bytes(self.dense_bytes)}"
        )
        share = self.state_bytes / self.adamw_bytes if self.adamw_bytes else 1.0
        lines.append(
            f"optimizer state: {format_bytes(self.state_bytes)}, {share:.1%} of AdamW's "
            f"{format_bytes(self.adamw_bytes)}"
        )
        return "\n".join(lines)


def format_bytes(count: int) -> str:
    """``count`` bytes in decimal units, as disks and GPUs are sold: 1,500,000 is '1.50 MB'."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


def tensor_bytes(state: dict[str, Any]) -> int:
    """Bytes of the tensors in one parameter's state."""
    return sum(value.numel() * value.element_size() for value in state.values() if isinstance(value, Tensor))


def summarize(optimizer: Optimizer, view_of: Callable[[Tensor, dict[str, Any]], MatrixView | None]) -> OptimizerSummary:
    """Group ``optimizer``'s parameters by shape and treatment, in order of first appearance."""
    rows: dict[tuple[tuple[int, ...], int | None], list[int]] = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            view = view_of(param, group)
            state = optimizer.state[param]
            itemsize = next(
                value.element_size() for key, value in state.items() if isinstance(value, Tensor) and key != "step"
            )
            key = (tuple(param.shape), None if view is None else view.rank)
            totals = rows.setdefault(key, [0, 0, 0, 0])
            for position, amount in enumerate((1, param.numel(), tensor_bytes(state), 2 * param.numel() * itemsize)):
                totals[position] += amount
    return OptimizerSummary(tuple(SummaryRow(*key, *totals) for key, totals in rows.items()))
