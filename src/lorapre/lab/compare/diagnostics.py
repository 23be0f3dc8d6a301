"""From the ``diagnostics.jsonl`` of runs to curves of a comparison, and what their figures share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from lorapre.lab.compare.plan import Job, Planner
from lorapre.lab.compare.results import Comparison, MomentumCurve, Row
from lorapre.lab.compare.runs import RunStore
from lorapre.lab.diagnose import read_rows
from lorapre.lab.optimizers import OPTIMIZERS
from lorapre.lab.run_folder import RunFolder

HEADING = "How well the factors follow"


@dataclass(frozen=True)
class Panel:
    """A panel of the figure.

    Attributes:
        title: for people.
        lines: fields of `MomentumCurve` with their headings in tables; the first is drawn as the contestant's line, the
            second thin and dotted in the same colour.
        floor: the value above which to draw, on a logarithmic scale; None for a linear one from 0.
    """

    title: str
    lines: tuple[tuple[str, str], ...]
    floor: float | None = None


#: A drift below 1e-9 is rounding.
PANELS = (
    Panel(
        "error against the dense momentum (dotted: the best of this rank)",
        (("ema_error", "error"), ("best_error", "least error")),
    ),
    Panel("gradient energy outside the subspace", (("outside", "outside"),)),
    Panel("drift of the subspace in a step", (("drift", "drift"),), floor=1e-9),
    Panel("update / learning rate, root mean square", (("update_rms", "update, root mean square"),), floor=0.0),
    Panel("update / learning rate, largest entry", (("update_max", "update, largest"),), floor=0.0),
)
_LINES = tuple(line for panel in PANELS for line in panel.lines)
#: Headings of `last_figures`.
LAST_COLUMNS = ("step", *(heading for _, heading in _LINES))


def explanation(comparison: Comparison) -> str:
    """One sentence that says what the figure shows."""
    watched = sorted({curve.matrices for curve in comparison.momentum})
    count = " or ".join(map(str, watched))
    return (
        f"Medians over {count} matrices (the largest update: of all), first seed at the chosen rate: how far the "
        "product of the factors is from the momentum kept dense, beside the least that any product of this rank can "
        "be; the share of the gradient's energy that the factors' subspace does not hold; how far a step turns that "
        "subspace (0: not at all, 1: to be orthogonal); and the size of the updates in units of the learning rate."
    )


def momentum_curves(rows: Iterable[Row], planners: Mapping[str, Planner], store: RunStore) -> tuple[MomentumCurve, ...]:
    """Those of ``rows`` that keep factors and whose run at the chosen rate, first seed, full length was measured.

    Args:
        rows: in the order wanted.
        planners: by contestant's key.
        store: where the runs are.
    """
    found = []
    for row in rows:
        if row.lr is None or not OPTIMIZERS[row.optimizer].factored:
            continue
        planner = planners[row.contestant]
        folder = store.folder(Job(row.contestant, row.lr, planner.seeds[0], planner.steps))
        records = read_rows(RunFolder(folder))
        if records:
            found.append(curve_of(row.contestant, records))
    return tuple(found)


def curve_of(contestant: str, records: Sequence[Mapping[str, Any]]) -> MomentumCurve:
    """The curve of the ``records`` of one run, in their order.

    A last step that lacks matrices was cut short: its medians would be of other matrices than those before.
    """
    by_step: dict[int, list[Mapping[str, Any]]] = {}
    for record in records:
        by_step.setdefault(record["step"], []).append(record)
    steps = list(by_step)
    names = {record["name"] for record in records}
    if len(steps) > 1 and len(by_step[steps[-1]]) < len(by_step[steps[-2]]):
        steps.pop()

    def over(field: str, summary: Callable[[list[float]], float] = median) -> tuple[float | None, ...]:
        values = ([record[field] for record in by_step[step] if record[field] is not None] for step in steps)
        return tuple(summary(each) if each else None for each in values)

    return MomentumCurve(
        contestant=contestant,
        matrices=len(names),
        steps=tuple(steps),
        ema_error=over("ema_error"),
        best_error=over("best_error"),
        outside=over("outside"),
        drift=over("drift"),
        update_rms=over("update_rms"),
        update_max=over("update_max", max),
    )


def last_figures(comparison: Comparison) -> list[tuple[Row, list[str]]]:
    """Each measured row with its figures at the last step, for people, in the order of `LAST_COLUMNS`."""
    rows = {row.contestant: row for row in comparison.rows}
    return [
        (rows[curve.contestant], [f"{curve.steps[-1]:,}", *(_written(getattr(curve, name)[-1]) for name, _ in _LINES)])
        for curve in comparison.momentum
    ]


def _written(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
