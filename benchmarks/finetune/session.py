"""One session: runs that the plan wants are begun as long as they fit into the time that is left."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from study.pool import Pool
from study.session import Sessions, worker_environments

from finetune.material import check_material, fingerprint
from finetune.plan import Key, Run, wanted
from finetune.profiles import Profile
from finetune.rows import Rows
from finetune.training import make_trainer, prepare_tokens
from lorapre.lab.preparation import record_data

PACKAGES = ("peft", "trl", "datasets", "math-verify")


class Session(Sessions[Run]):
    """A session of the fine-tuning tables.

    Args:
        profile: what to train.
        rows: what has been trained; grows.
        stages: to be made, the most urgent first.
        deadline: of `time.monotonic`, when running runs are stopped.
        only: of these stages, only the runs whose name (`str` of a `Run`) it is found in.
        first: these runs, by their names too, are begun before all others, whatever the stage.
    """

    def __init__(
        self,
        profile: Profile,
        rows: Rows,
        stages: Sequence[str],
        deadline: float,
        only: re.Pattern[str] | None = None,
        first: re.Pattern[str] | None = None,
    ) -> None:
        rows.check_protocol(profile.protocol)
        super().__init__(rows, deadline, only, PACKAGES)
        self._profile, self._losses, self._stages, self._first = profile, rows, stages, first

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
        with Pool(worker_environments(jobs_per_device), partial(make_trainer, material, self._profile)) as pool:
            prepare_tokens(material, self._profile)  # meanwhile the processes import what they need
            self._work_off(pool)

    def _planned(self, running: set[Key], failed: set[Key]) -> list[Run]:
        runs = wanted(self._profile, self._losses.losses, running, failed, self._stages)
        first = self._first
        return runs if first is None else sorted(runs, key=lambda run: first.search(str(run)) is None)

    def _fits_beside(self, run: Run, running: Sequence[Run]) -> bool:
        """A run whose speed counts has the machine for itself."""
        return not running or not any(each.kind == "speed" for each in (run, *running))

    def _said(self, row: dict[str, Any]) -> str:
        said = "diverged" if row["loss"] is None else f"loss {row['loss']:.4f}"
        if "correct" in row:
            said += f", {row['correct']} of {row['asked']} right"
        return f"{said} ({row['prepared']} + {row['trained']} + {row['tested']} s)"

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
