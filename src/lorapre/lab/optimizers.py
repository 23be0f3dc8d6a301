"""The optimizers that a recipe can name, each as one row: how to build it, and from which learning rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorapre import LoRAPreAdamW, param_groups
from lorapre.lab.config import PretrainConfig
from lorapre.lab.errors import UserError
from lorapre.optim.adamw import PAPER_PRESET
from lorapre.routing import matrix_view

ClassAndKwargs = tuple[type[torch.optim.Optimizer], dict[str, Any]]
Build = Callable[[nn.Module, PretrainConfig, float, float], ClassAndKwargs]


@dataclass(frozen=True)
class OptimizerEntry:
    """``build(model, config, lr, dense_lr)`` gives the class and keywords that ``transformers.Trainer`` takes."""

    build: Build
    default_lr: float
    default_dense_lr: float
    factored: bool


def _groups(model: nn.Module, config: PretrainConfig, dense_lr: float) -> list[dict[str, Any]]:
    return param_groups(model, rank=config.rank, dense={"lr": dense_lr})


def _lorapre(options: Mapping[str, Any]) -> Build:
    def build(model: nn.Module, config: PretrainConfig, lr: float, dense_lr: float) -> ClassAndKwargs:
        kwargs = {
            **options,
            "params": _groups(model, config, dense_lr),
            "lr": lr,
            "betas": (config.beta1, config.beta2),
            "weight_decay": config.weight_decay,
            "seed": config.seed,
        }
        return LoRAPreAdamW, kwargs

    return build


def _adamw(model: nn.Module, config: PretrainConfig, lr: float, dense_lr: float) -> ClassAndKwargs:
    ours = {"rank", "compress", "view_3d"}
    groups = [
        {key: value for key, value in group.items() if key not in ours} for group in _groups(model, config, dense_lr)
    ]
    kwargs = {
        "params": groups,
        "lr": lr,
        "betas": (config.beta1, config.beta2),
        "weight_decay": config.weight_decay,
    }
    return torch.optim.AdamW, kwargs


OPTIMIZERS: Mapping[str, OptimizerEntry] = {
    "lorapre-adamw": OptimizerEntry(_lorapre({}), default_lr=5e-4, default_dense_lr=4e-3, factored=True),
    "lorapre-adamw-paper": OptimizerEntry(
        _lorapre(PAPER_PRESET), default_lr=2e-3, default_dense_lr=4e-3, factored=True
    ),
    "adamw": OptimizerEntry(_adamw, default_lr=1e-3, default_dense_lr=4e-3, factored=False),
}


def find_optimizer(name: str, option: str = "--optimizer") -> OptimizerEntry:
    """The row called ``name``.

    Raises:
        UserError: there is none; ``option`` is the one to name in the message.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"{option} {name}: there is no such optimizer. Choose one of {', '.join(OPTIMIZERS)}.")
    return OPTIMIZERS[name]


def check_rank_compresses(model: nn.Module, config: PretrainConfig) -> None:
    """Make sure that the rank is below some matrix of ``model`` (which may be on the meta device).

    Raises:
        UserError: nothing would be compressed.
    """
    groups = param_groups(model, rank=config.rank)
    shapes = [
        (param.shape, group.get("view_3d", "stack"))
        for group in groups
        if group.get("compress", True)
        for _, param in group["params"]
    ]
    if not any(matrix_view(shape, config.rank, view_3d) for shape, view_3d in shapes):
        views = [view for shape, view_3d in shapes if (view := matrix_view(shape, 1, view_3d)) is not None]
        largest = max((min(view.p, view.q) for view in views), default=0)
        raise UserError(
            f"--rank {config.rank}: no matrix of --model {config.model} has a smaller side above it (the largest is "
            f"{largest}), so nothing would be compressed. Give a smaller rank, or a fraction such as "
            "0.25."
        )
