"""The figures: accuracy, learning rates, ranks and curves. Each copes with contestants that are missing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from finetune.profiles import Contestant, Profile
from finetune.report import OURS, Result, results
from finetune.rows import Rows
from lorapre.lab.compare.style import MARKERS
from lorapre.lab.compare.style import OTHERS as COOL
from lorapre.lab.compare.style import OURS as WARM
from lorapre.lab.run_folder import write_atomically

LOSS = "held-out loss (nats a learned token)"
Found = Mapping[Contestant, Result]


def write_figures(rows: Rows, profile: Profile, folder: Path) -> None:
    """``accuracy.png``, ``rates.png``, ``ranks.png`` and ``curves.png``, of what there are rows of."""
    found = results(rows, profile)
    compared = {one: found[one] for one in profile.rates if one in found}
    figures: dict[str, Callable[[], Figure | None]] = {
        "accuracy.png": lambda: accuracy_figure(compared, profile.task.name),
        "rates.png": lambda: rates_figure(compared, profile.task.name),
        "ranks.png": lambda: ranks_figure(found, profile),
        "curves.png": lambda: curves_figure(compared, profile.task.name),
    }
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "legend.fontsize": 8}):
        for name, draw in figures.items():
            figure = draw()
            if figure is None:
                continue

            def write(path: Path, figure: Figure = figure) -> None:
                figure.savefig(path, dpi=144)

            write_atomically(folder / name, write)


def accuracy_figure(found: Found, title: str) -> Figure | None:
    """Accuracy with its interval, the highest above; None where nothing was tested."""
    shown = sorted(
        ((known.mean, known, result) for result in found.values() if (known := result.accuracy) is not None),
        key=lambda item: item[0],
    )
    if not shown:
        return None
    figure, axes = _new(f"{title}: test accuracy, 95 % interval over seeds and questions", 0.36 * len(shown) + 1.4)
    for place, (mean, known, result) in enumerate(shown):
        style = _style(result.contestant, found)
        bounds = [[mean - known.low], [known.high - mean]]
        marks = {"color": style["color"], "marker": style["marker"], "capsize": 3, "markersize": 7}
        axes.errorbar([mean], [place], xerr=bounds, linestyle="none", **marks)
    axes.set_yticks(range(len(shown)), [str(result.contestant) for _, _, result in shown])
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.grid(alpha=0.25, axis="x")
    return figure


def rates_figure(found: Found, title: str) -> Figure | None:
    """Held-out loss of the search against learning rate; the best is ringed, x is a run that diverged."""
    if not found:
        return None
    figure, axes = _new(f"{title}: the search (ringed: the best; x: diverged)")
    for contestant, result in found.items():
        style = _style(contestant, found)
        finite = {rate: loss for rate, loss in result.by_rate.items() if loss < math.inf}
        if finite:
            axes.plot(list(finite), list(finite.values()), label=str(contestant), markersize=5, **style)
        if result.lr in finite:
            ring = {"marker": "o", "markersize": 11, "markerfacecolor": "none", "color": style["color"]}
            axes.plot([result.lr], [finite[result.lr]], linestyle="none", **ring)
    losses = [loss for result in found.values() for loss in result.by_rate.values() if loss < math.inf]
    _limit(axes, losses)
    for contestant, result in found.items():
        diverged = [rate for rate, loss in result.by_rate.items() if loss == math.inf]
        top = [axes.get_ylim()[1]] * len(diverged)
        axes.plot(diverged, top, linestyle="none", marker="x", color=_style(contestant, found)["color"], clip_on=False)
    axes.set_xscale("log", base=10)
    axes.set_xlabel("peak learning rate of the matrices, or of the adapter")
    axes.set_ylabel(LOSS)
    _legend(axes)
    return figure


def ranks_figure(found: Found, profile: Profile) -> Figure | None:
    """LoRA-Pre's held-out loss, and its accuracy where it was tested, against rank; None where no rank was tried."""
    bases = dict.fromkeys(profile.ranks.values())
    plain = {base: [one for one in found if one.method == base.method and not one.options] for base in bases}
    if all(len(group) < 2 for group in plain.values()):
        return None
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for base, group in plain.items():
        style = _style(base, dict.fromkeys(bases))
        group.sort(key=lambda one: one.rank or 0)
        left.plot([one.rank for one in group], [found[one].loss for one in group], label=base.method, **style)
        tested = [(one.rank, known) for one in group if (known := found[one].accuracy) is not None]
        bounds = [[known.mean - known.low for _, known in tested], [known.high - known.mean for _, known in tested]]
        ranks, means = [rank for rank, _ in tested], [known.mean for _, known in tested]
        right.errorbar(ranks, means, yerr=bounds, capsize=3, label=base.method, **style)
    special = [one for one in found if one.options and one.method in {base.method for base in bases}]
    for one, marker in zip(special, itertools.cycle("*PXd")):
        point = {"linestyle": "none", "marker": marker, "markersize": 10, "color": "black", "label": str(one)}
        left.plot([one.rank], [found[one].loss], **point)
        if (known := found[one].accuracy) is not None:
            right.plot([one.rank], [known.mean], **point)
    left.set_ylabel(LOSS)
    right.set_ylabel("test accuracy")
    right.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({one.rank for one in found if one in profile.ranks or one in bases}))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("rank of the momentum")
        axes.grid(alpha=0.25)
    left.set_title(f"{profile.task.name}: ranks of LoRA-Pre", loc="left")
    left.legend(frameon=False)
    return figure


def curves_figure(found: Found, title: str) -> Figure | None:
    """Held-out loss against steps, of each contestant's best rate in the search."""
    curves = {one: result.found["curve"] for one, result in found.items() if result.found["loss"] is not None}
    if not curves:
        return None
    figure, axes = _new(f"{title}: held-out loss at the best rates")
    for contestant, curve in sorted(curves.items(), key=lambda item: item[1][-1][1]):
        steps, losses = zip(*curve, strict=True)
        label = f"{contestant}  {losses[-1]:.3f}"
        axes.plot(steps, losses, label=label, markersize=5, **_style(contestant, found))
    _limit(axes, [loss for curve in curves.values() for _, loss in curve])
    axes.set_xlabel("steps")
    axes.set_ylabel(LOSS)
    _legend(axes)
    return figure


def _style(contestant: Contestant, among: Mapping[Contestant, Any]) -> dict[str, Any]:
    """Ours warm and thick, the others cool; markers tell apart those that share a colour."""
    ours = contestant.method.startswith(OURS)
    alike = [one for one in among if one.method.startswith(OURS) == ours]
    number = alike.index(contestant)
    colours = WARM if ours else COOL
    return {
        "color": colours[number % len(colours)][0],
        "marker": MARKERS[number % len(MARKERS)][0],
        "linewidth": 2.4 if ours else 1.4,
    }


def _new(title: str, height: float = 5.4) -> tuple[Figure, Any]:
    figure = Figure(figsize=(10, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(title, loc="left")
    axes.grid(alpha=0.25)
    return figure, axes


def _limit(axes: Any, losses: list[float]) -> None:
    """From the lowest loss to twice its distance from the median: one bad rate would flatten all curves."""
    if losses:
        ordered = sorted(losses)
        low, middle = ordered[0], ordered[len(ordered) // 2]
        reach = min(ordered[-1] - low, 3 * max(middle - low, 0.02))
        axes.set_ylim(low - 0.06 * reach, low + 1.06 * reach)


def _legend(axes: Any) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, handlelength=3)
