"""Which runs the study needs, given those that it has. Pure: a restart plans the same from the rows on the disk."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from study.profiles import Profile

#: Rates of one contestant, after which its grid grows no more.
MOST_RATES = 8

#: In the order of their urgency, unless the command line says another. "half" is half of the best rate, for the runs of
#: "long"; "larger-seeds" follow the searches on larger models.
STAGES = ("rates", "seeds", "larger", "larger-seeds", "long", "half")


class Key(NamedTuple):
    """What makes two runs the same training, whichever stage asked for them."""

    model: str
    tokens: int
    contestant: str
    lr: float
    seed: int


@dataclass(frozen=True)
class Run:
    """One training."""

    stage: str
    model: str
    tokens: int
    contestant: str
    lr: float
    seed: int

    def __str__(self) -> str:
        millions = f"{self.tokens / 1e6:g}m"
        return f"{self.stage} {self.model} {millions} {self.contestant} lr {self.lr:g} seed {self.seed}"

    @property
    def key(self) -> Key:
        """The training, without the stage."""
        return Key(self.model, self.tokens, self.contestant, rounded(self.lr), self.seed)


#: Final loss by training; infinite where it diverged.
Losses = Mapping[Key, float]


@dataclass(frozen=True)
class Search:
    """How far the search for one contestant's rate has come.

    Attributes:
        rates: all that it consists of so far, ascending, made or not.
        complete: it asks for nothing any more.
        best: the rate with the lowest loss; None before it is complete, and where every rate failed or diverged.
    """

    rates: tuple[float, ...]
    complete: bool
    best: float | None


def rounded(lr: float) -> float:
    """``lr`` as it is told apart from others: a grid that doubles and halves differs in the last bits."""
    return float(f"{lr:.6g}")


def search(
    profile: Profile,
    contestant: str,
    losses: Losses,
    failed: Collection[Key] = (),
    *,
    model: str | None = None,
    first: Sequence[float] | None = None,
) -> Search:
    """The state of a contestant's search; a rate that ``failed`` has no loss, is not made, and ends the grid there.

    Where all rates diverged they were too high: the grid grows downwards. ``model`` and the ``first`` rates are the
    profile's unless they are given.
    """

    def key(rate: float) -> Key:
        return Key(model or profile.model, profile.tokens, contestant, rate, profile.seeds[0])

    first = profile.rates[contestant] if first is None else first
    rates = {rounded(rate) for rate in first}
    rates |= {known.lr for known in losses if known == key(known.lr)}
    while True:
        tried = {rate: losses[key(rate)] for rate in sorted(rates) if key(rate) in losses}
        if any(rate not in tried and key(rate) not in failed for rate in rates):
            return Search(tuple(sorted(rates)), False, None)
        best = min(tried, key=lambda rate: tried[rate], default=None)
        finite = best is not None and tried[best] < math.inf
        if best is None or len(rates) >= MOST_RATES:
            beyond = None
        elif finite and best == max(rates) > min(rates):  # of one rate alone, as on a wider model, downwards first
            beyond = 2 * best
        elif best == min(rates):  # of equal losses, infinite ones too, the lowest rate's is the best
            beyond = best / 2
        else:
            beyond = None
        if beyond is None:
            return Search(tuple(sorted(rates)), True, best if finite else None)
        rates.add(rounded(beyond))


def wanted(
    profile: Profile,
    losses: Losses,
    running: Collection[Key] = (),
    failed: Collection[Key] = (),
    stages: Sequence[str] = STAGES,
) -> list[Run]:
    """Runs that are to be begun, the most urgent first.

    Args:
        profile: what to train.
        losses: of all finished runs.
        running: not to be begun again; they have no loss yet.
        failed: given up.
        stages: to be made, in the order of their urgency. What follows a search waits for that contestant's search
            alone, so that no machine stands idle.
    """
    runs: list[Run] = []
    best: dict[str, float] = {}
    behind: dict[Key, int] = {}  # of runs that are less urgent than others of their stage
    first = profile.seeds[0]
    for contestant in profile.rates:
        found = search(profile, contestant, losses, failed)
        runs += [Run("rates", profile.model, profile.tokens, contestant, rate, first) for rate in found.rates]
        if found.best is not None:
            best[contestant] = found.best
    for seed in profile.seeds[1:]:
        for contestant in profile.finalists:
            if contestant in best:
                runs.append(Run("seeds", profile.model, profile.tokens, contestant, best[contestant], seed))
    for model in profile.larger:
        for contestant in profile.confirmed:
            if contestant not in best:
                continue
            start = profile.starts.get((model, contestant), (best[contestant],))
            found = search(profile, contestant, losses, failed, model=model, first=start)
            here = [Run("larger", model, profile.tokens, contestant, rate, first) for rate in found.rates]
            runs += here
            # A second rate waits for the first of every other contestant.
            behind |= dict.fromkeys((run.key for run in here), sum(run.key in losses for run in here))
            if found.best is not None and contestant in profile.repeated:
                for seed in profile.seeds[1:]:
                    runs.append(Run("larger-seeds", model, profile.tokens, contestant, found.best, seed))
    for stage, share in (("long", 1.0), ("half", 0.5)):
        for contestant in profile.long:
            if contestant in best:
                lr = rounded(best[contestant] * share)
                runs.append(Run(stage, profile.model, profile.long_tokens, contestant, lr, first))
    unmade: dict[Key, Run] = {}
    for run in runs:
        if run.stage in stages and run.key not in losses and run.key not in running and run.key not in failed:
            unmade.setdefault(run.key, run)
    return sorted(unmade.values(), key=lambda run: (stages.index(run.stage), behind.get(run.key, 0)))
