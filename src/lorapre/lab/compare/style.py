"""How contestants are told apart, in the static figures and on the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorapre.lab.compare.facts import is_ours
from lorapre.lab.compare.results import Comparison

#: Ours take the warm colours, all others the cool ones (Okabe and Ito's, plus a brown): on white, and on black.
OURS = (("#D55E00", "#FF8A47"), ("#E69F00", "#FFC75A"), ("#8C3B00", "#C98A5E"))
OTHERS = (("#0072B2", "#4DA8E8"), ("#009E73", "#2FCFA0"), ("#CC79A7", "#EBA3CC"), ("#56B4E9", "#A9DBF8"))
BLACK = ("#000000", "#F4F4F4")
#: Line styles as matplotlib and as plotly call them. Dashes are AdamW's alone.
LINES: tuple[tuple[Any, str], ...] = (
    ("-", "solid"),
    ((0, (6, 1.5, 1, 1.5)), "dashdot"),
    ((0, (1, 1.2)), "dot"),
    ((0, (9, 2)), "longdash"),
)
MARKERS = (
    ("o", "circle"), ("s", "square"), ("^", "triangle-up"), ("D", "diamond"), ("v", "triangle-down"), ("P", "cross"),
    ("p", "pentagon"), ("<", "triangle-left"), (">", "triangle-right"), ("*", "star"), ("h", "hexagon"),
    ("d", "diamond-tall"),
)  # fmt: skip


@dataclass(frozen=True)
class Style:
    """How a contestant is drawn, in matplotlib's and plotly's words.

    Attributes:
        ours: whether it is one of this library's.
        colour: on white.
        dark: colour on a dark page.
        line: matplotlib's line style.
        dash: plotly's line style.
        marker: matplotlib's marker.
        symbol: plotly's marker.
        width: of the line, in points.
        order: the higher lies on top.
    """

    ours: bool
    colour: str
    dark: str
    line: Any
    dash: str
    marker: str
    symbol: str
    width: float
    order: int


def styles(comparison: Comparison) -> dict[str, Style]:
    """A style for each contestant, different from all others': ours warm and wide, AdamW black and dashed."""
    found: dict[str, Style] = {}
    ours = others = 0
    for row in comparison.rows:
        if row.optimizer == "adamw":
            found[row.contestant] = Style(False, *BLACK, (0, (4, 2)), "dash", "X", "x", 1.9, 5)
            continue
        mine = is_ours(row)
        palette: tuple[tuple[str, str], ...]
        if mine:
            number, palette, width, order = ours, OURS, 2.6, 6
            ours += 1
        else:
            number, palette, width, order = others, OTHERS, 1.5, 3
            others += 1
        colours = palette[number % len(palette)]
        line = LINES[number // len(palette) % len(LINES)]
        marker = MARKERS[(number + number // len(MARKERS)) % len(MARKERS)]  # shifted once colours and lines repeat
        found[row.contestant] = Style(mine, *colours, *line, *marker, width, order)
    return found
