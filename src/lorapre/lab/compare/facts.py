"""What the figures and the page derive from a comparison: curves, the Pareto front, ranges, headlines in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, quantiles

from lorapre.lab.compare.results import Comparison, Point, Row, Run
from lorapre.optim.summary import format_bytes

#: Losses that differ by less are printed alike, so that no sentence calls one of them lower.
PRINTED = 0.0005


@dataclass(frozen=True)
class Curve:
    """Validation loss of one contestant at its chosen learning rate, over the seeds.

    Attributes:
        row: of the contestant.
        runs: finished runs, one a seed, in order of the seed.
        broken: runs at the same rate and length that did not finish.
        steps: at which every finished run was validated; the other sequences are as long.
        tokens: at those steps.
        seconds: of training until then, mean over the seeds; empty where the time is not known.
        mean: loss, mean over the seeds.
        low: loss, smallest over the seeds.
        high: loss, largest over the seeds.
    """

    row: Row
    runs: tuple[Run, ...]
    broken: tuple[Run, ...]
    steps: tuple[int, ...]
    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class RateLine:
    """Final losses of one contestant against learning rate, of runs of one length with the first seed.

    Attributes:
        row: of the contestant.
        tokens: length of the runs.
        full: whether that is full length; shorter runs belong to the search.
        losses: learning rate and final loss of each run that finished, ascending in the rate.
        broken: learning rates of the others, ascending.
        chosen: that of ``losses`` which was chosen; None where none of them was.
    """

    row: Row
    tokens: int
    full: bool
    losses: tuple[tuple[float, float], ...]
    broken: tuple[float, ...]
    chosen: tuple[float, float] | None


def label(row: Row) -> str:
    """Title and rank, as legends and sentences name a contestant."""
    return row.title if row.rank is None else f"{row.title} r={row.rank:g}"


def is_ours(row: Row) -> bool:
    """Whether it is one of this library's optimizers."""
    return row.optimizer.startswith("lorapre")


def adamw_row(comparison: Comparison) -> Row | None:
    """AdamW's row, if AdamW took part."""
    return next((row for row in comparison.rows if row.optimizer == "adamw"), None)


def full_length(comparison: Comparison) -> int:
    """Tokens of the longest runs that were planned; shorter ones belong to the search."""
    return max((run.tokens for run in comparison.runs), default=0)


def chosen_runs(comparison: Comparison, row: Row) -> tuple[Run, ...]:
    """Runs of ``row`` at its chosen learning rate and full length, one a seed, whole or broken."""
    length = full_length(comparison)
    by_seed = {
        run.seed: run
        for run in comparison.runs
        if run.contestant == row.contestant and run.lr == row.lr and run.tokens == length
    }
    return tuple(by_seed[seed] for seed in sorted(by_seed))


def short_rates(comparison: Comparison, row: Row) -> frozenset[float]:
    """Learning rates of ``row`` that have not come to full length: their losses belong to shorter runs."""
    if row.lr is None:  # no run of full length finished, though none of another contestant need be longer yet
        return frozenset(lr for lr, _ in row.lr_losses)
    length = full_length(comparison)
    reached: dict[float, int] = {}
    for run in comparison.runs:
        if run.contestant == row.contestant:
            reached[run.lr] = max(reached.get(run.lr, 0), run.tokens)
    return frozenset(lr for lr, tokens in reached.items() if tokens < length)


