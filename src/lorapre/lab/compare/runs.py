"""The runs of a comparison on the disk: one folder each, found again after any interruption.

A folder holds ``job.json``, ``config.yaml``, ``metrics.jsonl``, ``log.txt``, and at its end either ``summary.json`` or
``failure.json``. One that has neither was interrupted and is made anew.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorapre.lab.compare.plan import Job
from lorapre.lab.compare.results import Point, Run, Status
from lorapre.lab.errors import UserError
from lorapre.lab.run_folder import RunFolder, write_json

_ANEW = "Remove its folder, and the command that made the comparison makes this run again."


@dataclass(frozen=True)
class Outcome:
    """What lies in the folder of a run that has ended."""

    job: Job
    status: Status
    reason: str
    summary: Mapping[str, Any]  # empty unless finished
    metrics: tuple[Mapping[str, Any], ...]
    tokens_per_step: int
    shared_device: bool

    @property
    def loss(self) -> float | None:
        """Final validation loss; None unless finished."""
        return float(self.summary["valid_loss"]) if self.status == "finished" else None

    def to_run(self) -> Run:
        """For reports. Seconds are those of steady steps, without start and compilation, where they were measured."""
        ms = self.summary.get("training_ms")
        points = tuple(
            Point(
                record["step"],
                record["tokens"],
                record["step"] * ms / 1e3 if ms else record["seconds"],
                record["valid_loss"],
            )
            for record in self.metrics
            if "valid_loss" in record
        )
        job = self.job
        tokens = job.steps * self.tokens_per_step
        return Run(
            job.contestant, job.lr, job.seed, tokens, self.status, self.reason, self.loss, points, self.shared_device
        )


def losses_of(outcomes: Mapping[Job, Outcome]) -> dict[Job, float | None]:
    """What a `Planner` asks for: the final loss of each run, None of a broken one."""
    return {job: outcome.loss for job, outcome in outcomes.items()}


class RunStore:
    """All run folders of one comparison, under ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, job: Job) -> Path:
        """Where ``job`` lies, or will."""
        return self.root / job.contestant / f"lr{job.lr:g}-seed{job.seed}-steps{job.steps}"

    def begin(self, job: Job, *, tokens_per_step: int, shared_device: bool) -> RunFolder:
        """An empty folder for ``job``, after removing what an interrupted run left there."""
        path = self.folder(job)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        facts = {**dataclasses.asdict(job), "tokens_per_step": tokens_per_step, "shared_device": shared_device}
        write_json(path / "job.json", facts)
        return RunFolder(path)

    def outcome(self, job: Job) -> Outcome | None:
        """The end of ``job``; None if it has not ended."""
        return _read(self.folder(job))

    def outcomes(self) -> dict[Job, Outcome]:
        """All runs that have ended."""
        found = (_read(path.parent) for path in sorted(self.root.glob("*/*/job.json")))
        return {outcome.job: outcome for outcome in found if outcome is not None}

    def forget_failures(self) -> int:
        """Remove the runs that failed (not those that diverged), so that they are made again; their number."""
        failed = [job for job, outcome in self.outcomes().items() if outcome.status == "failed"]
        for job in failed:
            shutil.rmtree(self.folder(job))
        return len(failed)


def record_failure(path: Path, status: Status, reason: str) -> None:
    """Write ``failure.json`` into the run folder ``path``."""
    write_json(path / "failure.json", {"status": status, "reason": reason})


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in ``path``, which this library wrote.

    Raises:
        UserError: it is gone or damaged; ``remedy`` says what to do.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())}). {remedy}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not an object. {remedy}")
    return content


def _read(path: Path) -> Outcome | None:
    folder = RunFolder(path)
    failure = path / "failure.json"
    if not folder.summary.exists() and not failure.exists():
        return None
    facts = read_json(path / "job.json", _ANEW)
    tokens_per_step, shared = facts.pop("tokens_per_step"), facts.pop("shared_device")
    metrics = tuple(folder.read_metrics())
    if folder.summary.exists():
        summary = read_json(folder.summary, _ANEW)
        return Outcome(Job(**facts), "finished", "", summary, metrics, tokens_per_step, shared)
    end = read_json(failure, _ANEW)
    return Outcome(Job(**facts), end["status"], end["reason"], {}, metrics, tokens_per_step, shared)
