"""The figures: the gain, the rank, learning rates, and curves. Each copes with contestants that are missing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from lorapre.lab.compare.style import LINES, MARKERS
from lorapre.lab.run_folder import write_atomically
from lorapre.optim.summary import format_bytes
from study.looks import (
    DEFAULT_GAIN,
    FACTORS,
    GREY,
    NOW,
    extras,
    family,
    gain,
    is_ours,
    label,
    look,
    numbered,
    rank_name,
)
from study.rows import Best, Rows

LOSS = "validation loss (nats a token)"
ABOVE = r"$\uparrow$"
RING = 11
PANELS = ("full rank", "low rank, others and the paper", "LoRA-Pre Muon", "LoRA-Pre Muon: other forms",
          "LoRA-Pre AdamW: ranks", "LoRA-Pre AdamW: gains", "LoRA-Pre AdamW: other state")  # fmt: skip
#: Loss above the best at which an axis ends; arrows stand for what is beyond.
REACH = 0.6


def write_figures(rows: Rows, model: str, tokens: int, folder: Path) -> None:
    """``gain.png``, ``rank.png``, ``rates.png`` of ``model`` at ``tokens``, and ``curves.png`` of longer and larger."""
    best = {name: one for name, one in rows.best(model, tokens).items() if one.losses}
    title = f"{model}, {tokens / 1e6:.3g} M tokens"
    figures: dict[str, Callable[[], Figure]] = {
        "gain.png": lambda: gain_figure(best, title),
        "rank.png": lambda: rank_figure(best, title),
        "rates.png": lambda: rates_figure(best, title),
        "curves.png": lambda: curves_figure(rows, model, tokens),
    }
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "legend.fontsize": 9}):
        for name, draw in figures.items():
            figure = draw()

            def write(path: Path, figure: Figure = figure) -> None:
                figure.savefig(path, dpi=144)

            write_atomically(folder / name, write)


def gain_figure(best: Mapping[str, Best], title: str) -> Figure:
    """Loss at the best rate against the residual's gain: a line for each family and rank; rivals as levels."""
    figure, (axes,) = _new(title, "gain of the residual (hollow: the paper's, the weight of a single gradient)")
    groups: dict[str, list[Best]] = {}
    for one in best.values():
        if is_ours(one.row):
            named = ", ".join([family(one.row), rank_name(one.row), *extras(one.row)])
            groups.setdefault(named, []).append(one)
    lines = {name: group for name, group in groups.items() if len(group) > 1}
    drawn: Counter[str] = Counter()  # a colour a family, a line and a marker each within it
    for name, group in sorted(lines.items(), key=lambda item: (len(extras(item[1][0].row)), item[0])):
        group.sort(key=lambda one: gain(one.row))
        style = look(group[0].row)
        number = drawn[style.colour]
        drawn[style.colour] += 1
        line, marker = LINES[number % len(LINES)][0], MARKERS[number % len(MARKERS)][0]
        xs, ys = [gain(one.row) for one in group], [one.mean for one in group]
        axes.plot(
            xs, ys, color=style.colour, linewidth=style.width, linestyle=line, marker=marker, markersize=7, label=name
        )
        for one, x, y in zip(group, xs, ys, strict=True):
            hollow = one.row["settings"]["residual_gain"] is None
            face = "white" if hollow else style.colour
            axes.plot(x, y, color=style.colour, marker=marker, markersize=7, markerfacecolor=face)
            _spread(axes, x, one, style.colour)
    levels = [one for one in best.values() if family(one.row) in ("AdamW", "AdamW, beta1 = 0", "Muon")]
    for one in levels:
        style = look(one.row)
        name = f"{family(one.row)}  {one.mean:.3f}"
        axes.axhline(one.mean, color=style.colour, linestyle=style.line, linewidth=1.6, label=name)
    shown = [one for group in lines.values() for one in group]
    _finish(axes, [one.mean for one in shown + levels])
    ticks = sorted({gain(one.row) for one in shown})
    if ticks and ticks[0] > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    _legend(figure, axes)
    return figure