def rate_lines(comparison: Comparison) -> tuple[RateLine, ...]:
    """One line for each length of run of each row, in the order of the rows, the shorter first.

    Losses of different lengths never share a line: a longer run ends lower at any learning rate.
    """
    longest = full_length(comparison)
    seed = min((run.seed for run in comparison.runs), default=0)  # the first, which searches
    found = []
    for row in comparison.rows:
        mine = [run for run in comparison.runs if (run.contestant, run.seed) == (row.contestant, seed)]
        for tokens in sorted({run.tokens for run in mine}):
            ended = sorted({run.lr: run.loss for run in mine if run.tokens == tokens}.items())
            losses = tuple((lr, loss) for lr, loss in ended if loss is not None and math.isfinite(loss))
            # A row with a finished run of full length has a chosen rate; without one, the longest are not yet full.
            full = tokens == longest and (row.lr is not None or not losses)
            found.append(
                RateLine(
                    row=row,
                    tokens=tokens,
                    full=full,
                    losses=losses,
                    broken=tuple(lr for lr, loss in ended if loss is None or not math.isfinite(loss)),
                    chosen=next((pair for pair in losses if full and pair[0] == row.lr), None),
                )
            )
    return tuple(found)


def time_is_estimated(comparison: Comparison) -> bool:
    """Whether a run that is drawn shared its device, so that the time axis must be steps x measured step time."""
    return any(run.shared_device for row in comparison.rows for run in chosen_runs(comparison, row))


def point_seconds(point: Point, row: Row, estimated: bool) -> float | None:
    """Seconds of training until ``point``: its own or, if ``estimated``, steps x ``row.train_ms``."""
    if not estimated:
        return point.seconds
    return None if row.train_ms is None else point.step * row.train_ms / 1000


