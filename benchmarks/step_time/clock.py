"""Milliseconds, bytes, launches, and what the machine can do at most."""

from __future__ import annotations

import contextlib
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

Step = Callable[[], object]
#: Milliseconds of each step, a list a round.
Rounds = list[list[float]]

#: Kineto's names of what a stream executes.
_KERNEL, _COPIES = "kernel", ("gpu_memcpy", "gpu_memset")
EXECUTED = (_KERNEL, *_COPIES)


def each_step(step: Step, count: int, device: torch.device) -> list[float]:
    """Milliseconds of each of ``count`` steps that follow one another, after one that is not timed.

    On a GPU the host does not wait between them unless the step itself does, as in training, where the queue is full.
    """
    step()
    if device.type == "cpu":
        marks = [time.perf_counter()]
        for _ in range(count):
            step()
            marks.append(time.perf_counter())
        return [1e3 * (after - before) for before, after in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    events[-1].synchronize()
    return [before.elapsed_time(after) for before, after in itertools.pairwise(events)]


def in_turn(*steps: Step, rounds: int, count: int, seconds: float, device: torch.device) -> list[Rounds]:
    """``count`` steps of each, one after the other, ``rounds`` times, or until ``seconds`` are over.

    What else the machine does falls on all. Milliseconds, a list a round.
    """
    began = time.monotonic()
    found: list[Rounds] = [[] for _ in steps]
    for _ in range(rounds):
        for step, times in zip(steps, found, strict=True):
            times.append(each_step(step, count, device))
        if time.monotonic() - began > seconds:
            break
    return found


def middle(rounds: Rounds) -> float:
    """Median over all steps of all rounds."""
    return median(value for each in rounds for value in each)


def extra_peak(step: Step, attempts: int = 3) -> int | None:
    """Most bytes of the GPU that a step holds beyond what was held before it, and gives back.

    None where every step keeps something, so that no peak is of a step alone.
    """
    for _ in range(attempts):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        if torch.cuda.memory_allocated() <= held:
            return torch.cuda.max_memory_allocated() - held
    return None


@dataclass(frozen=True)
class Launches:
    """Of one step: kernel launches, kernels of different names among them, copies and fills."""

    launches: int
    kernels: int
    copies: int


def launches(step: Step) -> Launches | None:
    """What the GPU executes for one step, by the profiler; None where it saw nothing."""
    return counted(traced(step))


def traced(step: Step) -> list[dict[str, Any]]:
    """The events of the profiler's chrome trace of ``step``, on the GPU, with what the host does for them."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events: list[dict[str, Any]] = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return events


def counted(events: list[dict[str, Any]]) -> Launches | None:
    """Of a chrome trace: the host's calls and the ranges of ``record_function`` lie in it too, and are no launches."""
    kernels = [event["name"] for event in events if event.get("cat") == _KERNEL]
    copies = sum(event.get("cat") in _COPIES for event in events)
    return Launches(len(kernels), len(set(kernels)), copies) if kernels or copies else None


@dataclass(frozen=True)
class Limits:
    """Of the machine: bytes a second of a copy (read and written), operations a second of a product by dtype.

    On a GPU float32 is multiplied as TF32.
    """

    copy: float
    product: dict[str, float]


def limits(device: torch.device, dtypes: Iterable[str]) -> Limits:
    """Measured now: a copy of 1 GiB and products of 8192 x 8192; on a CPU of 128 MiB and of 512 x 512."""
    small = device.type == "cpu"
    source = torch.ones(2 ** (25 if small else 28), device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / (middle([each_step(lambda: target.copy_(source), 7, device)]) / 1e3)
    size = 512 if small else 8192
    product = {}
    with _tf32():
        for dtype in dtypes:
            A = torch.randn(size, size, device=device).to(getattr(torch, dtype))
            out = torch.empty_like(A)
            each = middle([each_step(lambda A=A, out=out: torch.mm(A, A, out=out), 7, device)])  # type: ignore[misc]
            product[dtype] = 2 * size**3 / (each / 1e3)
    return Limits(copy, product)


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
