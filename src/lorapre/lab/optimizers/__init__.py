"""The optimizers that a recipe can name, each as one row: how to build it, what it costs, where it comes from."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from lorapre import param_groups
from lorapre.lab.config import PretrainConfig
from lorapre.lab.errors import UserError
from lorapre.lab.optimizers import galore_family, low_rank, ours, packaged, torch_peers, weights
from lorapre.lab.optimizers.entry import OptimizerEntry
from lorapre.lab.optimizers.options import OWNED, defaults, recorded, state_width, written
from lorapre.routing import matrix_view, resolve_rank

__all__ = [
    "OPTIMIZERS",
    "OptimizerEntry",
    "check_options",
    "check_rank_compresses",
    "find_optimizer",
    "matrix_parameters",
    "matrix_state_bytes",
    "read_options",
]

#: Options of ours that are read beside one value of another alone; the classes, which have defaults for all of them,
#: take them with any.
_READ_WITH: Mapping[str, tuple[str, str]] = {
    "damping": ("regression", "newton"),
    "damping_mode": ("regression", "newton"),
    "bias_correction": ("second_moment", "hadamard"),
}

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


def matrix_state_bytes(
    entry: OptimizerEntry, model: nn.Module, rank: int | float, options: Mapping[str, Any] | None = None
) -> int | None:
    """Bytes that ``entry`` with ``options`` should hold for the float32 matrices of ``model``, by its formula.

    ``model`` is the one before ``entry.prepare``. Matrices whose smaller side is not above the rank count by
    ``entry.dense_bytes``, and so do weights of more than two dimensions. None where ``entry`` compresses such weights:
    the formulas are of matrices.
    """
    total = 0
    own_bytes, width = entry.formula(options or {}), state_width(options or {})
    for param in matrix_parameters(model):
        if param.ndim != 2 and entry.compresses_stacks:
            return None
        p, q = param.shape if param.ndim == 2 else (0, 0)
        r = resolve_rank(rank, p, q) if param.ndim == 2 else 0
        own = param.ndim == 2 and (not entry.ranked or r < min(p, q))
        total += own_bytes(p, q, r) if own else entry.dense_bytes(param.numel(), width)
    return total


def check_rank_compresses(model: nn.Module, config: PretrainConfig, origin: str | None = None) -> None:
    """Make sure that the rank is below some matrix of ``model`` (which may be on the meta device).

    ``origin`` is where it was given, for the message; ``--rank`` where it is None.

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
            f"{origin or f'--rank {config.rank}'}: no matrix of --model {config.model} has a smaller side above it "
            f"(the largest is {largest}), so nothing would be compressed. Give a smaller rank, or a fraction such as "
            "0.25."
        )


def read_options(entry: OptimizerEntry, given: Mapping[str, Any], origin: str | None = None) -> dict[str, Any]:
    """``given`` as it is recorded: numbers as numbers, however they were written.

    Args:
        entry: the optimizer.
        given: value by name.
        origin: where it was given, for the message; ``--set NAME=VALUE`` where it is None.

    Raises:
        UserError: ``entry`` has no such option, or it is of another type.
    """
    read: dict[str, Any] = {}
    for name, value in given.items():
        where = _where({name: value}, origin)
        if not entry.options:
            others = ", ".join(other.name for other in OPTIMIZERS.values() if other.options)
            raise UserError(f"{where}: {entry.name} takes no options. Leave them out; those that do are {others}.")
        if name not in entry.options:
            why = f": {OWNED[name]}" if name in OWNED else ""
            raise UserError(f"{where}: {entry.name} has no option {name!r} here{why}. {_choice(entry)}")
        try:
            read[name] = recorded(entry.options[name].read(value))
        except ValueError as error:
            raise UserError(f"{where}: {error}. {_choice(entry)}") from None
    return read


def check_options(
    entry: OptimizerEntry, model: nn.Module, config: PretrainConfig, origin: str | None = None
) -> dict[str, Any]:
    """`read_options` of ``config``, ``entry`` having taken them on ``model``, which is on the meta device.

    Raises:
        UserError: there is no such option, it is of another type, the optimizer refuses its value, or nothing reads it
            beside the others.
    """
    read = read_options(entry, config.options, origin)
    if read and (reason := _refusal(entry, model, config, read)):
        each = ({name: value} for name, value in read.items())
        blamed = next((one for one in each if _refusal(entry, model, config, one) == reason), read)
        raise UserError(f"{_where(blamed, origin)}: {reason}. {_choice(entry)}")
    together = {**defaults(entry.options), **read}
    for name, (other, value) in _READ_WITH.items():
        if name in read and together[other] != value:
            raise UserError(
                f"{_where({name: read[name]}, origin)}: would change nothing, as nothing reads it with "
                f"{other}={together[other]}. Set {other}={value} too, or leave it out."
            )
    return read


def _where(options: Mapping[str, Any], origin: str | None) -> str:
    each = written(options)
    return " ".join(f"--set {one}" for one in each) if origin is None else f"{origin}: {' '.join(each)}"


def _choice(entry: OptimizerEntry) -> str:
    known = written(defaults(entry.options))
    return f"Correct it or leave it out; the options of {entry.name}, with their defaults: {', '.join(known)}."


def _refusal(entry: OptimizerEntry, model: nn.Module, config: PretrainConfig, options: dict[str, Any]) -> str:
    """What ``entry``'s class says against ``options``; empty where it takes them."""
    trial = config.model_copy(update={"options": options})
    kind, kwargs = entry.build(model, trial, entry.default_lr, entry.default_dense_lr)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that nothing is compressed: `check_rank_compresses` tells
            kind(**kwargs)
    except (TypeError, ValueError) as error:
        return str(error).rstrip(".") or type(error).__name__
    return ""
