"""Static figures of a comparison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox, TransformedBbox

from lorapre.lab.compare.drawing import GREY, add_legend, house_style, wrapped, write_subtitle
from lorapre.lab.compare.facts import (
    RateLine,
    curve_range,
    curves,
    label,
    pareto_front,
    rate_lines,
    rates_range,
    robust_range,
    state_points,
    time_is_estimated,
)
from lorapre.lab.compare.momentum_figure import momentum_figure
from lorapre.lab.compare.results import Comparison
from lorapre.lab.compare.style import Style, styles
from lorapre.lab.run_folder import write_atomically
from lorapre.optim.summary import format_bytes

#: Marker of what lies above the range of an axis.
ABOVE = r"$\uparrow$"
#: Offsets of a label from its point, in points, and how it is aligned; the nearest that is free is taken.
_PLACES = [
    (dx * reach, dy * reach, "left" if dx > 0 else "right" if dx < 0 else "center", vertical)
    for reach in (7, 13, 20, 28, 38, 50)
    for dx, dy, vertical in (
        (1, 0, "center"), (-1, 0, "center"), (0, 1, "bottom"), (0, -1, "top"),
        (0.8, 0.8, "bottom"), (0.8, -0.8, "top"), (-0.8, 0.8, "bottom"), (-0.8, -0.8, "top"),
    )
]  # fmt: skip


def _new(title: str, xlabel: str, entries: int = 0) -> tuple[Figure, Any]:
    """A figure high enough for a legend of ``entries`` contestants, and its axes."""
    figure = Figure(figsize=(10, max(5.6, 0.29 * entries)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", pad=20)  # room for the subtitle
    axes.set_xlabel(xlabel)
    axes.set_ylabel("validation loss (nats a token)")
    axes.grid(alpha=0.25)
    return figure, axes


def _bigram(axes: Any, comparison: Comparison, limits: tuple[float, float]) -> None:
    if limits[0] <= comparison.bigram_loss <= limits[1]:
        text = f"bigram model ({comparison.bigram_loss:.3f})"
        axes.axhline(comparison.bigram_loss, color=GREY, linestyle=":", linewidth=1, label=text)


def _no_data(axes: Any, drawn: bool, text: str = "nothing to show") -> None:
    if not drawn:
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=GREY)


def loss_figure(comparison: Comparison, against: Literal["tokens", "time"]) -> Figure:
    """Validation loss at the chosen learning rates against tokens or training time.

    The line is the mean over the seeds, the band reaches from the smallest to the largest; a run that broke off is thin
    and ends in a cross. Where runs shared a device, time is steps x the step time that was measured alone.
    """
    drawn = curves(comparison)
    estimated = time_is_estimated(comparison)
    look = styles(comparison)
    title = f"Validation loss against {'tokens' if against == 'tokens' else 'training time'}"
    xlabel = "tokens (millions)"
    if against == "time":
        xlabel = "training time (seconds" + (", steps x measured step time)" if estimated else ")")
    with house_style():
        figure, axes = _new(title, xlabel, len(drawn))
        limits = curve_range([curve for curve in drawn if curve.mean])
        for curve in drawn:
            style = look[curve.row.contestant]
            x = tuple(tokens / 1e6 for tokens in curve.tokens) if against == "tokens" else curve.seconds
            if curve.mean and x:
                axes.fill_between(x, curve.low, curve.high, color=style.colour, alpha=0.15, linewidth=0)
                axes.plot(
                    x,
                    curve.mean,
                    color=style.colour,
                    linestyle=style.line,
                    linewidth=style.width,
                    marker=style.marker,
                    markersize=5,
                    markevery=(style.order, max(1, len(x) // 6)),
                    zorder=style.order,
                    label=wrapped(
                        f"{label(curve.row)}  {curve.mean[-1]:.3f}{'↑' if curve.mean[-1] > limits[1] else ''}"
                    ),
                )
            for run in curve.broken:
                points = [point for point in run.points if limits[0] <= point.loss <= limits[1]]
                if points and not (against == "time" and estimated):
                    bx = [point.tokens / 1e6 if against == "tokens" else point.seconds for point in points]
                    by = [point.loss for point in points]
                    axes.plot(bx, by, color=style.colour, linewidth=0.8, marker="x", markevery=[-1])
        _bigram(axes, comparison, limits)
        axes.set_ylim(*limits)
        axes.set_xlim(left=0)
        _no_data(axes, any(curve.mean for curve in drawn))
        if against == "time" and any(curve.mean for curve in drawn):
            _no_data(axes, any(curve.seconds for curve in drawn), "step times have not been measured yet")
        add_legend(figure, axes)
        write_subtitle(figure, axes, comparison.title)
    return figure


def _place_labels(
    figure: Figure,
    axes: Any,
    points: Sequence[tuple[float, float, str, Style]],
    front: Sequence[tuple[float, float]],
) -> None:
    """Write each label beside its point, where it covers no point, no other label and not the stairs of ``front``."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    frame = axes.get_window_extent(renderer)
    taken = []
    for x, y, _, _ in points:
        px, py = axes.transData.transform((x, y))
        taken.append(Bbox.from_extents(px - 7, py - 7, px + 7, py + 7))
    for (x0, y0), (x1, y1) in pairwise(axes.transData.transform(front) if front else ()):
        taken.append(Bbox.from_extents(x0, y0 - 2, x1, y0 + 2))
        taken.append(Bbox.from_extents(x1 - 2, y1, x1 + 2, y0))
    for x, y, text, style in points:
        boxes = []
        for dx, dy, horizontal, vertical in _PLACES:
            note = axes.annotate(
                text,
                (x, y),
                (dx, dy),
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                fontsize=8.5,
                color="#222222",
                fontweight="bold" if style.ours else "normal",
                arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.6}
                if abs(dx) + abs(dy) > 20
                else None,
            )
            note.update_positions(renderer)
            box = mpl.text.Text.get_window_extent(note, renderer).padded(1)  # of the text without its leader
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            overlap = sum(_overlap(box, other) for other in taken) + (0 if inside else 1e5)
            boxes.append((overlap, note, box))
            if overlap == 0:
                break
        best = min(boxes, key=lambda item: item[0])
        for item in boxes:
            if item is not best:
                item[1].remove()
        taken.append(best[2])


