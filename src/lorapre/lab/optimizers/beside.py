"""How another optimizer takes the matrices while torch's AdamW takes everything else."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from lorapre.lab.config import PretrainConfig
from lorapre.lab.optimizers.entry import ClassAndKwargs, Group, ParameterSplit
from lorapre.lab.optimizers.hybrid import HybridOptimizer, Part


def imported(module: str, name: str) -> Any:
    """``name`` of ``module``, which is imported now and no sooner: the registry must load without any peer."""
    return getattr(importlib.import_module(module), name)


def make_imported(module: str, name: str, **options: Any) -> Callable[[list[Group]], Optimizer]:
    """A factory for `HybridOptimizer` that imports the class when it is called, and gives it ``options``."""

    def make(groups: list[Group]) -> Optimizer:
        optimizer: Optimizer = imported(module, name)(groups, **options)
        return optimizer

    return make


def adam_options(config: PretrainConfig, lr: float) -> dict[str, Any]:
    """What every Adam-like row takes: its learning rate, and betas and weight decay of ``config``.

    ``eps`` is AdamW's 1e-8 for all of them, whatever their packages' default, so that rows differ in method alone.
    """
    return {
        "lr": lr,
        "betas": (config.beta1, config.beta2),
        "eps": 1e-8,
        "weight_decay": config.weight_decay,
    }


def low_rank_groups(split: ParameterSplit, **options: Any) -> list[Group]:
    """One group of ``split``'s compressed matrices for each rank, with ``rank`` and ``options`` in it."""
    return [{"params": named, "rank": rank, **options} for rank, named in split.low_rank.items()]


def full_rank_groups(split: ParameterSplit) -> list[Group]:
    """``split``'s uncompressed matrices as one group, or no group if there are none."""
    return [{"params": split.full_rank}] if split.full_rank else []


def beside_adamw(part: Part, rest: list[Group], config: PretrainConfig, lr: float) -> ClassAndKwargs:
    """``part`` moves its groups, `torch.optim.AdamW` those of ``rest``; both start at ``lr`` where a group says none.

    Either may have no groups. Both must name their parameters, or neither: torch's ``Optimizer`` demands it.
    """
    adamw = partial(torch.optim.AdamW, **adam_options(config, lr))
    return HybridOptimizer, {"params": [part, (adamw, rest)]}
