"""`run_comparison`: makes the runs that the plan asks for, on all devices, and keeps what it has through any end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from lorapre.lab.compare.config import CompareConfig, make_planners
from lorapre.lab.compare.contestants import Contestant, parse_contestants
from lorapre.lab.compare.folder import ArenaFolder
from lorapre.lab.compare.plan import SEARCHES, Ask, Job, Planner, SearchName, choose_search
from lorapre.lab.compare.pool import ProcessPool, Slot, slots
from lorapre.lab.compare.progress import ArenaProgress
from lorapre.lab.compare.runs import RunStore, losses_of, record_failure
from lorapre.lab.compare.worker import Assignment, run_assignment
from lorapre.lab.config import PretrainConfig, option_name, read_yaml
from lorapre.lab.data import TextCorpus
from lorapre.lab.errors import UserError
from lorapre.lab.optimizers import check_rank_compresses, find_optimizer
from lorapre.lab.preparation import load_planned_corpus, plan_run, record_provenance
from lorapre.lab.provenance import provenance
from lorapre.lab.run_folder import RunFolder, write_json, write_text

#: What a worker imports, quiet first.
WORKER_MODULES = ("lorapre.lab.quiet", "lorapre.lab.compare.worker")

#: Steps of a trial run, from which a budget is planned.
TRIAL_STEPS = 12

#: Steps of a run that is made for its times alone: GaLore's kin decompose every 200 steps, which must occur.
TIMING_STEPS = 220


def run_comparison(
    config: CompareConfig, out: Path, console: Console, *, command: str, retry_failed: bool = False
) -> None:
    """Make every run of ``config`` that ``out`` does not hold yet.

    Args:
        config: what to compare. The training must be the one that ``out`` began with; the rest may have changed.
        out: the comparison's folder.
        console: for progress.
        command: what a reader types to make it again; printed in the report.
        retry_failed: make failed runs again (not diverged ones).

    Raises:
        UserError: something does not fit; nothing has been trained then.
        KeyboardInterrupt: the running runs are lost, the finished ones are safe.
    """
    arena = Arena(config, out, console, command)
    if retry_failed:
        arena.folder.runs.forget_failures()
        arena.folder.trials.forget_failures()
        arena.folder.timings.forget_failures()
    arena.run()


class Arena:
    """One session on a comparison; everything that must outlast it is on the disk."""

    def __init__(self, config: CompareConfig, out: Path, console: Console, command: str) -> None:
        self.config = config
        self._command = command
        self.folder = ArenaFolder(out)
        self._console = console
        self._began = time.monotonic()
        self._plan = plan_run(config.training)
        meta = self._plan.model.build(config.training.seed, device="meta")
        self.contestants = parse_contestants(config.optimizers, config.training.rank, meta)
        for spec, contestant in zip(config.optimizers, self.contestants, strict=True):
            if contestant.rank is not None:
                at_rank = config.training.model_copy(update={"rank": contestant.rank})
                check_rank_compresses(meta, at_rank, f"--optimizers {spec}" if "@" in spec else None)
        _check_something_to_measure(config, self.contestants)
        self._by_key = {contestant.key: contestant for contestant in self.contestants}
        self._corpus, self._bigram = self._open()
        fitted = self._plan.model.build(config.training.seed, device="meta")  # to the data's vocabulary
        self._parameters = sum(param.numel() for param in fitted.parameters())
        self._slots = slots(config.jobs_per_device)
        self._trials: tuple[dict[str, float], float] = ({}, 0.0)

    def _open(self) -> tuple[TextCorpus, float]:
        """The folder and the data, checked against what an earlier session left."""
        folder, path = self.folder, self.folder.path
        if path.exists() and not folder.begun() and (path.is_file() or any(path.iterdir())):
            raise UserError(
                f"--out {path}: exists and holds no comparison. Give another folder, or a path without one."
            )
        if folder.begun():
            _check_same_training(path, self.config.training)
        RunFolder(path).check_writable(create=True)
        corpus = load_planned_corpus(self._plan, self._console)
        bigram = corpus.bigram_cross_entropy()
        record_provenance(folder.provenance, corpus, seed=self.config.training.seed, option=f"--out {path}")
        write_text(folder.config, self.config.to_yaml())
        return corpus, bigram

    def run(self) -> None:
        """Choose the search, make the runs, and write ``plan.json``."""
        pool: ProcessPool[Job] = ProcessPool(self._slots, WORKER_MODULES)
        try:
            search, notes = self._choose_search(pool)
            self._write_plan(search, notes, complete=False)
            planners = make_planners(self.config, self.contestants, search)
            store, devices = self.folder.runs, len(self._slots)
            with ArenaProgress(self._console, planners, store, devices, self._trials) as progress:
                left = self._make_runs(pool, planners, progress)
        except BaseException:
            pool.stop()
            raise
        if left:
            notes.append(f"The budget of {self.config.budget} ended with {left} run(s) not made.")
        self._time_alone(planners)
        self._write_plan(search, notes, complete=True)

    def _write_plan(self, search: SearchName, notes: list[str], *, complete: bool) -> None:
        entries = [find_optimizer(contestant.optimizer) for contestant in self.contestants]
        facts = {
            "command": self._command,
            "complete": complete,
            "search": search,
            "search_description": SEARCHES[search].description,
            "contestants": [{"optimizer": c.optimizer, "rank": c.rank, "options": c.options} for c in self.contestants],
            "notes": notes,
            "bigram_loss": self._bigram,
            "parameters": self._parameters,
            "data": self._corpus.description,
            "environment": provenance(seed=self.config.training.seed),
            "packages": {entry.package: entry.installed_version() for entry in entries if entry.package is not None},
        }
        write_json(self.folder.plan, facts)

    def _choose_search(self, pool: ProcessPool[Job]) -> tuple[SearchName, list[str]]:
        """The search that the user named, or the most thorough one that the budget has room for."""
        budget = self.config.budget_seconds
        if self.config.search is not None or budget is None:
            return self.config.search or "halving", []
        self._trials = speeds, start = self._trial_speeds(pool)
        planners = make_planners(self.config, self.contestants, "grid")
        racing = [planner for key, planner in planners.items() if key in speeds]
        left = budget - (time.monotonic() - self._began)
        search, estimate = choose_search(racing, speeds, start, len(self._slots), left)
        minutes = f"{estimate / 60:.0f} min" if estimate >= 120 else f"{estimate:.0f} s"
        fits = "" if estimate <= left else f", more than the {max(0.0, left):.0f} s that are left of the budget"
        note = f"Search: {search.description} (estimated at {minutes}{fits})."
        self._console.print(note, soft_wrap=True, markup=False)
        return search.name, [note]

    def _trial_speeds(self, pool: ProcessPool[Job]) -> tuple[dict[str, float], float]:
        """Seconds a step of each contestant that can train at all, and what a run costs besides its steps."""
        store, training = self.folder.trials, self.config.training
        jobs = []
        for contestant in self.contestants:
            rate = find_optimizer(contestant.optimizer, "--optimizers").default_lr
            jobs.append(Job(contestant.key, rate, training.seed, TRIAL_STEPS))
        took = self._run_all(pool, store, jobs)
        overheads = []
        speeds = {}
        for job in jobs:
            outcome = store.outcome(job)
            ms = None if outcome is None else outcome.summary.get("training_ms")
            if ms:
                speeds[job.contestant] = ms / 1e3
                overheads.append(max(0.0, took.get(job, 10.0) - TRIAL_STEPS * ms / 1e3))
        return speeds, max(overheads, default=10.0)

    def _run_all(self, pool: ProcessPool[Job], store: RunStore, jobs: list[Job]) -> dict[Job, float]:
        """Make those of ``jobs`` that ``store`` lacks; the seconds that each took."""
        waiting = [job for job in jobs if store.outcome(job) is None]
        began: dict[Job, float] = {}
        took: dict[Job, float] = {}
        while waiting or pool.running:
            while waiting and (slot := pool.free) is not None:
                job = waiting.pop(0)
                began[job] = time.monotonic()
                pool.start(job, slot, run_assignment, self._assignment(job, store, slot))
            for job, code in pool.ended(1.0):
                _record_silent_end(store.folder(job), code)
                took[job] = time.monotonic() - began[job]
        return took

    def _time_alone(self, planners: dict[str, Planner]) -> None:
        """Train those a little with a device to themselves of whose runs no time says anything."""
        outcomes = self.folder.runs.outcomes()
        losses = losses_of(outcomes)
        jobs = []
        for key, planner in planners.items():
            lr = planner.choice(losses).lr
            if lr is None:
                continue
            full = [outcomes.get(Job(key, lr, seed, planner.steps)) for seed in planner.seeds]
            if not any(run is not None and run.status == "finished" and not run.shared_device for run in full):
                jobs.append(Job(key, lr, self.config.training.seed, TIMING_STEPS))
        if not jobs:
            return
        self._console.print(f"timing {len(jobs)} optimizers, {TIMING_STEPS} steps each, one a device", markup=False)
        pool: ProcessPool[Job] = ProcessPool(slots(1), WORKER_MODULES)
        try:
            self._run_all(pool, self.folder.timings, jobs)
        except BaseException:
            pool.stop()
            raise

    def _make_runs(self, pool: ProcessPool[Job], planners: dict[str, Planner], progress: ArenaProgress) -> int:
        """Run until nothing is asked for, or the budget ends; the number of runs that were not made for that."""
        store = self.folder.runs
        losses = losses_of(store.outcomes())
        order = {key: number for number, key in enumerate(planners)}
        for job in losses:
            progress.known(job)
        while True:
            asks = [ask for planner in planners.values() for ask in planner.asks(losses)]
            asks = [ask for ask in asks if ask.job not in pool.running]
            asks.sort(key=lambda ask: (ask.urgency, order[ask.job.contestant]))
            skipped = self._start_what_fits(pool, asks, progress)
            if not pool.running:
                return skipped
            for job, code in pool.ended(0.5):
                _record_silent_end(store.folder(job), code)
                outcome = store.outcome(job)
                if outcome is None:
                    raise RuntimeError(f"{store.folder(job)} has neither summary nor failure")
                losses[job] = outcome.loss
                progress.ended(job, outcome)
            progress.refresh(pool.running)

    def _start_what_fits(self, pool: ProcessPool[Job], asks: list[Ask], progress: ArenaProgress) -> int:
        """Fill the free slots; the number of asks that no longer fit into the budget."""
        skipped = 0
        for ask in asks:
            if not self._fits(ask.job, progress.estimate):
                skipped += 1
                continue
            slot = pool.free
            if slot is None:
                break
            assignment = self._assignment(ask.job, self.folder.runs, slot)
            pool.start(ask.job, slot, run_assignment, assignment)
            progress.started(ask.job)
        return skipped

    def _fits(self, job: Job, estimate: Callable[[Job], float | None]) -> bool:
        budget = self.config.budget_seconds
        if budget is None:
            return True
        return time.monotonic() - self._began + (estimate(job) or 0.0) <= budget

    def _assignment(self, job: Job, store: RunStore, slot: Slot) -> Assignment:
        training, contestant = self.config.training, self._by_key[job.contestant]
        racing = store.root == self.folder.runs.root
        # What a report may show: the first seed at full length.
        measured = racing and find_optimizer(contestant.optimizer).factored
        measured = measured and (job.seed, job.steps) == (training.seed, training.total_steps)
        diagnose = training.diagnose if measured else None
        config = training.model_copy(
            update={
                "optimizer": contestant.optimizer,
                "rank": training.rank if contestant.rank is None else contestant.rank,
                "options": dict(contestant.options),
                "lr": job.lr,
                "seed": job.seed,
                "steps": job.steps,
                "tokens": None,
                "log_every": min(training.log_interval, job.steps),
                # The same distance in every run: the full length has as many as were asked for.
                "eval_every": min(job.steps, max(1, training.total_steps // self.config.validations)),
                "diagnose": diagnose,
            }
        )
        sharing = self.config.jobs_per_device > 1 and store.root != self.folder.timings.root
        shared = sharing or bool(diagnose)
        folder = store.begin(job, tokens_per_step=training.tokens_per_step, shared_device=shared)
        return Assignment(config.model_dump(), folder.path, slot.threads, self._bigram)


def _record_silent_end(path: Path, code: int) -> None:
    """A process that left nothing was killed, by the system for want of memory for instance."""
    if (path / "summary.json").exists() or (path / "failure.json").exists():
        return
    log = path / "log.txt"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    record_failure(path, "failed", f"the process ended with {how}; it last printed: {last[:200]}")


def _check_something_to_measure(config: CompareConfig, contestants: tuple[Contestant, ...]) -> None:
    diagnose = config.training.diagnose
    if diagnose and not any(find_optimizer(contestant.optimizer).factored for contestant in contestants):
        raise UserError(
            f"--diagnose {diagnose}: measures momentum that is kept as factors, which none of --optimizers "
            f"{','.join(config.optimizers)} has. Leave it out (0 overrules a file), or add one of ours."
        )


def _check_same_training(path: Path, training: PretrainConfig) -> None:
    before = read_yaml(ArenaFolder(path).config).get("training", {})
    if not before.get("diagnose"):
        before = {**before, "diagnose": None}  # 0 and none are one
    now: dict[str, Any] = json.loads(training.model_dump_json())
    for name, value in now.items():
        if name in before and before[name] != value:
            option = option_name(name)
            began = "without it" if before[name] in (None, []) else f"with {_shown(before[name])}"
            raise UserError(
                f"{f'without {option}' if value in (None, []) else f'{option} {_shown(value)}'}: the comparison in "
                f"{path} began {began}, and all of its runs must share their training. Give the same, or another --out."
            )


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
