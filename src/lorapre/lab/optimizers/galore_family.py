"""Rivals that project the gradient to low rank: GaLore, Fira and APOLLO, from their authors' packages.

All three keep a Python object, the projector, in the state of each matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from lorapre.lab.config import PretrainConfig
from lorapre.lab.optimizers.beside import (
    adam_options,
    beside_adamw,
    full_rank_groups,
    imported,
    low_rank_groups,
    make_imported,
)
from lorapre.lab.optimizers.entry import (
    Build,
    ClassAndKwargs,
    Group,
    OptimizerEntry,
    ParameterSplit,
    split_parameters,
)
from lorapre.lab.optimizers.options import Option, defaults

#: Steps between two projections: 200 in the pre-training scripts of all three. A run of fewer projects once.
_GAP = Option(Annotated[int, Field(ge=1)], 200)


def _scale(default: float) -> Option:
    """Of the update, but for the rest of the gradient where there is one."""
    return Option(Annotated[float, Field(gt=0)], default)


_GALORE_OPTIONS = {"update_proj_gap": _GAP, "scale": _scale(0.25)}
_FIRA_OPTIONS = {"update_proj_gap": _GAP, "alpha": _scale(0.25)}
_APOLLO_OPTIONS = {"update_proj_gap": _GAP, "scale": _scale(1.0)}
_APOLLO_MINI_OPTIONS = {"update_proj_gap": _GAP, "scale": _scale(128.0)}


def _given(options: Mapping[str, Option], config: PretrainConfig) -> dict[str, Any]:
    """All ``options``, those that ``config`` sets as it sets them."""
    return {**defaults(options), **{name: options[name].read(value) for name, value in config.options.items()}}


def _move_projectors(optimizer: Optimizer) -> None:
    """Put projections on their parameters' devices: ``load_state_dict`` moves tensors, not what objects hold."""
    for param, state in optimizer.state.items():
        projector = state.get("projector")
        if projector is not None and projector.ortho_matrix is not None:
            projector.ortho_matrix = projector.ortho_matrix.to(param.device)


def _make(module: str, name: str, **options: Any) -> Callable[[list[Group]], Optimizer]:
    """As `make_imported`, for the three packages, which share a constructor."""
    make_optimizer = make_imported(module, name, no_deprecation_warning=True, **options)

    def make(groups: list[Group]) -> Optimizer:
        optimizer = make_optimizer(groups)
        optimizer.register_load_state_dict_post_hook(_move_projectors)
        return optimizer

    return make


def _rest(split: ParameterSplit) -> list[Group]:
    return [*full_rank_groups(split), *split.dense]


def _galore(model: nn.Module, config: PretrainConfig, lr: float, dense_lr: float) -> ClassAndKwargs:
    split = split_parameters(model, rank=config.rank, dense_lr=dense_lr)
    groups = low_rank_groups(split, **_given(_GALORE_OPTIONS, config), proj_type="std")
    part = (_make("galore_torch", "GaLoreAdamW", **adam_options(config, lr)), groups)
    return beside_adamw(part, _rest(split), config, lr)


def _fira(model: nn.Module, config: PretrainConfig, lr: float, dense_lr: float) -> ClassAndKwargs:
    split = split_parameters(model, rank=config.rank, dense_lr=dense_lr)
    groups = low_rank_groups(split, **_given(_FIRA_OPTIONS, config), proj_type="std")
    part = (_make("fira", "FiraAdamW", **adam_options(config, lr)), groups)
    return beside_adamw(part, _rest(split), config, lr)


def _apollo(options: Mapping[str, Option], *, scale_type: str, rank: int | None = None) -> Build:
    """Build APOLLO; ``rank`` None takes the configuration's."""

    def build(model: nn.Module, config: PretrainConfig, lr: float, dense_lr: float) -> ClassAndKwargs:
        split = split_parameters(model, rank=config.rank if rank is None else rank, dense_lr=dense_lr)
        groups = low_rank_groups(
            split, proj="random", scale_type=scale_type, **_given(options, config), proj_type="std"
        )
        part = (_make("apollo_torch", "APOLLOAdamW", **adam_options(config, lr)), groups)
        return beside_adamw(part, _rest(split), config, lr)

    return build


def _galore_bytes(p: int, q: int, r: int) -> int:
    # Two moments, and the singular vectors of which the projection is a view.
    return 4 * (2 * max(p, q) * r + min(p, q) ** 2)


def _fira_bytes(p: int, q: int, r: int) -> int:
    return _galore_bytes(p, q, r) + 4  # the norm that limits the growth of the next


def _apollo_bytes(p: int, q: int, r: int) -> int:
    return 4 * ((2 * max(p, q) + min(p, q)) * r + 1)


def _galore_types() -> list[type]:
    return [imported("galore_torch.galore_projector", "GaLoreProjector")]


def _fira_types() -> list[type]:
    return [imported("fira.gradient_projection", "GradientProjector")]


def _apollo_types() -> list[type]:
    return [imported("apollo_torch.random_projector", "GradientProjector")]


ENTRIES = (
    OptimizerEntry(
        name="galore",
        title="GaLore",
        source="arXiv 2403.03507; galore-torch, scale 0.25, projection every 200 steps",
        build=_galore,
        options=_GALORE_OPTIONS,
        state_bytes=_galore_bytes,
        default_lr=1e-2,
        ranked=True,
        package="galore-torch",
        limitations=(
            "The projection is a view that keeps all singular vectors of the smaller side alive, not r of them. "
            "A full SVD of each matrix every 200 steps; moments are not turned into the new subspace."
        ),
        checkpoint_types=_galore_types,
    ),
    OptimizerEntry(
        name="fira",
        title="Fira",
        source="arXiv 2410.01623; fira, alpha 0.25, projection every 200 steps",
        build=_fira,
        options=_FIRA_OPTIONS,
        state_bytes=_fira_bytes,
        default_lr=1e-2,
        ranked=True,
        package="fira",
        limitations=(
            "The residual is G - alpha P P'G, so that three quarters of the gradient inside the subspace stay in it. "
            "Keeps all singular vectors of the smaller side, and takes a full SVD every 200 steps, as GaLore does."
        ),
        checkpoint_types=_fira_types,
    ),
    OptimizerEntry(
        name="apollo",
        title="APOLLO",
        source="arXiv 2412.05270; apollo-torch, random projection every 200 steps, one scale a channel",
        build=_apollo(_APOLLO_OPTIONS, scale_type="channel"),
        state_bytes=_apollo_bytes,
        options=_APOLLO_OPTIONS,
        default_lr=1e-2,
        ranked=True,
        package="apollo-torch",
        limitations=(
            "Projections are seeded by a matrix's place in the model, not by --seed, and are kept in the state though "
            "the seed would do."
        ),
        checkpoint_types=_apollo_types,
    ),
    OptimizerEntry(
        name="apollo-mini",
        title="APOLLO-Mini",
        source="arXiv 2412.05270; apollo-torch, rank 1, one scale a matrix, times sqrt(128)",
        build=_apollo(_APOLLO_MINI_OPTIONS, scale_type="tensor", rank=1),
        options=_APOLLO_MINI_OPTIONS,
        state_bytes=lambda p, q, r: _apollo_bytes(p, q, 1),
        default_lr=5e-3,
        ranked=False,
        package="apollo-torch",
        limitations="Projections are seeded by a matrix's place in the model, not by --seed.",
        checkpoint_types=_apollo_types,
    ),
)
