"""What happens around the Trainer's loop: metrics on disk, checkpoints marked complete, a bar on the screen."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorapre.lab.errors import TrainingDivergedError
from lorapre.lab.run_folder import COMPLETE_MARKER, RunFolder


def perplexity(loss: float) -> float:
    """exp of a mean cross-entropy in nats; inf where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class MetricsWriter(TrainerCallback):
    """Appends one JSON line a log or validation to ``metrics.jsonl``.

    All but ``seconds`` and ``tokens_per_second`` (or another unit's) is a function of the configuration: a resumed
    run writes it again to the bit (on the CPU). ``seconds`` counts training since the start, over interruptions,
    without validations and checkpoints.
    """

    def __init__(
        self, folder: RunFolder, per_step: int, previous: list[dict[str, Any]], *, unit: str = "tokens"
    ) -> None:
        """``unit`` is what a step takes ``per_step`` of; ``previous`` are the records of earlier sessions."""
        self._folder = folder
        self._per_step = per_step
        self._unit = unit
        self._seconds = previous[-1]["seconds"] if previous else 0.0
        self._running_since: float | None = None
        self._began = False
        self._last_log = (previous[-1]["step"] if previous else 0, self._seconds)

    @property
    def began(self) -> bool:
        """Whether this process has begun a step."""
        return self._began

    @property
    def seconds(self) -> float:
        """Training time so far."""
        running = 0.0 if self._running_since is None else time.perf_counter() - self._running_since
        return float(self._seconds + running)

    def pause(self) -> None:
        """Stop the clock, for validation and saving."""
        self._seconds = self.seconds
        self._running_since = None

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began = True
        if self._running_since is None:
            self._running_since = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # Before, not when the validation is logged: its own time would count. The last step has one by `LastStep`.
        if control.should_evaluate or control.should_save or state.global_step >= state.max_steps:
            if torch.cuda.is_available():  # the host is ahead of the steps that it has asked for
                torch.cuda.synchronize()
            self.pause()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        step = state.global_step
        record: dict[str, Any] = {"step": step, self._unit: step * self._per_step}
        if "loss" in logs:
            seconds = self.seconds
            last_step, last_seconds = self._last_log
            self._last_log = (step, seconds)
            record |= {"loss": logs["loss"], "perplexity": perplexity(logs["loss"]), "lr": logs["learning_rate"]}
            if "grad_norm" in logs:
                record["grad_norm"] = logs["grad_norm"]
            elapsed = max(seconds - last_seconds, 1e-9)
            record[f"{self._unit}_per_second"] = round((step - last_step) * self._per_step / elapsed, 1)
        elif "eval_loss" in logs:
            record |= {"valid_loss": logs["eval_loss"], "valid_perplexity": perplexity(logs["eval_loss"])}
        else:
            return
        record["seconds"] = round(self.seconds, 3)
        with self._folder.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


class DivergenceGuard(TrainerCallback):
    """Stops a run whose logged loss or validation loss is not finite: no optimizer comes back from there."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        for name, words in (("loss", "training loss"), ("eval_loss", "validation loss")):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                raise TrainingDivergedError(f"The {words} is {value} at step {state.global_step}")


class AlreadyTrained(Exception):  # noqa: N818  (no error: it stops the Trainer from going on)
    """The checkpoint to resume from is the last step's."""


class LastStep(TrainerCallback):
    """Logs and validates at the last step, before its checkpoint is saved, and trains no step beyond it."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # By now the checkpoint is loaded. The Trainer asks whether it has finished after a step only.
        if state.global_step >= state.max_steps:
            raise AlreadyTrained

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = control.should_evaluate = True


class CheckpointMarker(TrainerCallback):
    """Marks a checkpoint once all of it is written: resuming trusts no other."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            (Path(args.output_dir or "") / f"checkpoint-{state.global_step}" / COMPLETE_MARKER).touch()


class _Remaining(ProgressColumn):
    """Time left, from the pace since this process began: a resumed run has not done its earlier steps itself."""

    def render(self, task: Task) -> Text:
        done = task.completed - task.fields["first"]
        if done <= 0 or task.total is None or task.elapsed is None:
            return Text("ETA --:--")
        left = int(task.elapsed / done * (task.total - task.completed))
        return Text(f"ETA {clock(left)}")


class ProgressBar(TrainerCallback):
    """Loss, perplexity, tokens/s and ETA: a live bar on a terminal, ten lines in a log file."""

    def __init__(self, console: Console, label: str, per_step: int, *, unit: str = "tok") -> None:
        self._console = console
        self._label = label
        self._per_step = per_step
        self._unit = unit
        self._progress = Progress(
            # On a narrow terminal the label gives way, and the numbers stay whole.
            TextColumn("{task.description}", table_column=Column(overflow="ellipsis")),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[loss]}"),
            TextColumn("{task.fields[speed]}"),
            _Remaining(table_column=Column(no_wrap=True)),
            console=console,
            disable=not console.is_terminal,
        )
        self._started = 0.0
        self._first = 0
        self._lines = 0
        self._loss = ""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._started, self._first = time.perf_counter(), state.global_step
        self._task = self._progress.add_task(
            self._label, total=state.max_steps, completed=self._first, loss="", speed="", first=self._first
        )
        self._progress.start()

    def _speed(self, step: int) -> str:
        rate = (step - self._first) * self._per_step / max(time.perf_counter() - self._started, 1e-9)
        if self._unit != "tok":
            return f"{rate:.1f} {self._unit}/s"
        return f"{rate / 1000:.1f}k tok/s" if rate < 1e6 else f"{rate / 1e6:.2f}M tok/s"

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._progress.update(self._task, completed=state.global_step, speed=self._speed(state.global_step))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        if "loss" not in logs:  # a validation, which may come before the first step
            return
        self._loss = f"loss {logs['loss']:.3f} ppl {perplexity(logs['loss']):.1f}"
        self._progress.update(self._task, loss=self._loss)
        line = state.global_step * 10 // state.max_steps
        if not self._console.is_terminal and line > self._lines:
            self._lines = line
            place = f"step {state.global_step}/{state.max_steps}"
            self._console.print(f"{self._label} {place} {self._loss} {self._speed(state.global_step)}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._progress.stop()

    def stop(self) -> None:
        """Give the terminal back, also after an error in mid-run."""
        self._progress.stop()