def _overlap(a: Any, b: Any) -> float:
    return float(max(0, min(a.x1, b.x1) - max(a.x0, b.x0)) * max(0, min(a.y1, b.y1) - max(a.y0, b.y0)))


def _log_axis(axes: Any, write: Any) -> None:
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 3e4 else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(write))
    axes.xaxis.set_minor_formatter(NullFormatter())


def state_figure(comparison: Comparison) -> Figure:
    """Final loss against bytes of state of the matrices, with the Pareto front; far outliers sit at the top edge."""
    points = state_points(comparison)
    look = styles(comparison)
    with house_style():
        figure, axes = _new("Final loss against optimizer state", "state of the matrices")
        _log_axis(axes, lambda value, _: format_bytes(round(value)).replace(".00", ""))
        low, high = robust_range((loss for _, _, loss in points), margin=0.12)
        axes.set_ylim(low, high)
        if points:
            axes.set_xlim(min(size for _, size, _ in points) / 1.35, max(size for _, size, _ in points) * 1.35)
        front = [points[i] for i in pareto_front([(size, loss) for _, size, loss in points])]
        axes.plot(
            [size for _, size, _ in front],
            [loss for _, _, loss in front],
            color=GREY,
            linewidth=1.2,
            drawstyle="steps-post",
            alpha=0.7,
            zorder=1,
            label="Pareto front: nothing has both less state and less loss",
        )
        places = []
        for row, size, loss in points:
            style = look[row.contestant]
            shown = min(loss, high - 0.03 * (high - low))
            axes.plot(
                [size],
                [shown],
                color=style.colour,
                marker=style.marker,
                markersize=9 if style.ours else 7,
                linestyle="none",
                zorder=style.order,
            )
            name = label(row) if shown == loss else f"{label(row)} ↑ {loss:.3f}"
            places.append((size, shown, wrapped(name, 26), style))
        _bigram(axes, comparison, (low, high))
        _no_data(axes, bool(points))
        handles, _ = axes.get_legend_handles_labels()
        figure.legend(handles=handles, loc="outside lower right", frameon=False, ncols=2)
        write_subtitle(figure, axes, comparison.title)
        _place_labels(figure, axes, places, [(size, loss) for _, size, loss in front])
    return figure


