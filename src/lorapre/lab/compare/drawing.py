"""What the static figures of a comparison share."""

from __future__ import annotations

import textwrap
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

GREY = "#666666"


def wrapped(text: str, width: int = 34) -> str:
    """``text`` wrapped, and its dollars not taken for formulas."""
    return "\n".join(textwrap.wrap(text, width)).replace("$", r"\$")


@contextmanager
def house_style() -> Iterator[None]:
    """Fonts and spines, for what is drawn within."""
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "legend.fontsize": 9}):
        yield


def write_subtitle(figure: Figure, axes: Any, text: str) -> None:
    """Write ``text`` under the title of a figure that is otherwise whole, cut to the width of the axes."""
    figure.draw_without_rendering()  # settles that width
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    place = axes.transAxes + ScaledTranslation(0, 6 / 72, figure.dpi_scale_trans)
    note = figure.text(0, 1, "", transform=place, fontsize=9, color=GREY, parse_math=False)
    text = " ".join(text.split())

    def width(count: int) -> float:
        note.set_text(text if count == len(text) else text[:count].rstrip(" ,;:(") + "…")
        return float(note.get_window_extent(renderer).width)

    if text:
        width(bisect_right(range(1, len(text) + 1), 0.99 * axes.get_window_extent(renderer).width, key=width))


def add_legend(figure: Figure, axes: Any, first: Sequence[Any] = ()) -> None:
    """Add a legend of ``first`` and what ``axes`` has labelled, right of the axes."""
    handles, _ = axes.get_legend_handles_labels()
    if handles or first:
        figure.legend(handles=[*first, *handles], loc="outside right upper", frameon=False, handlelength=3.2)
