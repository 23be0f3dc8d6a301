"""Processes, one a device: started, waited for, and ended together."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

import torch

_Key = TypeVar("_Key")


@dataclass(frozen=True)
class Slot:
    """Room for one run at a time: on a GPU, or on the CPU with so many threads."""

    gpu: int | None
    threads: int | None
    number: int


def slots(jobs_per_device: int) -> tuple[Slot, ...]:
    """All slots of this machine, its GPUs in turn, or its CPU with the cores shared out."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        return tuple(Slot(number % gpus, None, number) for number in range(gpus * jobs_per_device))
    threads = None if jobs_per_device == 1 else max(1, (os.cpu_count() or 1) // jobs_per_device)
    return tuple(Slot(None, threads, number) for number in range(jobs_per_device))


@contextmanager
def _only_gpu(gpu: int | None) -> Iterator[None]:
    """Let a process that is started now see one GPU, from its first import on: some open the driver."""
    if gpu is None:
        yield
        return
    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    os.environ[name] = str(gpu) if before is None else before.split(",")[gpu].strip()
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class ProcessPool(Generic[_Key]):
    """Runs functions in fresh processes, at most one a slot.

    Where runs take the CPU of Linux or macOS, a server process imports the heavy modules once and forks each worker
    from itself; on GPUs and elsewhere each worker starts from nothing.
    """

    def __init__(self, slots: Sequence[Slot], preload: Sequence[str]) -> None:
        on_gpu = any(slot.gpu is not None for slot in slots)
        forkable = "forkserver" in multiprocessing.get_all_start_methods()
        # Packages that are imported there open the driver, which no fork survives.
        method = "forkserver" if forkable and not on_gpu else "spawn"
        self._context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            self._context.set_forkserver_preload(list(preload))
        self._free = list(slots)
        self._running: dict[_Key, tuple[BaseProcess, Slot]] = {}

    @property
    def free(self) -> Slot | None:
        """A slot that nothing runs in."""
        return self._free[0] if self._free else None

    @property
    def running(self) -> tuple[_Key, ...]:
        """What runs now."""
        return tuple(self._running)

    def start(self, key: _Key, slot: Slot, target: Callable[[Any], None], argument: Any) -> None:
        """Run ``target(argument)`` in a new process; ``slot`` must be free."""
        self._free.remove(slot)
        process = self._context.Process(target=target, args=(argument,))
        with _only_gpu(slot.gpu):
            process.start()
        self._running[key] = (process, slot)

    def ended(self, timeout: float) -> Iterator[tuple[_Key, int]]:
        """Wait until a process ends, or ``timeout`` seconds; yield those that did, with their exit codes."""
        wait([process.sentinel for process, _ in self._running.values()], timeout)
        for key, (process, slot) in list(self._running.items()):
            if process.exitcode is not None:
                process.join()
                del self._running[key]
                self._free.append(slot)
                self._free.sort(key=lambda free: free.number)
                yield key, process.exitcode

    def stop(self) -> None:
        """End all that runs, without waiting for their work."""
        for process, _ in self._running.values():
            process.terminate()
        for process, _ in self._running.values():
            process.join(10)
            if process.is_alive():
                process.kill()
        self._running.clear()
