"""How long the optimizer's step and the whole training step take, without slowing them down."""

from __future__ import annotations

import itertools
import resource
import statistics
import sys
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

#: First steps of a process: allocations, library handles and compilation are paid there.
WARM_UP_STEPS = 5


class _CpuClock:
    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        self._marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """From the first mark to each."""
        return [1e3 * (mark - self._marks[0]) for mark in self._marks]


class _CudaClock:
    """Events in the stream, read long after they were recorded, so that no step waits for them.

    Only neighbours are subtracted: CUDA gives float32 milliseconds, too coarse for a step after an hour.
    """

    #: Events that are kept at most; a run of a hundred thousand steps would else hold twice as many.
    KEPT = 2048

    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] = []
        self._last: torch.cuda.Event | None = None
        self._milliseconds: list[float] = []

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)
        if len(self._events) == self.KEPT:
            self._read(self.KEPT // 2)

    def _read(self, count: int) -> None:
        """Turn the first ``count`` events into times."""
        for event in self._events[:count]:
            event.synchronize()
            since = 0.0 if self._last is None else self._last.elapsed_time(event)
            self._milliseconds.append((self._milliseconds[-1] if self._milliseconds else 0.0) + since)
            self._last = event
        del self._events[:count]

    def milliseconds(self) -> list[float]:
        """From the first mark to each."""
        self._read(len(self._events))
        return self._milliseconds


class StepTimer(TrainerCallback):
    """Marks the begin and the end of every ``optimizer.step()`` of this process.

    ``optimizer_ms`` is the mean over the steps after the warm-up, so that work done every few hundred steps counts
    with its share. ``training_ms`` is the median time from one step to the next, which validation and logging do not
    touch, plus what the optimizer's mean exceeds its median by.
    """

    def __init__(self) -> None:
        self._clock: _CpuClock | _CudaClock = _CudaClock() if torch.cuda.is_available() else _CpuClock()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._clock.mark()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._clock.mark()

    def results(self) -> dict[str, float | None]:
        """``optimizer_ms`` and ``training_ms``; None where there were too few steps to tell."""
        marks = self._clock.milliseconds()
        return summarise(marks[0::2], marks[1::2])


def summarise(begins: list[float], ends: list[float]) -> dict[str, float | None]:
    """Step times from the milliseconds at which each step began and ended; see `StepTimer`."""
    begins, ends = begins[WARM_UP_STEPS : len(ends)], ends[WARM_UP_STEPS:]
    if len(begins) < 2:
        return {"optimizer_ms": None, "training_ms": None}
    steps = [end - begin for begin, end in zip(begins, ends, strict=True)]
    optimizer = statistics.fmean(steps)
    intervals = [after - before for before, after in itertools.pairwise(begins)]
    rare = max(0.0, optimizer - statistics.median(steps))
    return {"optimizer_ms": optimizer, "training_ms": statistics.median(intervals) + rare}


def peak_bytes() -> int:
    """Most memory so far: what tensors took on the GPU, or else all that this process took.

    The former counts since the last ``reset_peak_memory_stats``, the latter since the process began.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
