"""The whole matrix of runs on the screen: how many are done, which are under way, how long it will take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from lorapre.lab.callbacks import clock
from lorapre.lab.compare.plan import Job, Planner
from lorapre.lab.compare.runs import Outcome, RunStore
from lorapre.lab.run_folder import RunFolder


def describe(job: Job) -> str:
    """One run in words."""
    return f"{job.contestant} lr {job.lr:.2g} seed {job.seed}"


class ArenaProgress:
    """A live display on a terminal, a line a finished run elsewhere."""

    def __init__(
        self,
        console: Console,
        planners: Mapping[str, Planner],
        store: RunStore,
        devices: int,
        trials: tuple[Mapping[str, float], float] = ({}, 0.0),
    ) -> None:
        """``trials``: seconds a step by contestant, and what a run costs besides, where these were tried before."""
        self._speeds, self._start_seconds = trials
        self._console = console
        self._planners = planners
        self._store = store
        self._devices = devices
        self._known: set[Job] = set()
        self._done: dict[Job, float] = {}  # seconds that the runs of this session took
        self._started: dict[Job, float] = {}
        self._progress = Progress(
            TextColumn("runs"), BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.fields[eta]}")
        )
        self._task = self._progress.add_task("runs", total=self._total(), eta="ETA --:--")
        self._live = Live(self._progress, console=console, refresh_per_second=2) if console.is_terminal else None

    def __enter__(self) -> ArenaProgress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def _total(self) -> int:
        """Planned runs; more where a grid has grown."""
        return max(sum(planner.total_runs() for planner in self._planners.values()), len(self._known))

    def known(self, job: Job) -> None:
        """A run that an earlier session made."""
        self._known.add(job)

    def started(self, job: Job) -> None:
        """A run begins now."""
        self._started[job] = time.monotonic()

    def ended(self, job: Job, outcome: Outcome) -> None:
        """A run has ended, well or not."""
        self._known.add(job)
        seconds = time.monotonic() - self._started.pop(job)
        self._done[job] = seconds
        end = f"loss {outcome.loss:.4f}" if outcome.loss is not None else f"{outcome.status}: {outcome.reason}"
        place = f"[{len(self._known)}/{self._total()}]"
        line = f"{place} {describe(job)}, {job.steps} steps: {end} ({clock(seconds)})"
        if self._live is None:
            line += f"  {self._eta()}"
        self._console.print(line, style=None if outcome.loss is not None else "red", soft_wrap=True, markup=False)

    def estimate(self, job: Job) -> float | None:
        """Seconds that ``job`` should take, by the runs of its contestant, its trial, or all runs; None before any."""
        own = [seconds / done.steps for done, seconds in self._done.items() if done.contestant == job.contestant]
        if not own and job.contestant in self._speeds:
            return self._start_seconds + job.steps * self._speeds[job.contestant]
        pace = own or [seconds / done.steps for done, seconds in self._done.items()]
        return job.steps * statistics.fmean(pace) if pace else None

    def _eta(self) -> str:
        work = 0.0
        for planner in self._planners.values():
            done = [job for job in self._known if job.contestant == planner.contestant]
            steps = max(0, planner.total_steps() - sum(job.steps for job in done))
            guess = self.estimate(Job(planner.contestant, 0.0, 0, steps))
            if guess is None:
                return "ETA --:--"
            work += guess
        return f"ETA {clock(work / self._devices)}"

    def refresh(self, running: Sequence[Job]) -> None:
        """Draw what is under way."""
        if self._live is None:
            return
        self._progress.update(self._task, completed=len(self._known), total=self._total(), eta=self._eta())
        self._live.update(Group(self._progress, *(Text.from_markup(self._line(job)) for job in running)))

    def _line(self, job: Job) -> str:
        records = RunFolder(self._store.folder(job)).read_metrics()
        state = "starting"
        if records:
            record = records[-1]
            loss = record.get("loss", record.get("valid_loss"))
            state = f"step {record['step']}/{job.steps}" + (f" loss {loss:.3f}" if loss is not None else "")
        return f"  [dim]{escape(describe(job))}: {state}[/]"
