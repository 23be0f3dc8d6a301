"""Rivals that torch itself brings."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from lorapre.lab.config import PretrainConfig
from lorapre.lab.optimizers.beside import adam_options, beside_adamw, full_rank_groups
from lorapre.lab.optimizers.entry import ClassAndKwargs, OptimizerEntry, adamw_bytes, split_parameters


def _adam_without_momentum(model: nn.Module, config: PretrainConfig, lr: float, dense_lr: float) -> ClassAndKwargs:
    options = adam_options(config, lr) | {"betas": (0.0, config.beta2)}
    split = split_parameters(model, rank=None, dense_lr=dense_lr)
    part = (partial(torch.optim.AdamW, **options), full_rank_groups(split))
    return beside_adamw(part, split.dense, config, lr)


def _muon(model: nn.Module, config: PretrainConfig, lr: float, dense_lr: float) -> ClassAndKwargs:
    make = partial(
        torch.optim.Muon,
        lr=lr,
        weight_decay=config.weight_decay,
        momentum=0.95,
        nesterov=True,
        adjust_lr_fn="match_rms_adamw",
    )
    split = split_parameters(model, rank=None, dense_lr=dense_lr)
    return beside_adamw((make, full_rank_groups(split)), split.dense, config, lr)


def _adafactor(model: nn.Module, config: PretrainConfig, lr: float, dense_lr: float) -> ClassAndKwargs:
    make = partial(torch.optim.Adafactor, lr=lr, weight_decay=config.weight_decay)
    split = split_parameters(model, rank=None, dense_lr=dense_lr)
    return beside_adamw((make, full_rank_groups(split)), split.dense, config, lr)


def _sgd(model: nn.Module, config: PretrainConfig, lr: float, dense_lr: float) -> ClassAndKwargs:
    make = partial(torch.optim.SGD, lr=lr, momentum=0.9, weight_decay=config.weight_decay)
    split = split_parameters(model, rank=None, dense_lr=dense_lr)
    return beside_adamw((make, full_rank_groups(split)), split.dense, config, lr)


def _one_moment(p: int, q: int, r: int) -> int:
    return 4 * p * q


def _row_and_column(p: int, q: int, r: int) -> int:
    return 4 * (p + q + 1)


ENTRIES = (
    OptimizerEntry(
        name="adam-beta1-0",
        title="AdamW, beta1 = 0",
        source="arXiv 1711.05101; torch.optim",
        build=_adam_without_momentum,
        state_bytes=lambda p, q, r: adamw_bytes(p * q),
        default_lr=1e-3,
        ranked=False,
        limitations="torch keeps the first moment, here a copy of the gradient; the method needs half the state.",
    ),
    OptimizerEntry(
        name="muon",
        title="Muon",
        source="Keller Jordan's Muon at the scale of arXiv 2502.16982, 0.2 sqrt(max(p, q)); torch.optim",
        build=_muon,
        state_bytes=_one_moment,
        default_lr=2.5e-3,
        ranked=False,
        limitations="Momentum is 0.95 with Nesterov whatever --beta1 says; Newton-Schulz runs in bfloat16.",
    ),
    OptimizerEntry(
        name="adafactor",
        title="Adafactor",
        source="arXiv 1804.04235; torch.optim",
        build=_adafactor,
        state_bytes=_row_and_column,
        default_lr=4e-2,
        ranked=False,
        limitations=(
            "The learning rate is relative to the RMS of each matrix and capped at 1 / sqrt(step), which outlasts "
            "warm-up; no first moment, and a beta2 of its own, 1 - step^-0.8."
        ),
    ),
    OptimizerEntry(
        name="sgd",
        title="SGD, momentum 0.9",
        source="torch.optim",
        build=_sgd,
        state_bytes=_one_moment,
        default_lr=0.2,
        ranked=False,
        limitations="Weight decay is added to the gradient, not decoupled; momentum is 0.9 whatever --beta1 says.",
    ),
)
