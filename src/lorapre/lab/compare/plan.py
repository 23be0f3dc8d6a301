"""Which runs a comparison needs, given those that it has. Pure: a restart plans the same from what lies on the disk."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

SearchName = Literal["grid", "halving", "quick"]

#: How often an automatic grid may grow beyond its lowest or highest rate.
MAX_EXTENSIONS = 3


@dataclass(frozen=True)
class Rung:
    """One round of the search: the ``keep`` best rates (None: all) go on to runs of ``share`` of the full length."""

    share: float
    keep: int | None


@dataclass(frozen=True)
class Search:
    """How learning rates are searched; the last rung is always of full length."""

    name: SearchName
    rungs: tuple[Rung, ...]
    description: str


SEARCHES: Mapping[SearchName, Search] = {
    search.name: search
    for search in (
        Search("grid", (Rung(1.0, None),), "every learning rate at full length"),
        Search(
            "halving",
            (Rung(0.25, None), Rung(1.0, 2)),
            "all learning rates at 1/4 length, the best two at full length, and neighbours while these are better",
        ),
        Search(
            "quick", (Rung(0.25, None), Rung(1.0, 1)), "all learning rates at 1/4 length, the best one at full length"
        ),
    )
}


@dataclass(frozen=True)
class Job:
    """One training run of a comparison, and its name on the disk."""

    contestant: str
    lr: float
    seed: int
    steps: int


@dataclass(frozen=True)
class Ask:
    """A job that can be run now. Lower ``urgency`` goes first: searches, then the seeds in order."""

    job: Job
    urgency: int


#: Final loss by job; None for a run that diverged or failed.
Losses = Mapping[Job, float | None]


@dataclass(frozen=True)
class Choice:
    """The outcome of a search.

    Attributes:
        lr: the best rate at full length; None if every rate was given up.
        losses: of each rate with the first seed, at the longest length that it reached.
        at_edge: the chosen rate is the lowest or highest of those tried, and there was more than one.
    """

    lr: float | None
    losses: tuple[tuple[float, float | None], ...]
    at_edge: bool


@dataclass(frozen=True)
class Planner:
    """The plan of one contestant.

    Attributes:
        contestant: its key.
        grid: learning rates to begin with, ascending.
        extend: let the grid grow by its own last step where the best rate is at its edge.
        seeds: the first one searches.
        steps: full length.
        search: how.
    """

    contestant: str
    grid: tuple[float, ...]
    extend: bool
    seeds: tuple[int, ...]
    steps: int
    search: Search

    def rung_steps(self, rung: Rung) -> int:
        """Steps of a run of this rung."""
        return max(1, round(rung.share * self.steps))

    def _job(self, lr: float, seed: int, steps: int) -> Job:
        return Job(self.contestant, lr, seed, steps)

    def _search(self, losses: Losses) -> list[Ask]:
        """What the search still asks for."""
        rates: list[float] = list(self.grid)
        for number, rung in enumerate(self.search.rungs):
            steps = self.rung_steps(rung)
            if rung.keep is not None:
                rates = rates[: rung.keep]
            extensions = 0
            while True:
                missing = [lr for lr in rates if self._job(lr, self.seeds[0], steps) not in losses]
                if missing:
                    return [Ask(self._job(lr, self.seeds[0], steps), number) for lr in missing]
                ranked = sorted(rates, key=lambda lr: _rank_key(losses[self._job(lr, self.seeds[0], steps)]))
                finished = [lr for lr in ranked if losses[self._job(lr, self.seeds[0], steps)] is not None]
                # Short runs misjudge the rates of long ones: from the best two on, full length decides anew.
                grows = (number == 0 or rung.keep != 1) and extensions < MAX_EXTENSIONS
                beyond = self._beyond(rates, finished) if grows else None
                if beyond is None:
                    break
                rates.append(beyond)
                extensions += 1
            rates = finished
        return []

    def _beyond(self, rates: Sequence[float], finished: Sequence[float]) -> float | None:
        """One more rate outside the grid where the best of it lies at its edge."""
        if not self.extend or len(self.grid) < 2 or not finished:
            return None
        factor = self.grid[1] / self.grid[0]
        if finished[0] == max(rates):
            return float(finished[0] * factor)
        if finished[0] == min(rates):
            return float(finished[0] / factor)
        return None

    def asks(self, losses: Losses) -> list[Ask]:
        """The jobs that can be run now, all of them; empty when the contestant is done."""
        asks = self._search(losses)
        # The rate that the table will show: an earlier session's, of another grid, may be better than all of this one.
        lr = self.choice(losses).lr
        if asks or lr is None:
            return asks
        last = len(self.search.rungs)
        jobs = [self._job(lr, seed, self.steps) for seed in self.seeds]
        return [Ask(job, last + number) for number, job in enumerate(jobs) if job not in losses]

    def choice(self, losses: Losses) -> Choice:
        """What the search has found so far."""
        reached: dict[float, tuple[int, float | None]] = {}
        for job, loss in losses.items():
            if job.contestant != self.contestant or job.seed != self.seeds[0]:
                continue
            if job.lr not in reached or reached[job.lr][0] < job.steps:
                reached[job.lr] = (job.steps, loss)
        # A rate that was best on the way but broke off at full length is not the choice.
        whole = {lr: loss for lr, (steps, loss) in reached.items() if steps == self.steps and loss is not None}
        best = min(whole, key=lambda lr: (whole[lr], lr), default=None)  # whatever the order in which they ended
        edge = best is not None and len(reached) > 1 and best in (min(reached), max(reached))
        return Choice(best, tuple((lr, reached[lr][1]) for lr in sorted(reached)), edge)

    def _lengths(self) -> list[int]:
        """Steps of each run, if the grid does not grow at its first length."""
        lengths, rates = [self.steps] * (len(self.seeds) - 1), len(self.grid)
        for rung in self.search.rungs:
            if rung.keep is not None:
                rates = min(rates, rung.keep) + (rung.keep > 1 and self.extend)  # one neighbour at least
            lengths += [self.rung_steps(rung)] * rates
        return lengths

    def total_steps(self) -> int:
        """Steps of all runs, if the grid does not grow: what a budget is compared with."""
        return sum(self._lengths())

    def total_runs(self) -> int:
        """Number of runs, if the grid does not grow."""
        return len(self._lengths())


def _rank_key(loss: float | None) -> float:
    return math.inf if loss is None else loss


def choose_search(
    planners: Sequence[Planner],
    seconds_per_step: Mapping[str, float],
    start_seconds: float,
    devices: int,
    budget: float,
) -> tuple[Search, float]:
    """The most thorough search whose estimate fits ``budget`` seconds, and its estimate; else the least thorough.

    Args:
        planners: of all contestants; their own ``search`` is ignored.
        seconds_per_step: measured, by contestant.
        start_seconds: what each run costs besides its steps.
        devices: runs at a time.
        budget: seconds.
    """
    estimate = math.inf
    for search in SEARCHES.values():
        trial = [dataclasses.replace(planner, search=search) for planner in planners]
        work = sum(p.total_steps() * seconds_per_step[p.contestant] + p.total_runs() * start_seconds for p in trial)
        estimate = work / devices
        if estimate <= budget:
            return search, estimate
    return search, estimate
