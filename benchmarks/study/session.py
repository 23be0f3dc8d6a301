"""One session: runs that the plan wants are begun as long as they fit into the time that is left."""

from __future__ import annotations

import math
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from statistics import median

from lorapre.lab.compare.pool import slots
from lorapre.lab.models import resolve_model
from lorapre.lab.preparation import record_provenance
from lorapre.lab.provenance import provenance
from study.plan import Key, Run, wanted
from study.pool import Ending, Pool
from study.profiles import Profile
from study.rows import Rows
from study.training import load, make_trainer

#: Runs of one training that may be lost to a dead process or for want of memory before it is given up.
MOST_LOSSES = 2


class Session:
    """What this session knows besides the rows.

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
        self._profile, self._rows, self._stages, self._deadline = profile, rows, stages, deadline
        self._only = only
        self._failures: Counter[Key] = Counter()

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

    def _failed(self) -> set[Key]:
        return {key for key, count in self._failures.items() if count >= MOST_LOSSES}

    def _wanted(self, running: Sequence[Run] = ()) -> list[Run]:
        keys = {run.key for run in running}
        runs = wanted(self._profile, self._rows.losses, keys, self._failed(), self._stages)
        return [run for run in runs if self._only is None or self._only.search(str(run))]

    def _begin_what_fits(self, pool: Pool) -> None:
        for run in self._wanted(pool.running):
            if not pool.idle:
                return
            if time.monotonic() + self.estimate(run) < self._deadline:
                pool.begin(run)

    def _record(self, ending: Ending) -> None:
        run, row = ending.run, ending.row
        name = str(run)
        if row is None:
            self._failures[run.key] += 1 if ending.lost else MOST_LOSSES
            say(f"{name}: FAILED, {ending.error}")
            return
        origin = _origin()
        self._rows.add(row | {name: origin[name] for name in ("date", "hardware", "versions")})
        said = "diverged" if row["loss"] is None else f"{row['loss']:.4f}"
        say(f"{name}: {said} ({row['seconds']} s, {row['prepared']} s before)")

    def _say_what_is_left(self) -> None:
        left, failed = self._wanted(), self._failed()
        if left:
            say(f"{len(left)} runs that are wanted were not made; go on with the same command.")
        if failed:
            say(f"{len(failed)} runs failed; the same command tries them again.")

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
def _origin() -> dict[str, object]:
    return provenance(seed=0)


def say(message: str) -> None:
    """Print at once, with the time, for a log."""
    print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)
