"""One fine-tuning run: the model, its adapter and optimizer, the trainer, and what is measured before and after."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import PrinterCallback, ProgressCallback

from lorapre.lab.callbacks import (
    CheckpointMarker,
    DivergenceGuard,
    LastStep,
    MetricsWriter,
    ProgressBar,
)
from lorapre.lab.config import PretrainConfig
from lorapre.lab.finetune.base import load_base
from lorapre.lab.finetune.evaluation import answer_room, exact_match, questions
from lorapre.lab.finetune.methods import adapter_kind, add_adapter, optimizer_arguments
from lorapre.lab.finetune.packing import PackedCollator, pack
from lorapre.lab.finetune.preparation import Data, Plan, planned_recipe
from lorapre.lab.finetune.quiet import keep_quiet
from lorapre.lab.finetune.saving import save_result
from lorapre.lab.finetune.trainer import FinetuneTrainer, trainer_arguments
from lorapre.lab.optimizers import matrix_parameters
from lorapre.lab.optimizers.measure import adamw_state_bytes, state_bytes
from lorapre.lab.run_folder import RunFolder, write_json
from lorapre.lab.timing import StepTimer, peak_bytes
from lorapre.lab.training import last_validation, run_trainer, starting_point, trainer_options, unwrapped


@dataclass(frozen=True)
class Tuned:
    """A model that has been trained, on its device and with its adapter if it has one; and the run's summary.

    Attributes:
        model: on every process.
        summary: content of ``summary.json``.
        matrix_state_bytes: the optimizer's state of attention and MLP alone, or of the adapter.
        writes: this process is the one that writes.
    """

    model: Any
    summary: dict[str, Any]
    matrix_state_bytes: int
    writes: bool


def tune(plan: Plan, data: Data, source: str, folder: RunFolder, console: Console, *, resume: bool) -> dict[str, Any]:
    """Train once, fill ``folder`` with checkpoints, the result and ``summary.json``, and return the summary.

    Args:
        plan: of the run.
        data: in tokens.
        source: folder or hub name of the weights to begin with.
        folder: an existing folder.
        console: for the progress bar.
        resume: go on from the last complete checkpoint, if there is one.

    Raises:
        UserError: the weights cannot be loaded.
        TrainingDivergedError: the loss is no longer finite.
    """
    tuned = train_once(plan, data, source, folder, console, resume=resume)
    if tuned.writes:
        save_result(folder, tuned.model, plan.base.tokenizer)  # type: ignore[arg-type]
        write_json(folder.summary, tuned.summary)
    return tuned.summary


def train_once(
    plan: Plan, data: Data, source: str, folder: RunFolder, console: Console, *, resume: bool, checkpoints: bool = True
) -> Tuned:
    """As `tune`, but that the result is returned, not saved; without ``checkpoints`` none is saved on the way either.

    ``folder`` gets ``before.json`` and ``metrics.jsonl``.
    """
    keep_quiet()
    config = plan.config
    shared = planned_recipe(plan, data.steps)
    whole = load_base(source, config.dtype)
    parameters = sum(param.numel() for param in whole.parameters())
    model = add_adapter(whole, config, plan.method)
    trainable = [param for param in model.parameters() if param.requires_grad]
    adamw_bytes = adamw_state_bytes(trainable)
    trainer, metrics, timer, bar, checkpoint = _trainer(
        plan, data, shared, model, folder, console, resume=resume, checkpoints=checkpoints
    )
    main = trainer.args.process_index == 0
    before = _before(trainer, plan, data, folder)
    run_trainer(trainer, checkpoint, bar, metrics)
    optimizer = unwrapped(trainer.optimizer)
    held = state_bytes(optimizer)
    loss = last_validation(trainer, data.steps)
    trained = trainer.accelerator.unwrap_model(trainer.model)
    seen = data.steps * config.batch_size * len(data.train.rows) / data.rows
    seconds = max(metrics.seconds, 1e-9)
    summary: dict[str, Any] = {
        "method": config.method,
        "optimizer": plan.method.optimizer,
        "adapter": adapter_kind(config, plan.method),
        "adapter_rank": config.rank if plan.method.adapter is not None else config.adapter_rank,
        "rank": config.rank if plan.compression is not None else None,
        "compressed_matrices": None if plan.compression is None else plan.compression.compressed,
        "options": config.options,
        "model": config.model,
        "parameters": parameters,
        "trainable_parameters": sum(param.numel() for param in trainable),
        "data": data.examples.description,
        "template": data.template.name,
        "examples": {
            "train": len(data.train.rows),
            "valid": len(data.valid.rows),
            "cut": len(data.train.cut) + len(data.valid.cut),
            "dropped": len(data.train.dropped) + len(data.valid.dropped),
        },
        "lr": shared.lr,
        "dense_lr": shared.dense_lr,
        "steps": data.steps,
        "epochs": round(data.steps * config.batch_size / data.rows, 3),
        "valid_loss_before": before["valid_loss"],
        "valid_loss": loss,
        "exact_match_before": before["exact_match"],
        "exact_match": _exact_match(trained, plan, data) if main else None,
        "state_bytes": held,
        "adamw_state_bytes": adamw_bytes,
        "seconds": round(metrics.seconds, 1),
        "examples_per_second": round(seen / seconds, 1),
        "peak_bytes": peak_bytes(),
        **timer.results(),
    }
    adapted = adapter_kind(config, plan.method) is not None
    matrices = state_bytes(optimizer, None if adapted else matrix_parameters(trained))
    return Tuned(trained, summary, matrices, main)


def _trainer(
    plan: Plan,
    data: Data,
    shared: PretrainConfig,
    model: nn.Module,
    folder: RunFolder,
    console: Console,
    *,
    resume: bool,
    checkpoints: bool,
) -> tuple[FinetuneTrainer, MetricsWriter, StepTimer, ProgressBar, Path | None]:
    """The trainer with its callbacks, and the checkpoint to go on from."""
    config = plan.config
    torch.serialization.add_safe_globals(list(plan.method.entry.checkpoint_types()))
    lr = shared.lr
    assert lr is not None
    if plan.method.clips:
        shared = shared.model_copy(update={"max_grad_norm": 0.0})
    options = trainer_options(shared, folder, lr, plan.micro_batch, checkpoints=checkpoints)
    if config.packing:  # validation rows are not packed: as many as have the tokens of a packed batch
        longest = max(len(row.ids) for row in data.valid.rows)
        options["per_device_eval_batch_size"] = plan.micro_batch * max(1, config.max_length // longest)
    arguments = trainer_arguments(options, gradient_checkpointing=config.checkpointing)
    main = arguments.process_index == 0
    checkpoint, previous = starting_point(arguments, folder, resume=resume)
    metrics = MetricsWriter(folder, config.batch_size, previous, unit="sequences")
    timer = StepTimer()
    bar = ProgressBar(console, config.method, config.batch_size, unit="seq")
    rows, tokenizer = data.train.dataset(), plan.base.tokenizer
    assert tokenizer is not None
    optimizer = optimizer_arguments(model, config, shared, plan.method)
    trainer = FinetuneTrainer(
        data.valid.dataset(),
        tokenizer.pad_token_id,
        model=model,
        args=arguments,
        train_dataset=pack(rows, config.max_length) if config.packing else rows,
        data_collator=PackedCollator(tokenizer.pad_token_id) if config.packing else None,
        processing_class=tokenizer,
        optimizers=(optimizer.made, None),
        optimizer_cls_and_kwargs=optimizer.kind,
        callbacks=[metrics, timer, DivergenceGuard(), LastStep(), CheckpointMarker(), *([bar] if main else [])],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer, metrics, timer, bar, checkpoint


def _before(trainer: FinetuneTrainer, plan: Plan, data: Data, folder: RunFolder) -> dict[str, Any]:
    """Loss and answers of the model as it came; measured once, however often the run is resumed."""
    path = folder.path / "before.json"
    if not path.exists():
        loss = trainer.evaluate()["eval_loss"]
        if trainer.args.process_index == 0:
            match = _exact_match(trainer.accelerator.unwrap_model(trainer.model), plan, data)
            write_json(path, {"valid_loss": loss, "exact_match": match})
        trainer.accelerator.wait_for_everyone()
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _exact_match(model: Any, plan: Plan, data: Data) -> float | None:
    final = data.examples.form.final
    asked = questions(data.valid, final, plan.config.answered)
    if not asked:
        return None
    assert plan.base.tokenizer is not None
    limit = getattr(plan.base.config, "max_position_embeddings", None) or 10**9
    room = max(1, min(answer_room(data.valid), limit - max(len(question.prompt) for question in asked)))
    with torch.autocast(model.device.type, torch.bfloat16, enabled=plan.config.bf16):
        return exact_match(model, plan.base.tokenizer, asked, final, room)
