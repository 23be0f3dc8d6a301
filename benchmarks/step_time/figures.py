"""The figures: step time against rank for every dtype, and tokens a second of whole training."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, ScalarFormatter

from lorapre.lab.compare.style import MARKERS, OTHERS, OURS
from lorapre.lab.run_folder import write_atomically
from step_time.contestants import REFERENCE
from step_time.goals import DEFAULT, MODEL, RATIOS
from step_time.rows import Results, StepRow, TrainingRow

#: Of a model's line.
COLOURS = {"llama-60m": OURS[1][0], "llama-350m": OURS[2][0], "llama-1b": OURS[0][0], "llama-7b": "#6A3D9A"}
RATIO = "step time / fused AdamW's"


def write_figures(results: Results, folder: Path) -> None:
    """``ratio.png``, and ``training.png``, of rows without a note: one line is of one state of the code."""
    steps, training = ([row for row in rows if not row.note] for rows in (results.steps, results.training))
    figures = {"ratio.png": ratio_figure(steps)} if steps else {}
    if training:
        figures["training.png"] = training_figure(training)
    for name, figure in figures.items():

        def write(path: Path, figure: Figure = figure) -> None:
            figure.savefig(path, dpi=144)

        write_atomically(folder / name, write)


def ratio_figure(rows: list[StepRow]) -> Figure:
    """A panel a dtype: `LoRAPreAdamW` by rank, a line a model; all others on the largest model beside it."""
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    shown = MODEL if any(row.model == MODEL for row in rows) else rows[0].model
    with _style():
        figure, panels = _new(len(dtypes), 6.4, 4.8)
        for axes, dtype in zip(panels, dtypes, strict=True):
            own = [row for row in rows if row.dtype == dtype]
            axes.set_title(dtype, loc="left", fontsize=10)
            axes.axhline(1.0, color="black", linestyle=(0, (6, 3)), linewidth=1, label=REFERENCE)
            for number, model in enumerate(dict.fromkeys(row.model for row in own)):
                line = sorted((row.rank, row.ratio_to_fused_adamw) for row in own
                              if row.model == model and row.optimizer == DEFAULT and row.rank is not None)  # fmt: skip
                if line:
                    style = {"color": COLOURS.get(model, OURS[0][0]), "marker": MARKERS[number][0]}
                    axes.plot(*zip(*line, strict=True), linewidth=1.7, label=f"{DEFAULT}, {model}", **style)
            _others(axes, [row for row in own if row.model == shown and row.optimizer not in (DEFAULT, REFERENCE)])
            if any(row.device != "cpu" for row in own):
                _goals(axes)
            ranks = sorted({row.rank for row in own if row.rank is not None})
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_locator(FixedLocator(ranks))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(ScalarFormatter())
            axes.tick_params(axis="y", which="minor", labelsize=7)
            axes.set_xlabel("rank")
            axes.set_ylabel(RATIO)
            beside = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.02), "frameon": False, "alignment": "left"}
            axes.legend(**beside, fontsize=8, title=f"others: {shown}", title_fontsize=8)
    return figure


def training_figure(rows: list[TrainingRow]) -> Figure:
    """A panel a model: tokens a second as a share of fused AdamW's."""
    models = list(dict.fromkeys(row.model for row in rows))
    with _style():
        figure, panels = _new(len(models), 6.0, 4.2)
        for axes, model in zip(panels, models, strict=True):
            own = [row for row in rows if row.model == model]
            own.sort(key=lambda row: row.ratio_to_fused_adamw)
            names = [row.optimizer if row.rank is None else f"{row.optimizer}, r = {row.rank}" for row in own]
            colours = [_bar_colour(row.optimizer) for row in own]
            axes.barh(names, [row.ratio_to_fused_adamw for row in own], color=colours)
            for place, row in enumerate(own):
                label = axes.text(row.ratio_to_fused_adamw + 0.01, place, f"{row.ratio_to_fused_adamw:.3f}")
                label.set(va="center", fontsize=8, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
            axes.axvline(1.0, color="black", linestyle=(0, (6, 3)), linewidth=1, zorder=1.5)
            axes.set_xlim(0, 1.15 * max(1.0, *(row.ratio_to_fused_adamw for row in own)))
            axes.set_title(f"{model}, {own[0].batch} x {own[0].sequence} tokens", loc="left", fontsize=10)
            axes.set_xlabel("tokens a second / fused AdamW's")
    return figure


def _others(axes: Any, rows: list[StepRow]) -> None:
    """Those with a rank as points, the others as levels."""
    names = sorted(dict.fromkeys(row.optimizer for row in rows), key=lambda name: name.startswith("LoRAPre"))
    numbers = {True: count(), False: count()}  # of points and of levels, so that no marker comes twice
    for name in names:
        own = [row for row in rows if row.optimizer == name]
        number = next(numbers[own[0].rank is not None])
        colour = OURS[0][0] if name.startswith("LoRAPre") else OTHERS[number % len(OTHERS)][0]
        label = name + (", with its rare work" if own[0].rare_ms is not None else "")
        if own[0].rank is None:
            axes.axhline(own[0].ratio_to_fused_adamw, color=colour, linewidth=1, label=label,
                         linestyle=(0, (1 + number, 1.5)))  # fmt: skip
        else:
            points = [(row.rank, row.ratio_to_fused_adamw) for row in own]
            marker = MARKERS[(4 + number) % len(MARKERS)][0]
            # Filled is the line of the default.
            ours = {"markerfacecolor": "white"} if name.startswith("LoRAPre") else {}
            axes.plot(*zip(*points, strict=True), linestyle="none", color=colour, marker=marker, label=label, **ours)


def _goals(axes: Any) -> None:
    lowest = 8
    for highest, most in RATIOS:
        axes.plot([lowest, highest], [most, most], color="0.75", linewidth=5, solid_capstyle="butt", zorder=0,
                  label=f"goal, {MODEL}" if lowest == 8 else None)  # fmt: skip
        lowest = highest


def _bar_colour(name: str) -> str:
    return "0.4" if name == REFERENCE else OURS[0][0] if name.startswith("LoRAPre") else OTHERS[0][0]


def _style() -> Any:
    return mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})


def _new(panels: int, width: float, height: float) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(width * panels, height), layout="constrained")
    FigureCanvasAgg(figure)
    every = list(figure.subplots(1, panels, squeeze=False).flat)
    for axes in every:
        axes.grid(alpha=0.25)
    return figure, every
