"""Which runs the tables need, given those that there are. Pure: a restart plans the same from the rows on the disk."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from study.plan import rounded

from finetune.profiles import Contestant, Profile

#: Rates of one contestant, after which its grid grows no more.
MOST_RATES = 8
#: In the order of their urgency, unless the command line says another. "speed" runs have the machine for themselves.
STAGES = ("search", "seeds", "ranks", "speed")


class Key(NamedTuple):
    """What makes two runs the same. ``kind`` is "search" (held-out loss alone), "test" (answers too) or "speed"."""

    kind: str
    contestant: str
    lr: float
    seed: int


@dataclass(frozen=True)
class Run:
    """One training, and what follows it."""

    stage: str
    kind: str
    task: str
    contestant: str
    lr: float
    seed: int

    def __str__(self) -> str:
        kind = "" if self.kind == self.stage else f" {self.kind}"
        return f"{self.stage}{kind} {self.task} {self.contestant} lr {self.lr:g} seed {self.seed}"

    @property
    def key(self) -> Key:
        """The run, without the stage."""
        return Key(self.kind, self.contestant, rounded(self.lr), self.seed)

    @property
    def model(self) -> str:
        """What a process has to prepare, and keeps: the tokens of a seed."""
        return f"{self.task} {self.seed}"


#: Held-out loss by run; infinite where it diverged.
Losses = Mapping[Key, float]


@dataclass(frozen=True)
class Search:
    """How far the search for one contestant's rate has come.

    Attributes:
        rates: all that it consists of so far, ascending, made or not.
        complete: it asks for nothing any more.
        best: the rate with the lowest held-out loss; None before it is complete, and where every rate failed.
    """

    rates: tuple[float, ...]
    complete: bool
    best: float | None


def search(contestant: str, first: float, seed: int, losses: Losses, failed: Collection[Key] = ()) -> Search:
    """The state of a search that begins with the rate ``first``.

    The grid grows by factors of 2 beyond the best rate, until that has a neighbour on either side; downwards, where all
    diverged. A rate that ``failed`` has no loss, and ends the grid there.
    """

    def key(rate: float) -> Key:
        return Key("search", contestant, rate, seed)

    rates = {rounded(first)} | {known.lr for known in losses if known == key(known.lr)}
    while True:
        tried = {rate: losses[key(rate)] for rate in sorted(rates) if key(rate) in losses}
        if any(rate not in tried and key(rate) not in failed for rate in rates):
            return Search(tuple(sorted(rates)), False, None)
        best = min(tried, key=lambda rate: tried[rate], default=None)
        finite = best is not None and tried[best] < math.inf
        wanted = set()
        if best is not None:
            # Of equal losses, infinite ones too, the lowest rate's is the best.
            wanted = {rounded(best / 2), *([rounded(2 * best)] if finite else [])} - rates
        if not wanted or len(rates) >= MOST_RATES:
            return Search(tuple(sorted(rates)), True, best if finite else None)
        rates |= wanted


def searches(profile: Profile, losses: Losses, failed: Collection[Key] = ()) -> dict[Contestant, Search]:
    """Every contestant's search; a rank's begins when that of its base is complete and has a best rate."""
    seed = profile.seeds[0]
    found = {one: search(str(one), first, seed, losses, failed) for one, first in profile.rates.items()}
    for one, base in profile.ranks.items():
        first = found[base].best
        if first is not None:
            found[one] = search(str(one), first, seed, losses, failed)
    return found


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
        stages: to be made, in the order of their urgency. Tests wait for their own contestant's search alone, so that
            no machine stands idle.
    """
    found = searches(profile, losses, failed)
    runs: list[Run] = []
    first, tested = profile.seeds[0], profile.seeds[1:]

    def add(stage: str, kind: str, one: Contestant, lr: float, seed: int) -> None:
        runs.append(Run(stage, kind, profile.task.name, str(one), lr, seed))

    for one, state in found.items():
        for rate in state.rates:
            add("search" if one in profile.rates else "ranks", "search", one, rate, first)
    for seed in tested:
        for one, state in found.items():
            if state.best is not None:
                add("seeds" if one in profile.rates else "ranks", "test", one, state.best, seed)
    for one in profile.rates:
        best = found[one].best
        if best is not None:
            add("speed", "speed", one, best, first)
    unmade: dict[Key, Run] = {}
    for run in runs:
        if run.stage in stages and run.key not in losses and run.key not in running and run.key not in failed:
            unmade.setdefault(run.key, run)
    return sorted(unmade.values(), key=lambda run: stages.index(run.stage))


def forecast(profile: Profile, losses: Losses, stages: Sequence[str] = STAGES) -> list[Run]:
    """All runs that ``stages`` still need if the searches that have not ended find their first rate the best.

    That is the fewest: three rates a search. Stages that are left out are taken for made where another waits for them.
    """
    known = dict(losses)
    coming: list[Run] = []
    while runs := wanted(profile, known):
        for run in runs:
            known[run.key] = _imagined(run, known)
        coming += runs
    return [run for run in coming if run.stage in stages]


def _imagined(run: Run, known: Losses) -> float:
    """A loss that makes the first rate of a search the best, or leaves the best one where it is."""
    same = [loss for key, loss in known.items() if key[:2] == run.key[:2] and key.seed == run.seed and loss < math.inf]
    return max(same) + 1.0 if same else 0.0