def rank_figure(best: Mapping[str, Best], title: str) -> Figure:
    """Loss at the best rate against bytes of state of the matrices: lines over the ranks at the default gain."""
    figure, (axes,) = _new(title, "state of the matrices")
    lines: dict[str, list[Best]] = {}
    rest = []
    for one in best.values():
        plain = is_ours(one.row) and not extras(one.row) and gain(one.row) == DEFAULT_GAIN
        lines.setdefault(family(one.row), []).append(one) if plain else rest.append(one)
    points = [one for one in rest if not is_ours(one.row) or gain(one.row) == DEFAULT_GAIN]
    for group in lines.values():
        group.sort(key=lambda one: one.row["state_bytes"])
        style = look(group[0].row)
        xs, ys = [one.row["state_bytes"] for one in group], [one.mean for one in group]
        drawn = {"color": style.colour, "linewidth": style.width, "marker": style.marker, "markersize": 8, "zorder": 4}
        axes.plot(xs, ys, label=f"{family(group[0].row)}, gain {DEFAULT_GAIN:g}", **drawn)
        for one, x, y in zip(group, xs, ys, strict=True):
            below = {"xytext": (0, -9), "va": "top"} if family(one.row) == "LoRA-Pre Muon" else {"xytext": (0, 8)}
            note = {"textcoords": "offset points", "ha": "center", "fontsize": 8, "color": style.colour}
            axes.annotate(rank_name(one.row), (x, y), **below, **note)
            _spread(axes, x, one, style.colour)
    for number, one in enumerate(sorted(points, key=lambda one: one.mean)):
        style = look(one.row)
        mark, face = (numbered(number).marker, "white") if is_ours(one.row) else (style.marker, style.colour)
        drawn = {"color": style.colour, "marker": mark, "markersize": 8, "markerfacecolor": face, "alpha": 0.85}
        name = f"{label(one.row)}  {one.mean:.3f}"
        axes.plot(one.row["state_bytes"], one.mean, linestyle="none", label=name, **drawn)
        _spread(axes, one.row["state_bytes"], one, style.colour)
    _finish(axes, [one.mean for group in lines.values() for one in group] + [one.mean for one in points], reach=1.0)
    if lines or points:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(round(value)).replace(".00", "")))
        axes.xaxis.set_minor_formatter(NullFormatter())
    _legend(figure, axes)
    return figure


def panels(best: Mapping[str, Best]) -> dict[str, list[Best]]:
    """What each panel of ``rates.png`` shows; our AdamW at its default is wherever its rank is varied."""
    found: dict[str, list[Best]] = {name: [] for name in PANELS}
    adam = [one for one in best.values() if family(one.row) == "LoRA-Pre AdamW"]
    gains = {rank_name(one.row) for one in adam if not extras(one.row) and gain(one.row) != DEFAULT_GAIN}
    states = {rank_name(one.row) for one in adam if extras(one.row)}
    for one in best.values():
        name, rank = family(one.row), rank_name(one.row)
        plain = not extras(one.row) and is_ours(one.row) and gain(one.row) == DEFAULT_GAIN
        if name in ("LoRA-Pre Muon", FACTORS):
            found["LoRA-Pre Muon: other forms" if extras(one.row) or name == FACTORS else "LoRA-Pre Muon"].append(one)
        elif name != "LoRA-Pre AdamW":
            found["low rank, others and the paper" if rank else "full rank"].append(one)
        else:
            kinds = {"ranks": plain, "gains": plain and rank in gains, "other state": plain and rank in states}
            kinds["other state" if extras(one.row) else "gains"] |= not plain
            for kind, here in kinds.items():
                if here:
                    found[f"LoRA-Pre AdamW: {kind}"].append(one)
    return {name: sorted(group, key=lambda one: one.mean) for name, group in found.items() if group}


def rates_figure(best: Mapping[str, Best], title: str) -> Figure:
    """Loss against learning rate, a panel for each kind of contestant."""
    shown = panels(best)
    title += "; ringed: the best rate; x: diverged; dashed: AdamW's best loss"
    figure, every = _new(
        title, "peak learning rate of the matrices", max(1, len(shown)), columns=min(2, max(1, len(shown))), wide=True
    )
    reference = next((one for one in best.values() if one.row["optimizer"] == "adamw"), None)
    for axes, (name, group) in zip(every, shown.items(), strict=False):
        axes.set_title(name, loc="left", fontsize=10)
        if reference is not None:
            axes.axhline(reference.mean, color="black", linestyle=(0, (4, 2)), linewidth=1, alpha=0.6)
        families = {family(one.row) for one in group}
        for number, one in enumerate(group):
            style = look(one.row) if len(families) == len(group) else numbered(number)
            line = "-" if family(one.row) == "AdamW" else style.line  # the dashes are its level
            finite = {rate: loss for rate, loss in one.by_rate.items() if loss < math.inf}
            shown_as = label(one.row, with_family=len(families) > 1)
            drawn = {"color": style.colour, "linestyle": line, "linewidth": 1.7, "marker": style.marker}
            axes.plot(list(finite), list(finite.values()), markersize=4.5, label=shown_as, **drawn)
            ring = {"marker": "o", "markersize": RING, "markerfacecolor": "none", "color": style.colour}
            axes.plot(one.lr, one.by_rate[one.lr], **ring)
        _finish(axes, [loss for one in group for loss in one.by_rate.values() if loss < math.inf])
        top = axes.get_ylim()[1]
        for one in group:
            for rate in (rate for rate, loss in one.by_rate.items() if loss == math.inf):
                axes.plot(rate, top, marker="x", markersize=7, color="black", clip_on=False)
        _log_rates(axes, {rate for one in group for rate in one.by_rate})
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.03), frameon=False, fontsize=8, handlelength=3)
    return figure