def curves(comparison: Comparison) -> tuple[Curve, ...]:
    """One curve for each row that has runs at its chosen rate, in the order of the rows."""
    estimated = time_is_estimated(comparison)
    found = []
    for row in comparison.rows:
        chosen = chosen_runs(comparison, row)
        if not chosen:
            continue
        whole = tuple(run for run in chosen if run.status == "finished" and run.points)
        broken = tuple(run for run in chosen if run.status != "finished")
        by_step = [{point.step: point for point in run.points} for run in whole]
        steps = sorted(set.intersection(*map(set, by_step))) if by_step else []
        columns = [[points[step] for points in by_step] for step in steps]
        times = [[point_seconds(point, row, estimated) for point in column] for column in columns]
        known = [[time for time in column if time is not None] for column in times]
        found.append(
            Curve(
                row=row,
                runs=whole,
                broken=broken,
                steps=tuple(steps),
                tokens=tuple(column[0].tokens for column in columns),
                seconds=tuple(fmean(column) for column in known) if all(known) else (),
                mean=tuple(fmean(point.loss for point in column) for column in columns),
                low=tuple(min(point.loss for point in column) for column in columns),
                high=tuple(max(point.loss for point in column) for column in columns),
            )
        )
    return tuple(found)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in one coordinate without losing in the other; ascending in the first.

    Smaller is better in both. Equal points are all kept.
    """

    def beaten(a: tuple[float, float]) -> bool:
        return any(b[0] <= a[0] and b[1] <= a[1] and b != a for b in points)

    return sorted((i for i, point in enumerate(points) if not beaten(point)), key=lambda i: points[i])


def state_points(comparison: Comparison) -> list[tuple[Row, int, float]]:
    """Rows with a loss and a measured state of the matrices, with both; 0 bytes have no place on a log axis."""
    return [
        (row, row.matrix_state_bytes, row.loss)
        for row in comparison.rows
        if row.loss is not None and math.isfinite(row.loss) and row.matrix_state_bytes
    ]


def robust_range(values: Iterable[float], margin: float = 0.06) -> tuple[float, float]:
    """Limits of an axis that shows ``values`` but for those far above the rest (Tukey's outer fence)."""
    finite = sorted(value for value in values if math.isfinite(value))
    if not finite:
        return 0.0, 1.0
    if len(finite) > 3:
        lower, _, upper = quantiles(finite, n=4, method="inclusive")
        fence = upper + 3 * max(upper - lower, 0.01)
        finite = [value for value in finite if value <= fence]
    pad = margin * max(finite[-1] - finite[0], 0.02)
    return finite[0] - pad, finite[-1] + pad


def curve_range(drawn: Sequence[Curve]) -> tuple[float, float]:
    """Limits of the loss axis of the curves: what comes after the steep first fifth of a run."""
    return robust_range(
        value
        for curve in drawn
        for tokens, low, high in zip(curve.tokens, curve.low, curve.high, strict=True)
        if tokens > 0.2 * curve.tokens[-1]
        for value in (low, high)
    )


def rates_range(lines: Iterable[RateLine]) -> tuple[float, float]:
    """Limits of the loss axis against learning rates: of each line its best rate and two to either side.

    Runs of full length and shorter ones each have their own fence, so that neither counts as far above the other.
    """
    near: dict[bool, list[float]] = {}
    for line in lines:
        losses = [loss for _, loss in line.losses]
        if losses:
            best = losses.index(min(losses))
            near.setdefault(line.full, []).extend(losses[max(0, best - 2) : best + 3])
    ranges = [robust_range(values) for values in near.values()]
    if not ranges:
        return robust_range(())
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    return low - 0.04 * (high - low), high  # room for the ring around the lowest


def loss_text(row: Row) -> str:
    """Mean final loss, with its spread where there are several seeds; the status of a row without one, in words."""
    if row.loss is None:
        return "not run yet" if row.status == "missing" else row.status
    return f"{row.loss:.3f}" + ("" if row.loss_spread is None else f" ± {row.loss_spread:.3f}")


def _spread(a: Row, b: Row) -> float | None:
    return None if a.loss_spread is None or b.loss_spread is None else max(a.loss_spread, b.loss_spread)


def _times(ratio: float, more: str, less: str, same: str) -> str:
    """``ratio`` in words; one within half a percent of 1 is neither more nor less."""
    if abs(ratio - 1) < 0.005:
        return same
    word, factor = (more, ratio) if ratio > 1 else (less, 1 / ratio)
    return f"{factor:.{2 if factor < 2 else 1 if factor < 20 else 0}f} x {word}"


def _tokens(count: int) -> str:
    return f"{count / 1e6:.3g} M tokens" if count >= 100_000 else f"{count:,} tokens"


def against(row: Row, reference: Row) -> str:
    """How ``row``'s loss compares with ``reference``'s, claiming no more than the spread over the seeds allows.

    A difference counts where it is larger than the larger of the two spreads.

    Raises:
        ValueError: one of the rows has no loss.
    """
    if row.loss is None or reference.loss is None:
        raise ValueError(f"{row.contestant} and {reference.contestant} cannot be compared: one has no loss.")
    difference = row.loss - reference.loss
    both = f"{row.loss:.3f} against {reference.loss:.3f}"
    who = f"{label(row)} ended"
    spread = _spread(row, reference)
    if abs(difference) < PRINTED:
        said = f"{who} level with {label(reference)} to three decimals ({both})"
    else:
        word = "above" if difference > 0 else "below"
        said = f"{who} {abs(difference):.3f} {word} {label(reference)} ({both})"
    if spread is None:
        return f"{said}; with a single seed this may be chance."
    if abs(difference) < PRINTED:
        return f"{said}."
    if abs(difference) <= spread:
        return f"{said}, within the spread over seeds ({spread:.3f}): no difference is shown."
    return f"{said}, more than the spread over seeds ({spread:.3f})."


def _costs(row: Row, reference: Row, full: bool) -> list[str]:
    name = label(reference)
    said = []
    for what, mine, theirs in (
        ("state of the matrices", row.matrix_state_bytes, reference.matrix_state_bytes),
        ("whole optimizer state", row.state_bytes, reference.state_bytes),
    ):
        if mine and theirs:
            ratio = _times(mine / theirs, "larger", "smaller", "the same")
            said.append(f"Its {what} is {format_bytes(mine)} against {format_bytes(theirs)} ({ratio}).")
    if not full:
        return said[:1]
    if row.step_ms and reference.step_ms:
        ratio = _times(row.step_ms / reference.step_ms, "longer", "shorter", "the same")
        said.append(f"Its optimizer step takes {row.step_ms:.3g} ms against {reference.step_ms:.3g} ms ({ratio}).")
    if row.tokens_per_s and reference.tokens_per_s:
        ratio = _times(row.tokens_per_s / reference.tokens_per_s, "faster", "slower", "the same")
        pace = f"{row.tokens_per_s:,.0f} against {reference.tokens_per_s:,.0f} tokens a second ({ratio})"
        said.append(f"It trains at {pace}.")
    if row.tokens_to_adamw is None:
        said.append(f"It did not reach {name}'s final loss.")
    else:
        said.append(f"It had reached {name}'s final loss after {_tokens(row.tokens_to_adamw)}.")
    return said


def _best(rows: Sequence[Row]) -> tuple[str, str]:
    best = rows[0]
    seeds = f"{len(best.seeds)} seeds" if len(best.seeds) > 1 else "1 seed"
    perplexity = "" if best.perplexity is None else f", perplexity {best.perplexity:.1f}"
    said = f"Lowest final loss: {label(best)}, {loss_text(best)} ({seeds}{perplexity})."
    if len(rows) == 1:
        return said, ""
    if best.loss_spread is None:
        return said, "With a single seed the order of close contestants may be chance."
    # A contestant with one seed has no spread of its own; the widest that was seen stands in for it.
    widest = max(row.loss_spread for row in rows if row.loss_spread is not None)
    ties = []
    for row in rows[1:]:
        spread = widest if row.loss_spread is None else max(best.loss_spread, row.loss_spread)
        if (row.loss or 0.0) - (best.loss or 0.0) <= max(spread, PRINTED):
            ties.append(label(row))
    return said, f"Not told apart from it by the spread over seeds: {'; '.join(ties)}." if ties else ""


def not_run_yet(comparison: Comparison) -> str:
    """A sentence that names the rows of which no run of full length has been made; empty where there are none."""
    waiting = [label(row) for row in comparison.rows if row.status == "missing"]
    return f"Not run yet: {'; '.join(waiting)}." if waiting else ""


def headline_parts(comparison: Comparison) -> list[tuple[str, str]]:
    """What the comparison found: the best, ours against AdamW, warnings; each a sentence and what there is to add."""
    ranked = sorted((row for row in comparison.rows if row.loss is not None), key=lambda row: row.loss or 0.0)
    waiting = not_run_yet(comparison)
    nothing = f"No contestant {'has finished yet' if waiting else 'finished'}, so there is nothing to compare."
    said = [_best(ranked)] if ranked else [(nothing, "")]
    ours = [row for row in ranked if is_ours(row)]
    adamw = adamw_row(comparison)
    if adamw is None or adamw.loss is None:
        if ours:
            said.append(("AdamW has no result here, so nothing is said about ours against it.", ""))
    else:
        for position, row in enumerate(ours):
            said.append((against(row, adamw), " ".join(_costs(row, adamw, full=position == 0))))
    worse = [label(row) for row in ranked if row.loss is not None and row.loss >= comparison.bigram_loss]
    if worse:
        said.append((f"Not below the bigram model's loss of {comparison.bigram_loss:.3f}: {'; '.join(worse)}.", ""))
    edges = [label(row) for row in ranked if row.lr_at_edge]
    if edges:
        warning = "The best learning rate is the lowest or highest tried, so that a better one may exist: "
        said.append((f"{warning}{'; '.join(edges)}.", ""))
    without = [row for row in comparison.rows if row.loss is None and row.status != "missing"]
    if without:
        said.append((f"Without a result: {'; '.join(f'{label(row)} ({row.status})' for row in without)}.", ""))
    if waiting:
        said.append((waiting, ""))
    return said


def headlines(comparison: Comparison) -> list[str]:
    """`headline_parts`, each in one string."""
    return [" ".join(filter(None, parts)) for parts in headline_parts(comparison)]
