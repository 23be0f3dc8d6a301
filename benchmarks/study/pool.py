"""Processes that stay and train one run after the other; one that dies costs its run and no more."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol


class Run(Protocol):
    """What a worker is told to do; ``model`` is what it keeps ready for the next one of the same."""

    @property
    def model(self) -> str: ...


class Trains(Protocol):
    """What a worker needs of a trainer."""

    def train(self, run: Run) -> dict[str, Any]:
        """Make ``run``; its row."""

    def recover(self) -> bool:
        """Clean up after an exception; whether another run can be made in this process."""


@dataclass(frozen=True)
class Ending:
    """How a run ended.

    Attributes:
        run: which.
        row: of a run that was made.
        error: what stopped it, else empty.
        lost: nothing is known against the run itself: its process died, or there was no memory beside the others.
    """

    run: Run
    row: dict[str, Any] | None
    error: str = ""
    lost: bool = False


@dataclass
class _Worker:
    process: Any
    connection: Connection
    environment: Mapping[str, str]
    run: Run | None = None
    models: set[str] = field(default_factory=set)


class Pool:
    """A process for each of ``environments``, which it is started with; leave the ``with`` block to end them all.

    Args:
        environments: variables of each process. Set before it exists: some packages open a GPU when they are imported.
        make: builds the trainer in the process, before its first run.
    """

    def __init__(self, environments: Sequence[Mapping[str, str]], make: Callable[[], Trains]) -> None:
        self._context: Any = get_context("spawn")  # no driver that a package opened survives a fork
        self._make = make
        self._deaths = 0  # since a run was last made
        self._workers = [self._start(environment) for environment in environments]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.kill()  # a run that is not whole is worth nothing
        for worker in self._workers:
            worker.process.join(10)

    def _start(self, environment: Mapping[str, str]) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, self._make), daemon=True)
        with _environment(environment):
            process.start()
        theirs.close()  # so that the pipe ends with the process
        return _Worker(process, ours, environment)

    @property
    def running(self) -> list[Run]:
        """What is being made."""
        return [worker.run for worker in self._workers if worker.run is not None]

    @property
    def idle(self) -> int:
        """Processes that wait for a run."""
        return len(self._workers) - len(self.running)

    def begin(self, run: Run) -> None:
        """Make ``run`` where its model is compiled already, else where the fewest are."""
        free = [worker for worker in self._workers if worker.run is None]
        worker = min(free, key=lambda worker: (run.model not in worker.models, len(worker.models)))
        worker.run = run
        worker.models.add(run.model)
        try:
            worker.connection.send(run)
        except OSError:  # it has just died, which `ended` will tell
            return

    def ended(self, timeout: float | None) -> list[Ending]:
        """Wait until a run ends or ``timeout`` seconds are over; the runs that did. A process that died is replaced.

        Raises:
            RuntimeError: process after process dies, and no run is made.
        """
        by_handle: dict[Any, _Worker] = {}
        for worker in self._workers:
            by_handle[worker.connection] = by_handle[worker.process.sentinel] = worker
        ready = {id(by_handle[handle]) for handle in wait(list(by_handle), timeout)}
        endings = [self._ending(worker) for worker in list(self._workers) if id(worker) in ready]
        return [ending for ending in endings if ending is not None]

    def _ending(self, worker: _Worker) -> Ending | None:
        run, worker.run = worker.run, None
        try:
            row, error, lost, usable = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join(10)
            code = worker.process.exitcode
            row, lost, usable = None, True, False
            error = f"its process ended with {f'signal {-code}' if code and code < 0 else f'exit code {code}'}"
        self._deaths = 0 if row is not None else self._deaths + (not usable)
        if not usable:
            self._replace(worker)
        return None if run is None else Ending(run, row, error, lost)

    def _replace(self, worker: _Worker) -> None:
        worker.process.kill()
        worker.connection.close()
        if self._deaths > 2 * len(self._workers):
            raise RuntimeError(f"{self._deaths} processes have died, one after the other, without a finished run.")
        self._workers[self._workers.index(worker)] = self._start(worker.environment)


def _work(connection: Connection, make: Callable[[], Trains]) -> None:
    """In the process: train what comes until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    _end_with_parent()
    trainer: Trains | None = None
    while True:
        try:
            run = connection.recv()
        except EOFError:
            return
        row, error, lost, usable = None, "", False, True
        try:
            trainer = make() if trainer is None else trainer
            row = trainer.train(run)
        except Exception as failure:  # whatever a peer raises ends its run alone
            traceback.print_exc()
            error = f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
            lost = isinstance(failure, MemoryError) or type(failure).__name__ == "OutOfMemoryError"
        if error:  # outside the handler, which keeps what the run held alive
            usable = trainer is not None and trainer.recover()
        connection.send((row, error, lost, usable))


def _end_with_parent() -> None:
    """End this process with the one that started it, even in mid-run: else it would train for nobody."""
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
