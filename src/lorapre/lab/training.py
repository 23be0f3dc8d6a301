"""One training run with ``transformers.Trainer``, from fresh weights or from its last checkpoint."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, Subset
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from lorapre.lab.baselines.factorised import merge_factorised
from lorapre.lab.callbacks import (
    AlreadyTrained,
    CheckpointMarker,
    DivergenceGuard,
    LastStep,
    MetricsWriter,
    ProgressBar,
    perplexity,
)
from lorapre.lab.config import PretrainConfig
from lorapre.lab.data import BlockDataset, TextCorpus
from lorapre.lab.diagnose import diagnostics_writer, plot_diagnostics
from lorapre.lab.errors import UserError
from lorapre.lab.optimizers import find_optimizer, matrix_parameters, matrix_state_bytes
from lorapre.lab.optimizers.measure import adamw_state_bytes, state_bytes
from lorapre.lab.plots import plot_loss
from lorapre.lab.run_folder import RunFolder, damaged_checkpoint, write_atomically, write_json
from lorapre.lab.timing import StepTimer, peak_bytes


def schedule_arguments(config: PretrainConfig, lr: float) -> dict[str, Any]:
    """The Trainer's names for ``--schedule``: a linear warm-up, then down to ``min_lr_ratio`` of the peak."""
    if config.schedule == "cosine":
        kind, options = "cosine_with_min_lr", {"min_lr_rate": config.min_lr_ratio}
    elif config.schedule == "linear":
        kind, options = "polynomial", {"power": 1.0, "lr_end": config.min_lr_ratio * lr}
    else:
        kind, options = "constant_with_warmup", {}
    return {
        "lr_scheduler_type": kind,
        "lr_scheduler_kwargs": options,
        "warmup_steps": round(config.warmup * config.total_steps),
    }


def training_arguments(
    config: PretrainConfig, folder: RunFolder, lr: float, micro_batch: int, *, checkpoints: bool
) -> TrainingArguments:
    """``config`` in the Trainer's words; without ``checkpoints`` none is saved on the way."""
    return TrainingArguments(**trainer_options(config, folder, lr, micro_batch, checkpoints=checkpoints))


def trainer_options(
    config: PretrainConfig, folder: RunFolder, lr: float, micro_batch: int, *, checkpoints: bool
) -> dict[str, Any]:
    """Keywords of ``transformers.TrainingArguments``, or of a class of it."""
    return dict(
        output_dir=str(folder.checkpoints),
        max_steps=config.total_steps,
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=micro_batch,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=lr,
        **schedule_arguments(config, lr),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=config.bf16,
        torch_compile=config.compile,
        use_cpu=not torch.accelerator.is_available(),  # else the Trainer takes bf16 for a GPU's
        seed=config.seed,
        data_seed=config.seed,
        logging_steps=config.log_interval,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=config.eval_interval,
        prediction_loss_only=True,
        save_strategy="steps" if checkpoints else "no",
        save_steps=config.save_interval,
        save_total_limit=config.keep_checkpoints,
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # no buffer of a language model changes in training; SLTrain's support is large
        average_tokens_across_devices=False,
        disable_tqdm=True,
        report_to="none",
        log_level="error",
    )


