"""All that can go wrong before a model is loaded: options that do not fit, data that is wrong, a disk too small."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lorapre.lab.config import PretrainConfig
from lorapre.lab.errors import UserError
from lorapre.lab.finetune.base import Base, check_vocabulary, find_base
from lorapre.lab.finetune.config import FinetuneConfig, recipe
from lorapre.lab.finetune.data import Examples, data_format, load_examples
from lorapre.lab.finetune.methods import (
    Compression,
    Method,
    adapter_kind,
    add_adapter,
    compression,
    compression_warning,
    find_method,
    learning_rates,
)
from lorapre.lab.finetune.packing import pack
from lorapre.lab.finetune.templates import Template, choose_template
from lorapre.lab.finetune.tokens import Encoded, encode, truncation_warning
from lorapre.lab.finetune.trainer import steps_of
from lorapre.lab.optimizers import check_options, check_rank_compresses


@dataclass(frozen=True)
class Plan:
    """A configuration that has been checked as far as possible without data; ``meta`` has shapes and dtypes alone."""

    config: FinetuneConfig
    method: Method
    base: Base
    meta: nn.Module
    compression: Compression | None
    micro_batch: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Data:
    """Both sides in tokens; ``rows`` is what an epoch of training has, packed or not."""

    examples: Examples
    template: Template
    train: Encoded
    valid: Encoded
    rows: int
    steps: int
    warnings: tuple[str, ...]


def plan_run(config: FinetuneConfig, processes: int = 1, *, dry: bool = False) -> Plan:
    """Check model, method, rank, options and batch against each other.

    The plan's ``config.options`` are as they are recorded: numbers as numbers, however they were written.

    Raises:
        UserError: they do not fit.
    """
    method = find_method(config)
    data_format(config)
    pieces = config.accumulation * processes
    if config.batch_size % pieces:
        raise UserError(
            f"--batch-size {config.batch_size}: cannot be split into --accumulation {config.accumulation} x "
            f"{processes} process(es) equal parts. Give a multiple of {pieces}."
        )
    base = find_base(config, dry=dry)
    meta = _as_trained(add_adapter(base.on_meta(), config, method), config, method)
    shared = recipe(config, method.optimizer, config.steps or 1, save_every=None)
    found = compression(meta, config, method)
    warnings = []
    if found is not None:
        if config.adapter is None:
            check_rank_compresses(meta, shared)
        elif warning := compression_warning(found, config):
            warnings.append(warning)
    if method.adapter is not None and config.options:
        raise UserError(f"--set: --method {method.name} takes no options. Leave them out.")
    options = {} if method.adapter is not None else check_options(method.entry, meta, shared)
    if config.dtype == "bfloat16" and adapter_kind(config, method) is None and not options.get("stochastic_rounding"):
        offered = "stochastic_rounding" in method.entry.options
        warnings.append(
            "--dtype bfloat16: weights of 8 bits lose updates below about 1/500 of themselves, which at the usual "
            "rates are many. Train float32 weights with --bf16, or an adapter"
            f"{', or round by chance: --set stochastic_rounding=true' if offered else ''}."
        )
    config = config.model_copy(update={"options": options})
    return Plan(config, method, base, meta, found, config.batch_size // pieces, tuple(warnings))


def _as_trained(model: nn.Module, config: FinetuneConfig, method: Method) -> nn.Module:
    """``model``, on the meta device, in the dtype of ``config``; adapters are float32 in any."""
    adapted = adapter_kind(config, method) is not None
    for param in model.parameters():
        if not (adapted and param.requires_grad):
            param.data = param.data.to(getattr(torch, config.dtype))
    return model


def planned_recipe(plan: Plan, steps: int) -> PretrainConfig:
    """The `recipe` of a run of ``steps``, with its learning rates.

    Raises:
        UserError: the intervals of logging and saving do not fit together.
    """
    lr, dense_lr = learning_rates(plan.config, plan.method)
    return recipe(plan.config, plan.method.optimizer, steps, lr=lr, dense_lr=dense_lr)


def load_data(plan: Plan) -> Data:
    """The examples of a plan in tokens, fitted to the model.

    Raises:
        UserError: something in them is wrong, or ``--max-length`` leaves none.
    """
    config, tokenizer = plan.config, plan.base.tokenizer
    assert tokenizer is not None
    examples = load_examples(config)
    template = choose_template(config, examples.form, tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"--model {config.model}: its tokenizer has neither a padding nor an end-of-text token. Set eos_token in "
            "its tokenizer_config.json."
        )
    sides = []
    warnings = []
    if examples.unanswered:
        warnings.append(
            f"--data {config.data}: the hub has {examples.unanswered:,} records without an answer there. They are left "
            "out."
        )
    for name, side in (("training", examples.train), ("validation", examples.valid)):
        encoded = encode(
            side, template, tokenizer, max_length=config.max_length, completion_only=not config.learn_prompts
        )
        if warning := truncation_warning(encoded, config.max_length):
            warnings.append(f"{name}: {warning}")
        if not encoded.rows:
            raise UserError(f"--max-length {config.max_length}: {warning}")
        check_vocabulary(plan.base, max(max(row.ids) for row in encoded.rows))
        sides.append(encoded)
    train, valid = sides
    rows = len(pack(train.dataset(), config.max_length)) if config.packing else len(train.rows)
    steps = config.steps or steps_of(rows, config.batch_size, config.total_epochs)
    return Data(examples, template, train, valid, rows, steps, tuple(warnings))
