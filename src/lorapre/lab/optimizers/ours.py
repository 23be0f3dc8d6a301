"""LoRA-Pre, and the AdamW that all are measured against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lorapre import LoRAPreAdamW, param_groups
from lorapre.lab.config import PretrainConfig
from lorapre.lab.optimizers.entry import Build, ClassAndKwargs, Group, OptimizerEntry, adamw_bytes
from lorapre.optim.adamw import PAPER_PRESET


def _lorapre(options: Mapping[str, Any]) -> Build:
    def build(model: nn.Module, config: PretrainConfig, lr: float, dense_lr: float) -> ClassAndKwargs:
        kwargs = {
            **options,
            "params": param_groups(model, rank=config.rank, dense={"lr": dense_lr}),
            "lr": lr,
            "betas": (config.beta1, config.beta2),
            "weight_decay": config.weight_decay,
            "seed": config.seed,
        }
        return LoRAPreAdamW, kwargs

    return build


def adamw_groups(model: nn.Module, dense_lr: float) -> list[Group]:
    """Groups for an optimizer of torch: the matrices, then the rest with its own learning rate."""
    ours = {"compress", "view_3d"}
    return [
        {key: value for key, value in group.items() if key not in ours}
        for group in param_groups(model, dense={"lr": dense_lr})
    ]


def _adamw(model: nn.Module, config: PretrainConfig, lr: float, dense_lr: float) -> ClassAndKwargs:
    return torch.optim.AdamW, {
        "params": adamw_groups(model, dense_lr),
        "lr": lr,
        "betas": (config.beta1, config.beta2),
        "weight_decay": config.weight_decay,
    }


def _factors(p: int, q: int, r: int) -> int:
    return 4 * (2 * (p + q) * r + 1)


ENTRIES = (
    OptimizerEntry(
        name="lorapre-adamw",
        title="LoRA-Pre AdamW",
        source="arXiv 2602.24283; this library's defaults",
        build=_lorapre({}),
        state_bytes=_factors,
        default_lr=5e-4,
        ranked=True,
        compresses_stacks=True,
    ),
    OptimizerEntry(
        name="lorapre-adamw-paper",
        title="LoRA-Pre Adam (paper)",
        source="arXiv 2602.24283, Algorithm 1 as printed; this library",
        build=_lorapre(PAPER_PRESET),
        state_bytes=_factors,
        default_lr=2e-3,
        ranked=True,
        compresses_stacks=True,
    ),
    OptimizerEntry(
        name="adamw",
        title="AdamW",
        source="arXiv 1711.05101; torch.optim",
        build=_adamw,
        state_bytes=lambda p, q, r: adamw_bytes(p * q),
        default_lr=1e-3,
        ranked=False,
    ),
)
