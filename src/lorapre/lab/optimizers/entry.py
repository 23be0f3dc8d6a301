"""What a row of the registry holds, and what the recipes may ask of it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lorapre import param_groups
from lorapre.lab.config import PretrainConfig
from lorapre.lab.errors import UserError
from lorapre.lab.optimizers.options import Option, defaults
from lorapre.routing import matrix_view

Group = dict[str, Any]
ClassAndKwargs = tuple[type[torch.optim.Optimizer], dict[str, Any]]
Build = Callable[[nn.Module, PretrainConfig, float, float], ClassAndKwargs]
Prepare = Callable[[nn.Module, PretrainConfig], None]
MatrixBytes = Callable[[int, int, int], int]


#: What embeddings, head and norms take under every optimizer; searched for the main job, for ours and AdamW alike.
DENSE_LR = 4e-3


def adamw_bytes(numbers: int, width: int = 4) -> int:
    """State of torch.optim.AdamW for a parameter of ``numbers`` of ``width`` bytes: two moments, a float32 counter."""
    return 2 * numbers * width + 4


def _no_types() -> list[type]:
    return []


@dataclass(frozen=True)
class OptimizerEntry:
    """One optimizer, or one way to factorise the weights, as the recipes see it.

    All of them move the matrices of attention and MLP; embeddings, head and norms take plain AdamW with
    ``dense_lr`` under every one, so that runs differ in the treatment of the matrices alone.

    Attributes:
        name: what ``--optimizer`` takes.
        title: what figures and tables print.
        source: paper, and where the implementation comes from.
        build: ``build(model, config, lr, dense_lr)`` gives the class and keywords that ``transformers.Trainer`` takes.
        state_bytes: bytes of optimizer state of one float32 matrix of (p, q) at rank r; r is ignored where the
            method has none.
        default_lr: peak learning rate of the matrices where none is given.
        ranked: whether ``--rank`` means something.
        default_dense_lr: peak learning rate of everything else.
        package: the distribution that holds the implementation, if it is not this one or torch.
        prepare: changes the model before the optimizer is built (factorised weights); None leaves it as it is.
        limitations: what a reader of a table should know about this implementation; empty if there is nothing.
        compresses_stacks: weights of more than two dimensions (expert stacks, convolutions) are compressed too; else
            they are left to AdamW.
        checkpoint_types: classes of Python objects in the optimizer's state, which ``torch.load`` must be told of.
        options: what ``--set`` may set, by name; empty where it may set nothing.
        state_bytes_with: ``state_bytes`` for all ``options``, where these change it; None where they do not.
        dense_bytes: ``dense_bytes(numbers, width)``, bytes of state of a matrix whose smaller side is not above the
            rank; AdamW's where such matrices are left to it.
        factored: the momentum is kept as factors that `lorapre.diagnostics` can measure.
    """

    name: str
    title: str
    source: str
    build: Build
    state_bytes: MatrixBytes
    default_lr: float
    ranked: bool
    default_dense_lr: float = DENSE_LR
    package: str | None = None
    prepare: Prepare | None = None
    limitations: str = ""
    compresses_stacks: bool = False
    checkpoint_types: Callable[[], list[type]] = _no_types
    options: Mapping[str, Option] = field(default_factory=dict)
    state_bytes_with: Callable[[Mapping[str, Any]], MatrixBytes] | None = None
    dense_bytes: Callable[[int, int], int] = adamw_bytes
    factored: bool = False

    def formula(self, options: Mapping[str, Any]) -> MatrixBytes:
        """``state_bytes`` with ``options`` set, the others being as they are by default."""
        if self.state_bytes_with is None:
            return self.state_bytes
        return self.state_bytes_with({**defaults(self.options), **options})

    @property
    def lr_grid(self) -> tuple[float, ...]:
        """Where ``lorapre compare --lr-grid auto`` begins to search: the default and two rates on each side of it."""
        return tuple(self.default_lr * 2.0**power for power in range(-2, 3))

    def installed_version(self) -> str | None:
        """Version of ``package``; torch's where the optimizer needs none; None if it is not installed."""
        try:
            return importlib.metadata.version(self.package or "torch")
        except importlib.metadata.PackageNotFoundError:
            return None

    def check_installed(self, option: str) -> None:
        """Raise ``UserError`` where ``package`` is missing; ``option`` is named in the message."""
        if self.installed_version() is None:
            raise UserError(
                f"{option} {self.name}: needs the package {self.package}, which is not installed. Install it, or all "
                "of the compared optimizers: pip install 'lorapre[peers]'."
            )


@dataclass(frozen=True)
class ParameterSplit:
    """A model's trainable parameters: matrices by their rank, and groups of everything else.

    Attributes:
        low_rank: rank to the named matrices (p, q) that it compresses; one entry for each rank that a fraction gives.
        full_rank: named matrices whose smaller side is not above the rank (all of them, where no rank is given).
        dense: groups of embeddings, head, norms, biases and whatever has more than two dimensions.
    """

    low_rank: dict[int, list[tuple[str, nn.Parameter]]]
    full_rank: list[tuple[str, nn.Parameter]]
    dense: list[Group]


def split_parameters(model: nn.Module, *, rank: int | float | None, dense_lr: float) -> ParameterSplit:
    """Split ``model``'s parameters as `lorapre.param_groups` does; ``rank`` None compresses no matrix."""
    low_rank: dict[int, list[tuple[str, nn.Parameter]]] = {}
    full_rank: list[tuple[str, nn.Parameter]] = []
    dense: list[Group] = []
    for group in param_groups(model, dense={"lr": dense_lr}):
        if not group.pop("compress", True):
            dense.append(group)
            continue
        others = []
        for name, param in group["params"]:
            if param.ndim != 2:
                others.append((name, param))
                continue
            view = None if rank is None else matrix_view(param.shape, rank, "stack")
            if view is None:
                full_rank.append((name, param))
            else:
                low_rank.setdefault(view.rank, []).append((name, param))
        if others:
            dense.append({"params": others, "lr": dense_lr})
    return ParameterSplit(low_rank, full_rank, dense)
