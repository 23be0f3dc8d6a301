"""The optimizers that a recipe can name, each as one row: how to build it, what it costs, where it comes from."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lorapre import param_groups
from lorapre.lab.config import PretrainConfig
from lorapre.lab.errors import UserError
from lorapre.lab.optimizers import galore_family, low_rank, ours, packaged, torch_peers, weights
from lorapre.lab.optimizers.entry import OptimizerEntry, adamw_bytes
from lorapre.routing import matrix_view, resolve_rank

__all__ = [
    "OPTIMIZERS",
    "OptimizerEntry",
    "check_rank_compresses",
    "find_optimizer",
    "matrix_parameters",
    "matrix_state_bytes",
]

OPTIMIZERS: Mapping[str, OptimizerEntry] = {
    entry.name: entry
    for module in (ours, torch_peers, packaged, galore_family, low_rank, weights)
    for entry in module.ENTRIES
}


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


def matrix_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of ``model`` that the compared optimizers treat each in its own way: attention and MLP."""
    return [param for group in param_groups(model) if group.get("compress", True) for _, param in group["params"]]


def matrix_state_bytes(entry: OptimizerEntry, model: nn.Module, rank: int | float) -> int | None:
    """Bytes that ``entry`` should hold for the float32 matrices of ``model``, by its formula.

    ``model`` is the one before ``entry.prepare``. What is left to AdamW counts as AdamW's: matrices whose smaller side
    is not above the rank, and weights of more than two dimensions. None where ``entry`` compresses such weights: the
    formulas are of matrices.
    """
    total = 0
    for param in matrix_parameters(model):
        if param.ndim != 2 and entry.compresses_stacks:
            return None
        p, q = param.shape if param.ndim == 2 else (0, 0)
        r = resolve_rank(rank, p, q) if param.ndim == 2 else 0
        own = param.ndim == 2 and (not entry.ranked or r < min(p, q))
        total += entry.state_bytes(p, q, r) if own else adamw_bytes(param.numel())
    return total


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
