"""Measures what is wanted and not there yet, until it is done or the time is over."""

from __future__ import annotations

import gc
import re
import time
from typing import Any

import torch

from lorapre.lab.errors import UserError
from lorapre.lab.models import LLAMAS
from step_time.clock import Limits
from step_time.contestants import Contestant
from step_time.measure import Bench, Effort
from step_time.plan import Job, Plan, Wanted
from step_time.rows import Results, StepRow, TrainingRow, Unmeasured
from step_time.training import BATCHES, Shape, TrainingBench
from step_time.weights import fitting_layers


class Session:
    """One process's part of the rows.

    Attributes:
        left: rows that the time did not suffice for.
        failed: rows of this library's optimizers that ended with an error.
    """

    def __init__(
        self,
        results: Results,
        plan: Plan,
        *,
        device: torch.device,
        limits: Limits,
        effort: Effort,
        layers: int | None,
        sequence: int,
        deadline: float,
        again: re.Pattern[str] | None = None,
    ) -> None:
        self.results, self.plan, self.device, self.limits, self.effort = results, plan, device, limits, effort
        self.layers, self.sequence, self.deadline = layers, sequence, deadline
        self.left = 0
        self.failed: list[str] = []
        if again is not None:
            results.drop({self._key(job, row) for job in plan.jobs() for row in job.rows if again.search(row.title)})

    def run(self) -> None:
        """Make all rows."""
        for job in self.plan.jobs():
            wanted = [row for row in job.rows if not self._is_there(job, row)]
            ready = [row for row in wanted if self._can_be_made(job, row)]
            if not ready:
                continue
            if time.monotonic() > self.deadline:
                self.left += len(ready)
                continue
            try:
                bench = self._bench(job)
            except (UserError, torch.OutOfMemoryError) as error:
                for row in ready:
                    self._without(job, row, _reason(error))
                continue
            for row in ready:
                if time.monotonic() > self.deadline:
                    self.left += 1
                    continue
                self._make(job, row, bench)
            del bench
            self._free()

    def _key(self, job: Job, row: Wanted) -> tuple[Any, ...]:
        if job.dtype is None:
            return "training", self.device.type, job.model, row.title, row.rank
        return "step", self.device.type, job.model, job.dtype, row.title, row.rank

    def _is_there(self, job: Job, row: Wanted) -> bool:
        return self.results.has(self._key(job, row))

    def _can_be_made(self, job: Job, row: Wanted) -> bool:
        one = row.contestant
        if one is None:
            return True
        if one.captured and self.device.type == "cpu":
            self._without(job, row, "CUDA graphs need a GPU")
            return False
        try:
            one.check_installed()
        except UserError:
            self._without(job, row, f"{one.package} is not installed")
            return False
        return True

    def _bench(self, job: Job) -> Bench | TrainingBench:
        if job.dtype is None:
            shape = Shape(self.plan.batches.get(job.model, BATCHES.get(job.model, 1)), self.sequence)
            return TrainingBench(job.model, shape, self.device, self.effort, self._rare_ms)
        dtype = getattr(torch, job.dtype)
        memory = None if self.device.type == "cpu" else torch.cuda.get_device_properties(self.device).total_memory
        layers = fitting_layers(job.model, dtype, memory)
        if self.layers is not None:
            layers = min(layers, self.layers)
        return Bench(job.model, layers, dtype, self.device, self.limits, self.effort)

    def _rare_ms(self, model: str, title: str, rank: int | None) -> float | None:
        """Rare work on the float32 matrices of the whole model, where a row has it."""
        key = "step", self.device.type, model, "float32", title, rank
        rows = [row for row in self.results.steps if row.key == key and row.layers == LLAMAS[model].layers]
        return rows[0].rare_ms if rows else None

    def _make(self, job: Job, row: Wanted, bench: Bench | TrainingBench) -> None:
        began = time.monotonic()
        try:
            made: StepRow | TrainingRow = bench.row(row.contestant, row.rank)
        except Exception as error:  # a peer's failure must not cost the rows after it
            reason = _reason(error)
            if isinstance(row.contestant, Contestant) and row.contestant.ours:
                self.failed.append(f"{row.title} {row.rank or ''}: {reason}")
            error.__traceback__ = None  # it holds the optimizer
            self._without(job, row, reason)
            self._free()
            return
        self._free()
        self.results.add(made)
        where = f"{made.model} {job.dtype or 'training'} {row.title} {row.rank or ''}"
        what = f"{made.step_ms:.3f} ms, {made.ratio_to_fused_adamw:.3f}"
        if isinstance(made, StepRow) and made.launches is not None:
            what += f", {made.launches} launches + {made.copies} copies, {(made.extra_bytes or 0) / 1e6:.1f} MB"
        if isinstance(made, StepRow) and made.same_bits is not None:
            what += f", same bits: {made.same_bits}"
        say(f"{where}: {what} ({time.monotonic() - began:.0f} s){'. ' + made.note if made.note else ''}")

    def _without(self, job: Job, row: Wanted, reason: str) -> None:
        missing = Unmeasured(self._key(job, row), reason)
        self.results.add(missing)
        say(missing.line)

    def _free(self) -> None:
        gc.collect()
        if self.device.type != "cpu":
            torch.cuda.synchronize()  # a GPU that an error has left unusable ends the process here, not row by row
            torch.cuda.empty_cache()


def _reason(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)
