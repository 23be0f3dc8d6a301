"""From runs to rows: means over seeds, measured costs, tokens to AdamW's loss."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence

from lorapre.lab.callbacks import perplexity
from lorapre.lab.compare.contestants import Contestant
from lorapre.lab.compare.plan import Choice, Job, Planner
from lorapre.lab.compare.results import Row, Status
from lorapre.lab.compare.runs import Outcome, losses_of
from lorapre.lab.optimizers import OPTIMIZERS

#: The one whose final loss the others are timed to.
REFERENCE = "adamw"


def build_rows(
    contestants: Sequence[Contestant],
    planners: Mapping[str, Planner],
    outcomes: Mapping[Job, Outcome],
    timings: Mapping[Job, Outcome],
) -> tuple[Row, ...]:
    """One row a contestant, the best first, those without a loss last.

    Args:
        contestants: in the order of the command line.
        planners: by contestant's key.
        outcomes: all runs that have ended.
        timings: short runs with a device to themselves, made where ``outcomes`` shared theirs.
    """
    losses = losses_of(outcomes)
    choices = {c.key: planners[c.key].choice(losses) for c in contestants}
    chosen = {c.key: _chosen_runs(planners[c.key], choices[c.key], outcomes) for c in contestants}
    reference = _mean([outcome.loss for outcome in _finished(chosen.get(REFERENCE, ()))])
    rows = [_row(c, choices[c.key], chosen[c.key], outcomes, timings, reference) for c in contestants]
    return tuple(sorted(rows, key=lambda row: (row.loss is None, row.loss or 0.0)))


def _chosen_runs(planner: Planner, choice: Choice, outcomes: Mapping[Job, Outcome]) -> list[Outcome]:
    """The runs of full length at the chosen rate that have ended, in the order of the seeds."""
    if choice.lr is None:
        return []
    jobs = (Job(planner.contestant, choice.lr, seed, planner.steps) for seed in planner.seeds)
    return [outcomes[job] for job in jobs if job in outcomes]


def _finished(ended: Sequence[Outcome]) -> list[Outcome]:
    return [outcome for outcome in ended if outcome.status == "finished"]


def _row(
    contestant: Contestant,
    choice: Choice,
    ended: Sequence[Outcome],
    outcomes: Mapping[Job, Outcome],
    timings: Mapping[Job, Outcome],
    reference: float | None,
) -> Row:
    entry = OPTIMIZERS[contestant.optimizer]
    runs = _finished(ended)
    losses = [outcome.loss for outcome in runs if outcome.loss is not None]
    loss = _mean(losses)
    status, reason = _status(contestant.key, ended, outcomes)
    # Where several runs shared a device, their times say more about each other than about the optimizer.
    alone = [outcome for outcome in runs if not outcome.shared_device]
    alone = alone or [timing for job, timing in timings.items() if job.contestant == contestant.key and timing.summary]
    train_ms = _mean([outcome.summary["training_ms"] for outcome in alone])
    first = runs[0].summary if runs else {}
    return Row(
        contestant=contestant.key,
        optimizer=contestant.optimizer,
        title=contestant.title(entry),
        rank=contestant.rank,
        status=status,
        lr=choice.lr,
        lr_losses=choice.losses,
        lr_at_edge=choice.at_edge,
        seeds=tuple(outcome.job.seed for outcome in runs),
        loss=loss,
        loss_spread=max(losses) - min(losses) if len(losses) > 1 else None,
        best_loss=_mean([outcome.summary["best_valid_loss"] for outcome in runs]),
        perplexity=None if loss is None else perplexity(loss),
        state_bytes=first.get("state_bytes"),
        matrix_state_bytes=first.get("matrix_state_bytes"),
        formula_bytes=first.get("formula_bytes"),
        peak_bytes=max((outcome.summary["peak_bytes"] for outcome in alone), default=None),
        step_ms=_mean([outcome.summary["optimizer_ms"] for outcome in alone]),
        train_ms=train_ms,
        tokens_per_s=None if train_ms is None else alone[0].tokens_per_step / train_ms * 1e3,
        tokens_to_adamw=tokens_to_reach(reference, mean_curve(runs)),
        limitations=entry.limitations,
        reason=reason,
    )


def _status(key: str, ended: Sequence[Outcome], outcomes: Mapping[Job, Outcome]) -> tuple[Status, str]:
    if _finished(ended):
        # The mean is over the seeds that finished: that others broke off is half of the result.
        short = [outcome for outcome in ended if outcome.status != "finished"]
        return "finished", "; ".join(f"seed {run.job.seed} {run.status}: {run.reason}" for run in short)
    broken = [outcome for job, outcome in outcomes.items() if job.contestant == key and outcome.status != "finished"]
    if not broken:
        return "missing", "no run of full length has been made yet"
    failed = [outcome for outcome in broken if outcome.status == "failed"]
    shown = (failed or broken)[0]
    return shown.status, shown.reason


def _mean(values: Sequence[float | None]) -> float | None:
    """None where there is nothing, or not everything, to average."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def mean_curve(runs: Sequence[Outcome]) -> list[tuple[int, float]]:
    """Tokens and validation loss, averaged over the seeds, at the steps that all of them have."""
    curves = [{point.tokens: point.loss for point in outcome.to_run().points} for outcome in runs]
    if not curves:
        return []
    common = sorted(set.intersection(*(set(curve) for curve in curves)))
    return [(tokens, statistics.fmean(curve[tokens] for curve in curves)) for tokens in common]


def tokens_to_reach(loss: float | None, curve: Sequence[tuple[int, float]]) -> int | None:
    """Tokens after which ``curve`` is first at or below ``loss``, linear between its points; None if never."""
    if loss is None or not curve:
        return None
    if curve[0][1] <= loss:
        return curve[0][0]
    for (before, above), (after, below) in itertools.pairwise(curve):
        if below <= loss:
            return round(before + (after - before) * (above - loss) / (above - below))
    return None
