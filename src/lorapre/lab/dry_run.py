"""``lorapre pretrain --dry-run``: what a run would be, without reading its data or building its model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from lorapre.lab.config import PretrainConfig
from lorapre.lab.data import check_data_spec
from lorapre.lab.data.encode import id_count
from lorapre.lab.data.local import open_local
from lorapre.lab.data.sources import find_files
from lorapre.lab.data.tokenizer import bpe_vocabulary, is_local, read_tokenizer
from lorapre.lab.models import PUBLISHED_VOCABULARY
from lorapre.lab.optimizers import OPTIMIZERS, OptimizerEntry, matrix_parameters, matrix_state_bytes
from lorapre.lab.optimizers.hybrid import parts_of
from lorapre.lab.optimizers.measure import adamw_state_bytes, state_bytes
from lorapre.lab.optimizers.options import written
from lorapre.lab.preparation import Plan, plan_run
from lorapre.memory import scratch_bytes
from lorapre.optim.summary import format_bytes


def print_dry_run(config: PretrainConfig, console: Console) -> None:
    """Print model, memory, tokens and steps.

    Raises:
        UserError: the options do not fit together.
    """
    plan = plan_run(config)
    _check_files(config)
    config = plan.config
    vocabulary = _vocabulary(plan)
    if plan.model.resizable:
        plan.model.with_vocabulary(vocabulary, vocabulary - 1)
    model = plan.model.build(config.seed, device="meta")
    entry = OPTIMIZERS[config.optimizer]
    adamw = adamw_state_bytes(model.parameters())
    parameters = sum(param.numel() for param in model.parameters())
    memory = training_memory(config, entry, model)

    rank = [f"rank {config.rank}"] if entry.ranked else []
    table = Table.grid(padding=(0, 2))
    rows = [
        ("model", f"{config.model}, {parameters:,} parameters, vocabulary of {model.config.vocab_size:,}"),
        ("data", ", ".join(config.data)),
        ("optimizer", ", ".join([config.optimizer, *rank, *written(config.options)])),
        ("steps", f"{config.total_steps:,}"),
        (
            "tokens",
            f"{config.total_steps * config.tokens_per_step:,} ({config.batch_size} x {config.sequence_length} a step, "
            f"in {config.accumulation} forward pass(es))",
        ),
        ("weights", format_bytes(memory.weights)),
        ("gradients", format_bytes(memory.gradients)),
        ("optimizer state", f"{format_bytes(memory.state)} (AdamW: {format_bytes(adamw)})"),
        ("step scratch", "not known" if memory.scratch is None else f"at most {format_bytes(memory.scratch)}"),
        ("sum", f"{format_bytes(memory.total)}, activations not counted"),
    ]
    for name, value in rows:
        table.add_row(f"[bold]{name}[/]", escape(value))
    console.print(table)


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes; ``scratch`` is None where `lorapre.memory.scratch_bytes` does not know it."""

    weights: int
    gradients: int
    state: int
    scratch: int | None

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.state + (self.scratch or 0)


def training_memory(config: PretrainConfig, entry: OptimizerEntry, model: nn.Module) -> TrainingMemory:
    """Of training ``model``, which is on the meta device, and is factorised here if the method does so."""
    scratch = None
    if entry.compresses_stacks:  # no formula knows every shape; on the meta device the state itself can be counted
        kind, kwargs = entry.build(model, config, entry.default_lr, entry.default_dense_lr)
        optimizer = kind(**kwargs)
        parts = parts_of(optimizer)
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        known = [found for part in parts if (found := scratch_bytes(part, device)) is not None]
        scratch = max(known) if len(known) == len(parts) else None
        created = {param for part in parts for param in part.state}  # torch's AdamW creates its own at the first step
        state = state_bytes(optimizer) + adamw_state_bytes(set(model.parameters()) - created)
    else:
        matrices = matrix_state_bytes(entry, model, config.rank, config.options) or 0
        state = matrices + adamw_state_bytes(model.parameters()) - adamw_state_bytes(matrix_parameters(model))
    if entry.prepare is not None:
        entry.prepare(model, config)
    params = list(model.parameters())
    gradients = sum(param.numel() * param.element_size() for param in params if param.requires_grad)
    return TrainingMemory(sum(p.numel() * p.element_size() for p in params), gradients, state, scratch)


def _vocabulary(plan: Plan) -> int:
    """The tokenizer's size, as far as it can be told without training or downloading one."""
    spec = plan.tokenizer
    if spec is None:
        return PUBLISHED_VOCABULARY
    trained = bpe_vocabulary(spec)
    if trained is not None:
        return trained
    return id_count(read_tokenizer(spec)) if is_local(spec) else PUBLISHED_VOCABULARY


def _check_files(config: PretrainConfig) -> None:
    """Find the files that the run would read, and read none of them.

    Raises:
        UserError: the run would not find them.
    """
    if check_data_spec(config.data) == "hub":
        if config.valid_data:
            find_files(config.valid_data, config.text_field, "valid_data")
        return
    open_local(
        config.data,
        text_field=config.text_field,
        valid_data=config.valid_data,
        valid_fraction=config.valid_fraction,
        status=lambda _: None,
    )
