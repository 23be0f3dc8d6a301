"""The static figure of how well the factors follow the dense momentum."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lorapre.lab.compare.diagnostics import HEADING, PANELS
from lorapre.lab.compare.drawing import add_legend, house_style, wrapped, write_subtitle
from lorapre.lab.compare.facts import label
from lorapre.lab.compare.results import Comparison
from lorapre.lab.compare.style import styles


def momentum_figure(comparison: Comparison) -> Figure:
    """A panel a figure against steps, the first over the whole width; a line for each contestant that was measured."""
    rows = {row.contestant: row for row in comparison.rows}
    look = styles(comparison)
    with house_style():
        figure = Figure(figsize=(12, 9), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplot_mosaic([[0, 0], [1, 2], [3, 4]])
        for number, panel in enumerate(PANELS):
            here = axes[number]
            for curve in comparison.momentum:
                style = look[curve.contestant]
                for position, (name, _) in enumerate(panel.lines):
                    first = position == 0
                    marked = first and len(curve.steps) < 3
                    here.plot(
                        curve.steps,
                        _drawable(getattr(curve, name), panel.floor),
                        color=style.colour,
                        linestyle=style.line if first else ":",
                        linewidth=style.width if first else 1.2,
                        marker=style.marker if marked else None,
                        zorder=style.order,
                        label=wrapped(label(rows[curve.contestant])) if first and number == 0 else None,
                    )
            if panel.floor is None:
                here.set_ylim(bottom=0)
            else:
                here.set_yscale("log")
            here.set_title(panel.title, loc="left", fontsize=10, pad=20 if number == 0 else None)
            here.set_xlabel("step")
            here.grid(alpha=0.25)
        figure.suptitle(HEADING, x=0.01, ha="left")
        add_legend(figure, axes[0])
        write_subtitle(figure, axes[0], comparison.title)
    return figure


def _drawable(values: Sequence[float | None], floor: float | None) -> list[float]:
    """The values, with a gap where there is none, or none above ``floor``."""
    return [math.nan if value is None or (floor is not None and value <= floor) else value for value in values]
