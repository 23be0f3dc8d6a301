"""One process's runs: data in tokens once, then training after training by the code of ``lorapre finetune``."""

from __future__ import annotations

import lorapre.lab.quiet  # noqa: F401  # isort: skip  (first: it keeps packages from printing when imported)

import gc
import json
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console

from finetune.plan import Run
from finetune.profiles import Contestant, Profile
from finetune.testing import read_questions, test_model
from finetune.tokens import base_data, of_seed
from lorapre import NonFiniteGradientError
from lorapre.lab.errors import TrainingDivergedError
from lorapre.lab.finetune.config import FinetuneConfig, build_finetune_config
from lorapre.lab.finetune.preparation import Data, Plan, plan_run
from lorapre.lab.finetune.quiet import keep_quiet
from lorapre.lab.finetune.training import Tuned, train_once
from lorapre.lab.run_folder import RunFolder, write_json

#: Training losses of a row's curve, at most about.
POINTS = 40


class Trainer:
    """Makes one run after the other on one device; checkpoints and models are not saved.

    Args:
        material: folder of `finetune.material`.
        profile: what to train.
    """

    def __init__(self, material: Path, profile: Profile) -> None:
        keep_quiet()
        self._material, self._profile = material, profile
        self._questions = read_questions(material, profile.task)
        self._data: dict[int, Data] = {}
        self._loss_before: float | None = None

    def train(self, run: Run) -> dict[str, Any]:
        """Make ``run``; its row. Of a run that diverges the loss is None."""
        began = time.monotonic()
        contestant = self._profile.contestants[run.contestant]
        plan, data = self._prepare(run, contestant)
        prepared = time.monotonic()
        with tempfile.TemporaryDirectory() as place:
            folder = RunFolder(Path(place), "finetune")
            if self._loss_before is not None:  # the same for all: the model as it came
                write_json(folder.path / "before.json", {"valid_loss": self._loss_before, "exact_match": None})
            tuned: Tuned | None = None
            try:
                source = str(self._material / "model")
                tuned = train_once(plan, data, source, folder, Console(quiet=True), resume=False, checkpoints=False)
            except (TrainingDivergedError, NonFiniteGradientError):
                pass
            metrics = folder.read_metrics()
            before = json.loads((folder.path / "before.json").read_text(encoding="utf-8"))
        self._loss_before = before["valid_loss"]
        trained = time.monotonic()
        row = {
            **asdict(run),
            "method": contestant.method,
            "rank": contestant.rank,
            "options": dict(contestant.options),
            **self._profile.protocol,
            "train_size": len(data.train.rows),
            "train_tokens": data.train.tokens,
            "learned_tokens": data.train.learned,
            "steps": data.steps,
            **self._facts(tuned),
            "loss_before": self._loss_before,
            "curve": [(0, self._loss_before)]
            + [
                (record["step"], record["valid_loss"])
                for record in metrics
                if "valid_loss" in record and record["step"]
            ],
            "train_curve": [(record["step"], round(record["loss"], 4)) for record in metrics if "loss" in record],
        }
        if run.kind == "test" and tuned is not None:
            row |= self._test(tuned, plan)
        del tuned
        gc.collect()  # the trainer and what it holds refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        ended = time.monotonic()
        return row | {
            "prepared": round(prepared - began, 1),
            "trained": round(trained - prepared, 1),
            "tested": round(ended - trained, 1),
            "seconds": round(ended - began, 1),
        }

    def _facts(self, tuned: Tuned | None) -> dict[str, Any]:
        """Of the summary; None where the run diverged, and where a CPU cannot tell the peak of one run."""
        names = ("trainable_parameters", "state_bytes", "adamw_state_bytes", "optimizer_ms", "training_ms")
        summary = {} if tuned is None else tuned.summary
        return {
            "loss": summary.get("valid_loss"),
            **{name: summary.get(name) for name in names},
            "matrix_state_bytes": None if tuned is None else tuned.matrix_state_bytes,
            "peak_bytes": summary.get("peak_bytes") if torch.cuda.is_available() else None,
            "examples_per_s": summary.get("examples_per_second"),
        }

    def _test(self, tuned: Tuned, plan: Plan) -> dict[str, Any]:
        """Adapters are merged in float32, so that all are rounded to bfloat16 alike."""
        model = tuned.model.merge_and_unload() if isinstance(tuned.model, PeftModel) else tuned.model
        model = model.eval()
        if self._profile.bf16:
            model = model.to(torch.bfloat16)
        return test_model(model, plan.base.tokenizer, self._questions, self._profile.task)

    def _prepare(self, run: Run, contestant: Contestant) -> tuple[Plan, Data]:
        """Everything before the weights are loaded; the data of a seed is tokenized once."""
        config = run_config(self._profile, self._material, contestant, run)
        if run.seed not in self._data:
            plan = plan_run(config)
            first = self._profile.seeds[0]
            if first not in self._data:
                self._data[first] = base_data(_with_seed(plan, first), self._material, self._profile.task)
            if run.seed != first:
                self._data[run.seed] = of_seed(plan, self._data[first])
        data = self._data[run.seed]
        validations = 1 if run.kind == "speed" else self._profile.validations
        intervals = {"eval_every": -(-data.steps // validations), "log_every": max(1, data.steps // POINTS)}
        return plan_run(config.model_copy(update=intervals)), data

    def recover(self) -> bool:
        """Free what a failed run held; whether the device still answers, which it does not after an illegal access."""
        gc.collect()
        if torch.cuda.is_available():
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:
                return False
        return True


def _with_seed(plan: Plan, seed: int) -> Plan:
    return replace(plan, config=plan.config.model_copy(update={"seed": seed}))


def prepare_tokens(material: Path, profile: Profile) -> None:
    """Have the data in tokens on the disk before several processes ask for it."""
    contestant = next(iter(profile.rates))
    run = Run("search", "search", profile.task.name, str(contestant), profile.rates[contestant], profile.seeds[0])
    base_data(plan_run(run_config(profile, material, contestant, run)), material, profile.task)


def run_config(profile: Profile, material: Path, contestant: Contestant, run: Run) -> FinetuneConfig:
    """What ``lorapre finetune`` is given for ``run``."""
    task = profile.task
    options: dict[str, Any] = {
        "model": str(material / "model"),
        "data": task.data or str(material / task.train),
        "data_files": [str(material / task.train)] if task.data else [],
        "valid_data": [str(material / task.valid)] if task.valid else [],
        "valid_examples": profile.valid_examples,
        "max_examples": profile.train_examples,
        "template": "chat",
        "max_length": profile.max_length,
        "packing": True,
        "method": contestant.method,
        "options": dict(contestant.options),
        "lr": run.lr,
        "batch_size": profile.batch_size,
        "epochs": 1.0,
        "bf16": profile.bf16,
        "answers": 0,
        "seed": run.seed,
    }
    if contestant.rank is not None:
        options["rank"] = contestant.rank
    if not contestant.adapts:
        options["dense_lr"] = profile.dense_lr
    return build_finetune_config(options)


def make_trainer(material: Path, profile: Profile) -> Trainer:
    """In a worker: on the one GPU that it sees, or the CPU."""
    return Trainer(material, profile)
