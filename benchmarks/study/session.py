"""One session: runs that the plan wants are begun as long as they fit into the time that is left."""

from __future__ import annotations

import math
import os
import re
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any, Generic, Protocol, TypeVar

from lorapre.lab.compare.pool import slots
from lorapre.lab.models import resolve_model
from lorapre.lab.preparation import record_provenance
from lorapre.lab.provenance import provenance
from study.plan import Key, Run, wanted
from study.pool import Ending, Pool
from study.profiles import Profile
from study.rows import RowFile, Rows
from study.training import load, make_trainer

#: Runs of one training that may be lost to a dead process or for want of memory before it is given up.
MOST_LOSSES = 2


class Wanted(Protocol):
    """A run of any table."""

    @property
    def key(self) -> Any: ...

    @property
    def model(self) -> str: ...


_Run = TypeVar("_Run", bound=Wanted)


class Sessions(ABC, Generic[_Run]):
    """One session of any table: what it knows besides the rows.

    Args:
        rows: what has been trained; grows.
        deadline: of `time.monotonic`, when running runs are stopped.
        only: of what is wanted, only the runs whose name (`str` of a run) it is found in.
        packages: whose versions a row says, besides the usual ones.
    """

    def __init__(
        self, rows: RowFile[Any], deadline: float, only: re.Pattern[str] | None, packages: tuple[str, ...] = ()
    ) -> None:
        self._rows, self._deadline, self._only, self._packages = rows, deadline, only, packages
        self._failures: Counter[Any] = Counter()

    @abstractmethod
    def _planned(self, running: set[Any], failed: set[Any]) -> list[_Run]:
        """Runs that the plan wants, the most urgent first, without those whose keys are ``running`` or ``failed``."""

    @abstractmethod
    def estimate(self, run: _Run) -> float:
        """Seconds that ``run`` should take."""

    @abstractmethod
    def _said(self, row: dict[str, Any]) -> str:
        """What is printed of a run that was made."""

    def _fits_beside(self, run: _Run, running: Sequence[_Run]) -> bool:
        """Whether ``run`` may share the machine with those that are ``running``."""
        return True

    def _work_off(self, pool: Pool) -> None:
        """Make what is wanted until nothing is or the deadline has come."""
        while True:
            self._begin_what_fits(pool)
            if not pool.running:
                break
            left = self._deadline - time.monotonic()
            if left <= 0:
                say(f"The time is over: {len(pool.running)} unfinished runs are stopped.")
                break
            for ending in pool.ended(None if left == math.inf else left):
                self._record(ending)
        self._say_what_is_left()

    def _failed(self) -> set[Any]:
        return {key for key, count in self._failures.items() if count >= MOST_LOSSES}

    def wanted(self, running: Sequence[_Run] = ()) -> list[_Run]:
        """Runs of this session that are to be begun, the most urgent first."""
        runs = self._planned({run.key for run in running}, self._failed())
        return [run for run in runs if self._only is None or self._only.search(str(run))]

    def _begin_what_fits(self, pool: Pool) -> None:
        for run in self.wanted(pool.running):
            if not pool.idle or not self._fits_beside(run, pool.running):
                return
            if time.monotonic() + self.estimate(run) < self._deadline:
                pool.begin(run)

    def _record(self, ending: Ending) -> None:
        run, row = ending.run, ending.row
        if row is None:
            self._failures[run.key] += 1 if ending.lost else MOST_LOSSES
            say(f"{run}: FAILED, {ending.error}")
            return
        origin = _origin(self._packages)
        self._rows.add(row | {name: origin[name] for name in ("date", "hardware", "versions")})
        say(f"{run}: {self._said(row)}")

    def _say_what_is_left(self) -> None:
        left, failed = self.wanted(), self._failed()
        if left:
            say(f"{len(left)} runs that are wanted were not made; go on with the same command.")
        if failed:
            say(f"{len(failed)} runs failed; the same command tries them again.")


class Session(Sessions[Run]):
    """A session of the study.

    Args:
        profile: what to train.
        rows: what has been trained; grows.
        stages: to be made, the most urgent first.
        deadline: of `time.monotonic`, when running runs are stopped.
        only: of these stages, only the runs whose name (`str` of a `Run`) it is found in.
    """

    def __init__(
        self,
        profile: Profile,
        rows: Rows,
        stages: Sequence[str],
        deadline: float,
        only: re.Pattern[str] | None = None,
    ) -> None:
        rows.check_protocol(profile.protocol)
        super().__init__(rows, deadline, only)
        self._profile, self._losses, self._stages = profile, rows, stages

    def make_runs(self, corpus: Path, jobs_per_device: int | None) -> None:
        """Make what is wanted, in processes of their own, until nothing is or the deadline has come."""
        environments = worker_environments(jobs_per_device)
        with Pool(environments, partial(make_trainer, corpus, self._profile)) as pool:
            folder = self._rows.path.parent
            folder.mkdir(parents=True, exist_ok=True)
            # Meanwhile the processes import what they need; they find the encoded text in the cache.
            record_provenance(
                folder / "provenance.json", load(corpus, self._profile), seed=0, option=f"--work {folder}"
            )
            self._work_off(pool)

    def _planned(self, running: set[Key], failed: set[Key]) -> list[Run]:
        return wanted(self._profile, self._losses.losses, running, failed, self._stages)

    def _said(self, row: dict[str, Any]) -> str:
        said = "diverged" if row["loss"] is None else f"{row['loss']:.4f}"
        return f"{said} ({row['seconds']} s, {row['prepared']} s before)"

    def estimate(self, run: Run) -> float:
        """Seconds that ``run`` should take: as its optimizer's last run on the model, or else as all runs on it.

        Where the model was never run, as the optimizer's runs on others, or else all runs, by the operations of both
        models; 0 where no run was.
        """
        rows = [row for row in self._rows.all if row["loss"] is not None]
        same = [row for row in rows if row["contestant"] == run.contestant]
        known = [row for row in same if row["model"] == run.model][-1:]
        known = known or [row for row in rows if row["model"] == run.model] or same or rows
        pace = [row["seconds"] / row["tokens"] * operations(run.model) / operations(row["model"]) for row in known]
        return run.tokens * median(pace) if pace else 0.0


@cache
def operations(model: str) -> int:
    """Weights that multiply each token: all but the input embedding."""
    spec = resolve_model(model)
    weights = sum(param.numel() for param in spec.build(0, device="meta").parameters())
    return weights - (0 if spec.config.tie_word_embeddings else int(spec.config.vocab_size * spec.config.hidden_size))


def worker_environments(jobs_per_device: int | None) -> list[dict[str, str]]:
    """Variables of each worker: the one GPU that it sees, and its share of the cores.

    ``jobs_per_device`` None is 3 on GPUs, whose small models leave room beside each other, and 1 on the CPU.
    """
    places = slots(jobs_per_device or 1)
    if jobs_per_device is None and places[0].gpu is not None:
        places = slots(3)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    threads = str(max(1, (os.cpu_count() or 1) // len(places)))
    shares = {name: threads for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS") if name not in os.environ}
    return [
        shares
        if place.gpu is None
        else shares | {"CUDA_VISIBLE_DEVICES": visible[place.gpu].strip() if visible[0] else str(place.gpu)}
        for place in places
    ]


@cache
def _origin(packages: tuple[str, ...]) -> dict[str, object]:
    return provenance(*packages, seed=0)


def say(message: str) -> None:
    """Print at once, with the time, for a log."""
    print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)
