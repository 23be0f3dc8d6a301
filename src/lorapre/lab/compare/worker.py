"""One run of a comparison, in a process of its own: nothing that it does can harm the others."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lorapre import NonFiniteGradientError
from lorapre.lab.compare.runs import record_failure
from lorapre.lab.config import PretrainConfig
from lorapre.lab.errors import TrainingDivergedError
from lorapre.lab.preparation import load_planned_corpus, plan_run
from lorapre.lab.run_folder import RunFolder, write_text
from lorapre.lab.training import train


@dataclass(frozen=True)
class Assignment:
    """What a worker process is told.

    Attributes:
        config: options of this run alone.
        folder: an empty folder.
        threads: for the CPU's work; None leaves torch's own choice.
        bigram: cross-entropy of the bigram model, computed once for all runs.
    """

    config: dict[str, Any]
    folder: Path
    threads: int | None
    bigram: float


def run_assignment(assignment: Assignment) -> None:
    """Train, and leave ``summary.json`` or ``failure.json`` in the folder; prints go to ``log.txt`` there."""
    _redirect_output(assignment.folder / "log.txt")
    _end_with_parent()
    if assignment.threads is not None:
        torch.set_num_threads(assignment.threads)
    try:
        _train(assignment)
    except (NonFiniteGradientError, TrainingDivergedError) as error:
        record_failure(assignment.folder, "diverged", str(error.args[0]).partition(". ")[0])
    except Exception as error:  # whatever a peer raises is a row of the table
        traceback.print_exc()
        record_failure(assignment.folder, "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _train(assignment: Assignment) -> None:
    config = PretrainConfig.model_validate(assignment.config)
    folder = RunFolder(assignment.folder)
    write_text(folder.config, config.to_yaml())
    console = Console(width=100)
    plan = plan_run(config)
    corpus = load_planned_corpus(plan, console)
    train(
        config,
        plan.model.build(config.seed),
        corpus,
        folder,
        console,
        micro_batch=plan.micro_batch,
        bigram=assignment.bigram,
        resume=False,
        keep_model=False,
    )


def _redirect_output(path: Path) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    logging.captureWarnings(True)


def _end_with_parent() -> None:
    """End this process when the one that asked for it is gone: a run that is made twice would write one folder."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()