def curves_figure(rows: Rows, model: str, tokens: int) -> Figure:
    """Loss against tokens, each contestant at its best rate: longer runs and larger models, or else the search's."""
    settings = [setting for setting in rows.settings() if setting != (model, tokens)] or [(model, tokens)]
    figure, every = _new(
        "Validation loss", "tokens (millions)", len(settings), columns=min(3, len(settings)), height=7.2
    )
    for axes, setting in zip(every, settings, strict=True):
        best = [one for one in rows.best(*setting).values() if one.losses]
        best.sort(key=lambda one: one.mean)
        best = [one for one in best if len(extras(one.row, NOW)) < 2]  # the defaults, and what one option makes of them
        if len(settings) == 1:  # of all that are in the search these are legible
            best = [
                one for one in best if not extras(one.row) and (not is_ours(one.row) or gain(one.row) == DEFAULT_GAIN)
            ]
        axes.set_title(f"{setting[0]}, {setting[1] / 1e6:.3g} M tokens", loc="left", fontsize=10)
        ranks: dict[str, list[float]] = {}  # dots are for the lower ranks of a family, in every panel
        for one in best:
            ranks.setdefault(family(one.row), []).append(one.row["state_bytes"])
        ends: list[float] = []
        for one in best:
            style = look(one.row)
            line = style.line if one.row["state_bytes"] == max(ranks[family(one.row)]) else (0, (1, 1.2))
            xs, ys = zip(*one.row["curve"], strict=True)
            varied = extras(one.row, NOW)
            name = ", ".join(part for part in (family(one.row), rank_name(one.row), *varied) if part)
            drawn = {"color": style.colour, "linestyle": line, "linewidth": style.width, "marker": style.marker}
            if varied:  # beside the default, whose colour it has
                drawn |= {"alpha": 0.45, "linewidth": 1.2}
            axes.plot([x / 1e6 for x in xs], ys, markersize=4, label=f"{name}  {ys[-1]:.3f}", **drawn)
            ends += ys[len(ys) // 3 :]
        _finish(axes, ends, reach=2.0, arrows=False)
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.12), fontsize=8, handlelength=2.6, frameon=False)
    return figure


def _new(
    title: str, xlabel: str, panels: int = 1, columns: int = 1, *, wide: bool = False, height: float = 5.2
) -> tuple[Figure, list[Any]]:
    """A figure of panels of that ``height``; ``wide`` where each has a legend at its side."""
    lines = -(-panels // columns)
    figure = Figure(
        figsize=(11, 5.6) if panels == 1 else ((7.6 if wide else 4.6) * columns, (3.9 if wide else height) * lines),
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, squeeze=False)
    every = list(grid.flat)
    for spare in every[panels:]:
        spare.set_visible(False)
    for axes in every[:panels]:
        axes.set_xlabel(xlabel)
        axes.grid(alpha=0.25)
    for line in grid:
        line[0].set_ylabel(LOSS)
    if panels == 1:
        every[0].set_title(title, loc="left")
    else:
        figure.suptitle(title, x=0.01, ha="left")
    return figure, every[:panels]


def _finish(axes: Any, losses: Iterable[float], reach: float = REACH, *, arrows: bool = True) -> None:
    """Limits around ``losses``, no further than ``reach`` above the lowest; ``arrows`` for points beyond them."""
    known = sorted(losses)
    if not known:
        axes.text(0.5, 0.5, "nothing to show", transform=axes.transAxes, ha="center", color=GREY)
        return
    low, high = known[0], min(known[-1], known[0] + reach)
    margin = max(0.08 * (high - low), 0.01)
    top = high + 1.5 * margin
    axes.set_ylim(low - margin, top)
    for line in list(axes.get_lines()) if arrows else ():
        xs, ys = line.get_data()
        if line.get_marker() in ("None", "", None) or line.get_markersize() == RING:
            continue
        for x, y in zip(xs, ys, strict=True):
            if y > top:
                axes.plot(x, top - 0.4 * margin, marker=ABOVE, markersize=7, color=line.get_color(), linestyle="none")


def _spread(axes: Any, x: float, one: Best, colour: str) -> None:
    """A bar from the smallest to the largest loss over the seeds."""
    if one.spread is not None:
        axes.plot([x, x], [min(one.losses), max(one.losses)], color=colour, linewidth=4, alpha=0.35)


def _log_rates(axes: Any, rates: set[float]) -> None:
    """A logarithmic axis that names ``rates``, but for those that would touch the one before."""
    named: list[float] = []
    for rate in sorted(rates):
        if not named or rate > 1.4 * named[-1]:
            named.append(rate)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(named))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", labelsize=8, labelrotation=45)


def _legend(figure: Figure, axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", frameon=False, handlelength=3.2)
