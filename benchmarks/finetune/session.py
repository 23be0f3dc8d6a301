"""One session: runs that the plan wants are begun as long as they fit into the time that is left."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median

from study.pool import Ending, Pool
from study.session import MOST_LOSSES, say, worker_environments

from finetune.material import check_material, fingerprint
from finetune.plan import Key, Run, wanted
from finetune.profiles import Profile
from finetune.rows import Rows
from finetune.training import make_trainer, prepare_tokens
from lorapre.lab.preparation import record_data
from lorapre.lab.provenance import provenance

PACKAGES = ("peft", "trl", "datasets", "math-verify")


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

    def make_runs(self, material: Path, jobs_per_device: int | None) -> None:
        """Make what is wanted, in processes of their own, until nothing is or the deadline has come.

        Raises:
            ValueError: the material is incomplete.
            UserError: it is not what earlier runs were made of.
        """
        check_material(material, self._profile.task.files)
        folder = self._rows.path.parent
        facts = fingerprint(material, self._profile.task.files)
        folder.mkdir(parents=True, exist_ok=True)
        record_data(folder / "provenance.json", facts, *PACKAGES, seed=0, option=f"--work {folder}")
        self._origin = provenance(*PACKAGES, seed=0)
        with Pool(worker_environments(jobs_per_device), partial(make_trainer, material, self._profile)) as pool:
            prepare_tokens(material, self._profile)  # meanwhile the processes import what they need
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

    def wanted(self, running: Sequence[Run] = ()) -> list[Run]:
        """Runs of this session that are to be begun, the most urgent first."""
        keys = {run.key for run in running}
        runs = wanted(self._profile, self._rows.losses, keys, self._failed(), self._stages)
        return [run for run in runs if self._only is None or self._only.search(str(run))]

    def _begin_what_fits(self, pool: Pool) -> None:
        for run in self.wanted(pool.running):
            running = pool.running
            alone = run.kind == "speed" or any(other.kind == "speed" for other in running)
            if not pool.idle or (alone and running):
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
        self._rows.add(row | {name: self._origin[name] for name in ("date", "hardware", "versions")})
        said = "diverged" if row["loss"] is None else f"loss {row['loss']:.4f}"
        if "correct" in row:
            said += f", {row['correct']} of {row['asked']} right"
        say(f"{name}: {said} ({row['prepared']} + {row['trained']} + {row['tested']} s)")

    def _say_what_is_left(self) -> None:
        left, failed = self.wanted(), self._failed()
        if left:
            say(f"{len(left)} runs that are wanted were not made; go on with the same command.")
        if failed:
            say(f"{len(failed)} runs failed; the same command tries them again.")

    def estimate(self, run: Run) -> float:
        """Seconds that ``run`` should take.

        As its contestant's last run of this kind, or else its last training and the median test; of a contestant that
        never ran as the median of this kind, or of all. 0 where no run was.
        """
        rows = [row for row in self._rows.all if row["loss"] is not None]
        same = [row for row in rows if row["contestant"] == run.contestant]
        if known := [row["seconds"] for row in same if row["kind"] == run.kind]:
            return float(known[-1])
        kind = [row for row in rows if row["kind"] == run.kind]
        if same:
            tests = [row["tested"] for row in kind] if run.kind == "test" else []
            return float(same[-1]["seconds"] + (median(tests) if tests else 0.0))
        return float(median(row["seconds"] for row in kind or rows)) if rows else 0.0