class _LabTrainer(Trainer):
    """Makes the Trainer count exactly, whatever the number of processes and forward passes.

    Each epoch leaves out what does not fill a step: with accumulation the Trainer would end it with a step on fewer
    sequences than ``metrics.jsonl`` counts. Validation takes each sequence once: the Trainer would drop those that
    do not fill a batch, or repeat others to fill it.
    """

    def __init__(self, batch_size: int, valid: BlockDataset, **kwargs: Any) -> None:
        super().__init__(eval_dataset=valid, **kwargs)
        self._batch_size = batch_size
        self._valid = valid

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, RandomSampler):  # a stream has no order but its own, and no end
            return sampler
        blocks = sampler.num_samples // self._batch_size * self._batch_size
        return RandomSampler(sampler.data_source, num_samples=blocks, generator=sampler.generator)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss over the validation blocks, which all have the same length."""
        args = self.args
        # Not DistributedDataParallel's wrapper: it would wait for processes that have one batch less.
        model = self.accelerator.unwrap_model(self.model).eval()
        mine = Subset(self._valid, range(args.process_index, len(self._valid), args.world_size))
        total = 0.0
        for batch in DataLoader(mine, args.per_device_eval_batch_size, collate_fn=self.data_collator):
            with torch.no_grad():
                loss = model(**self._prepare_inputs(batch)).loss
            total += float(loss) * len(batch["input_ids"])
        everywhere = self.accelerator.gather(torch.tensor([total], device=args.device))
        metrics = {"eval_loss": float(everywhere.sum()) / len(self._valid)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics


def train(
    config: PretrainConfig,
    model: PreTrainedModel,
    corpus: TextCorpus,
    folder: RunFolder,
    console: Console,
    *,
    micro_batch: int,
    bigram: float,
    resume: bool,
    keep_model: bool = True,
) -> dict[str, Any]:
    """Train once, fill ``folder``, and return its summary.

    Args:
        config: of this run alone; ``compare`` is not read.
        model: to be trained in place.
        corpus: training and validation blocks.
        folder: an existing folder.
        console: for the progress bar.
        micro_batch: sequences in one forward pass of one process.
        bigram: cross-entropy of the bigram model on the validation text.
        resume: go on from the last complete checkpoint, if there is one.
        keep_model: save checkpoints on the way and the model at the end; else metrics and summary alone.

    Raises:
        TrainingDivergedError: the loss is no longer finite.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    entry = find_optimizer(config.optimizer)
    torch.serialization.add_safe_globals(list(entry.checkpoint_types()))
    others = {id(param) for param in model.parameters()} - {id(param) for param in matrix_parameters(model)}
    formula_bytes = matrix_state_bytes(entry, model, config.rank, config.options)
    adamw_bytes = adamw_state_bytes(model.parameters())
    if entry.prepare is not None:
        entry.prepare(model, config)
    matrices = [param for param in model.parameters() if param.requires_grad and id(param) not in others]
    lr = entry.default_lr if config.lr is None else config.lr
    dense_lr = entry.default_dense_lr if config.dense_lr is None else config.dense_lr
    arguments = training_arguments(config, folder, lr, micro_batch, checkpoints=keep_model)
    main = arguments.process_index == 0
    checkpoint, previous = starting_point(arguments, folder, resume=resume)
    metrics = MetricsWriter(folder, config.tokens_per_step, previous)
    timer = StepTimer()
    diagnostics = diagnostics_writer(config, folder, checkpoint) if main else []
    bar = ProgressBar(console, config.optimizer, config.tokens_per_step)
    trainer = _LabTrainer(
        config.batch_size,
        corpus.valid,
        model=model,
        args=arguments,
        train_dataset=corpus.train,
        optimizer_cls_and_kwargs=entry.build(model, config, lr, dense_lr),
        callbacks=[
            metrics,
            timer,
            DivergenceGuard(),
            LastStep(),
            *diagnostics,
            CheckpointMarker(),
            *([bar] if main else []),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    run_trainer(trainer, checkpoint, bar, metrics)
    valid_loss = last_validation(trainer, config.total_steps)
    summary: dict[str, Any] = {
        "optimizer": config.optimizer,
        "model": config.model,
        "parameters": sum(param.numel() for param in model.parameters()),
        "data": corpus.description,
        "rank": config.rank if entry.ranked else None,
        "options": config.options,
        "lr": lr,
        "dense_lr": dense_lr,
        "steps": config.total_steps,
        "tokens": config.total_steps * config.tokens_per_step,
        "valid_loss": valid_loss,
        "valid_perplexity": perplexity(valid_loss),
        "bigram_loss": bigram,
        "bigram_perplexity": perplexity(bigram),
        "best_valid_loss": _best_validation(folder, valid_loss),
        "state_bytes": state_bytes(unwrapped(trainer.optimizer)),
        "matrix_state_bytes": state_bytes(unwrapped(trainer.optimizer), matrices),
        "formula_bytes": formula_bytes,
        "adamw_state_bytes": adamw_bytes,
        "seconds": round(metrics.seconds, 1),
        "tokens_per_second": round(config.total_steps * config.tokens_per_step / max(metrics.seconds, 1e-9), 1),
        "peak_bytes": peak_bytes(),
        **timer.results(),
    }
    if main:
        if keep_model:
            _save_model(folder, trainer, corpus)
            plot_loss(
                folder.plot,
                {summary["optimizer"]: folder.read_metrics()},
                bigram=bigram,
                title=f"{config.model} on {corpus.description}",
            )
        if diagnostics:
            plot_diagnostics(folder, f"{config.model}, {entry.title}")
        write_json(folder.summary, summary)
    return summary


def starting_point(
    arguments: TrainingArguments, folder: RunFolder, *, resume: bool
) -> tuple[Path | None, list[dict[str, Any]]]:
    """The checkpoint to go on from, the same on every process, and the first process's records up to it.

    ``arguments`` keep to one device a process: over several the Trainer would take DataParallel and multiply the
    batch; torchrun is for these.
    """
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    main = arguments.process_index == 0
    checkpoint = folder.last_checkpoint() if resume and main else None
    if arguments.world_size > 1:
        shared = [checkpoint]
        torch.distributed.broadcast_object_list(shared, src=0)
        checkpoint = shared[0]
    if not main:
        return checkpoint, []
    done = int(checkpoint.name.rpartition("-")[2]) if checkpoint is not None else 0
    return checkpoint, folder.rewind_metrics(done)


def run_trainer(trainer: Trainer, checkpoint: Path | None, bar: ProgressBar, metrics: MetricsWriter) -> None:
    """Train to the end, from ``checkpoint`` if there is one; the peak of the GPU's memory is counted from here.

    Raises:
        UserError: ``checkpoint`` cannot be read.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        with contextlib.suppress(AlreadyTrained):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except Exception as error:  # of torch, safetensors, json: each file of a checkpoint fails in its own way
        if checkpoint is None or metrics.began or isinstance(error, UserError):
            raise
        raise damaged_checkpoint(checkpoint, error) from error
    finally:
        bar.stop()
    metrics.pause()


def last_validation(trainer: Trainer, steps: int) -> float:
    """The validation loss after ``steps``, measured now if the run has not."""
    for record in reversed(trainer.state.log_history):
        if "eval_loss" in record and record["step"] == steps:
            return float(record["eval_loss"])
    return float(trainer.evaluate()["eval_loss"])


def _best_validation(folder: RunFolder, last: float) -> float:
    return min((record["valid_loss"] for record in folder.read_metrics() if "valid_loss" in record), default=last)


def _save_model(folder: RunFolder, trainer: Trainer, corpus: TextCorpus) -> None:
    model = merge_factorised(trainer.accelerator.unwrap_model(trainer.model))

    def save(path: Any) -> None:
        model.save_pretrained(path)
        corpus.tokenizer.save_pretrained(path)

    write_atomically(folder.model, save)


def unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer inside accelerate's wrapper."""
    inner: Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner
