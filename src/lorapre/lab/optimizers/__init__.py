"""The optimizers that a recipe can name, each as one row: how to build it, what it costs, where it comes from."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lorapre import param_groups
from lorapre.lab.config import PretrainConfig
from lorapre.lab.errors import UserError
from lorapre.lab.optimizers import ours
from lorapre.lab.optimizers.entry import OptimizerEntry
from lorapre.routing import matrix_view

__all__ = ["OPTIMIZERS", "OptimizerEntry", "check_rank_compresses", "find_optimizer"]

OPTIMIZERS: Mapping[str, OptimizerEntry] = {entry.name: entry for module in (ours,) for entry in module.ENTRIES}


def find_optimizer(name: str, option: str = "--optimizer") -> OptimizerEntry:
    """The row called ``name``, ready to be built.

    Raises:
        UserError: there is none, or its package is not installed; ``option`` is the one to name in the message.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"{option} {name}: there is no such optimizer. Choose one of {', '.join(OPTIMIZERS)}.")
    entry = OPTIMIZERS[name]
    entry.check_installed(option)
    return entry


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