def _rates_key(lines: Sequence[RateLine], above: bool) -> list[Line2D]:
    """Legend entries that say what marks mean, of the marks that are drawn."""
    entries: list[tuple[str, dict[str, Any]]] = []
    for full, what in ((True, "full length"), (False, "search")):
        lengths = sorted({line.tokens for line in lines if line.full == full and line.losses})
        if lengths:
            look = {"linewidth": 2 if full else 1, "markerfacecolor": GREY if full else "white"}
            written = ", ".join(f"{tokens / 1e6:.3g}" for tokens in lengths)
            entries.append((f"{what}: {written} M tokens", {"marker": "o", "markersize": 5, "linestyle": "-", **look}))
    if any(line.chosen for line in lines):
        entries.append(("chosen", {"marker": "o", "markersize": 12, "markerfacecolor": "none"}))
    if above:
        entries.append(("above the range", {"marker": ABOVE, "markersize": 8}))
    if any(line.broken for line in lines):
        entries.append(("broke off", {"marker": "x", "markersize": 7}))
    return [Line2D([], [], **{"color": GREY, "linestyle": "none", **look}, label=name) for name, look in entries]


def rates_figure(comparison: Comparison) -> Figure:
    """Final loss against learning rate, for each contestant a line for each length of run.

    Filled marks are of full length, hollow ones on a thin line of the search; ringed: chosen. What lies above the range
    or broke off has an arrow or a cross above it, bold for a run of full length.
    """
    look = styles(comparison)
    lines = rate_lines(comparison)
    low, high = rates_range(lines)
    step = 0.035 * (high - low)
    stacked: Counter[str] = Counter()
    above = any(loss > high for line in lines for _, loss in line.losses)
    shown = [row for row in comparison.rows if any(line.row is row for line in lines)]
    with house_style():
        key = _rates_key(lines, above)
        title = "Final loss against learning rate"
        figure, axes = _new(title, "peak learning rate of the matrices", len(shown) + len(key))
        below = TransformedBbox(Bbox([[0, low], [1, high]]), axes.get_yaxis_transform())  # arrows stand above it
        for line in lines:
            style = look[line.row.contestant]
            point: dict[str, Any] = {"color": style.colour, "zorder": style.order, "linestyle": "none"}
            heavy = 1.8 if line.full else 0.9
            if line.losses:
                face = style.colour if line.full else "white"
                width = style.width * (1 if line.full else 0.6)
                drawn = {**point, "linestyle": style.line, "linewidth": width, "marker": style.marker, "markersize": 5}
                (curve,) = axes.plot(*zip(*line.losses, strict=True), **drawn, markerfacecolor=face)
                curve.set_clip_box(below)
            marks = [(lr, ABOVE if loss > high else "") for lr, loss in line.losses] + [(lr, "x") for lr in line.broken]
            for lr, mark in marks:
                place = f"{lr:.2g}"  # rates that a grid has grown to differ in their last bits
                stacked[place] += bool(mark)
                height = high + stacked[place] * step
                if mark:
                    axes.plot(lr, height, marker=mark, markersize=7, markeredgewidth=heavy, **point)
                if line.chosen and lr == line.chosen[0]:
                    y = height if mark else line.chosen[1]
                    axes.plot(lr, y, marker="o", markersize=12, markerfacecolor="none", **point)
        if any(stacked.values()):
            axes.axhline(high, color=GREY, linewidth=0.6)
        _bigram(axes, comparison, (low, high))
        _log_axis(axes, lambda value, _: f"{value:.0e}".replace("e-0", "e-"))
        axes.set_ylim(low, high)
        axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= high])  # the marks above have no loss
        axes.set_ylim(low, high + (max(stacked.values(), default=-1) + 1) * step)
        _no_data(axes, bool(lines))
        names = []
        for row in shown:
            style = look[row.contestant]
            as_drawn = {"linestyle": style.line, "linewidth": style.width, "marker": style.marker, "markersize": 5}
            names.append(Line2D([], [], color=style.colour, **as_drawn, label=wrapped(label(row))))
        add_legend(figure, axes, [*names, *key])
        write_subtitle(figure, axes, comparison.title)
    return figure


def all_figures(comparison: Comparison) -> Mapping[str, Figure]:
    """The figures by file name; that of the momentum only where it was measured."""
    measured = {"diagnostics.png": momentum_figure(comparison)} if comparison.momentum else {}
    return {
        "loss-tokens.png": loss_figure(comparison, "tokens"),
        "loss-time.png": loss_figure(comparison, "time"),
        "loss-state.png": state_figure(comparison),
        "learning-rates.png": rates_figure(comparison),
        **measured,
    }


def write_figures(comparison: Comparison, folder: Path) -> list[Path]:
    """Draw the figures into ``folder``, each atomically; returns their paths."""
    paths = []
    for name, figure in all_figures(comparison).items():

        def write(path: Path, figure: Figure = figure) -> None:
            figure.savefig(path, dpi=144)

        write_atomically(folder / name, write)
        paths.append(folder / name)
    return paths
