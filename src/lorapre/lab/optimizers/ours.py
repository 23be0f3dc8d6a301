"""LoRA-Pre, and the AdamW that all are measured against."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from lorapre import LoRAPreAdamW, LoRAPreLion, LoRAPreMuon, LoRAPreSGD, param_groups
from lorapre.lab.config import PretrainConfig
from lorapre.lab.optimizers.beside import beside_adamw
from lorapre.lab.optimizers.entry import Build, ClassAndKwargs, Group, MatrixBytes, OptimizerEntry, adamw_bytes
from lorapre.lab.optimizers.options import OWNED, Option, defaults, options_of, state_width
from lorapre.optim.adamw import PAPER_PRESET
from lorapre.optim.base import FactoredOptimizer
from lorapre.optim.dense import DenseAdamW
from lorapre.optim.muon import PAPER_PRESET as MUON_PAPER_PRESET
from lorapre.routing import resolve_rank


def _lorapre(
    kind: type[FactoredOptimizer], options: Mapping[str, Option], preset: Mapping[str, Any] | None = None
) -> Build:
    """Rows of ``kind``: a class without an AdamW of its own has torch's beside it, for all but the matrices."""

    def build(model: nn.Module, config: PretrainConfig, lr: float, dense_lr: float) -> ClassAndKwargs:
        groups = factored_groups(model, config, dense_lr, options)
        keywords = {**(preset or {}), "lr": lr, "weight_decay": config.weight_decay, "seed": config.seed}
        if issubclass(kind, DenseAdamW):
            # What bfloat16 loses it loses in embeddings and norms, too.
            keywords |= {name: group[name] for group in groups for name in ("stochastic_rounding",) if name in group}
            return kind, {**keywords, "params": groups, "betas": (config.beta1, config.beta2)}
        matrices = [group for group in groups if group.get("compress", True)]
        return beside_adamw((partial(kind, **keywords), matrices), _rest(groups), config, dense_lr)

    return build


def factored_groups(
    model: nn.Module, config: PretrainConfig, dense_lr: float, options: Mapping[str, Option]
) -> list[Group]:
    """Groups for an optimizer of ours. ``config.options`` go to the matrices; the rest is treated as ever.

    Raises:
        ValueError: an option is of the wrong type.
        KeyError: it is not one of ``options``.
    """
    given = {name: options[name].read(value) for name, value in config.options.items()}
    return param_groups(model, rank=config.rank, dense={"lr": dense_lr}, **given)


def _rest(groups: list[Group]) -> list[Group]:
    """What is not to be compressed, for an optimizer of torch."""
    return [
        {key: value for key, value in group.items() if key != "compress"}
        for group in groups
        if not group.get("compress", True)
    ]


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


def factored_adam_bytes(options: Mapping[str, Any]) -> MatrixBytes:
    """State of `LoRAPreAdamW` for one float32 matrix: m's factors, v, and a float32 counter.

    Args:
        options: its ``second_moment``: "hadamard" (v is two factors of ``second_moment_rank``, m's rank where that is
            None), "rank1" (a row and a column) or "full"; and ``state_dtype``.
    """
    second_moment, v_rank = options["second_moment"], options.get("second_moment_rank")
    width = state_width(options)

    def state_bytes(p: int, q: int, r: int) -> int:
        v_numbers = {
            "hadamard": (p + q) * (r if v_rank is None else min(resolve_rank(v_rank, p, q), p, q)),
            "rank1": p + q,
            "full": p * q,
        }
        return width * ((p + q) * r + v_numbers[second_moment]) + 4

    return state_bytes


def factored_momentum_bytes(options: Mapping[str, Any]) -> MatrixBytes:
    """State of `LoRAPreMuon`, `LoRAPreSGD` and `LoRAPreLion` for one float32 matrix: factors and a float32 counter.

    Args:
        options: their ``state_dtype``; Muon's ``normalization``, which keeps a row or a column.
    """
    width = state_width(options)

    def state_bytes(p: int, q: int, r: int) -> int:
        averages = {"none": 0, "rows": p, "longer_side": max(p, q)}[options.get("normalization", "none")]
        return width * ((p + q) * r + averages) + 4

    return state_bytes


def momentum_bytes(numbers: int, width: int) -> int:
    """State of `LoRAPreSGD` and `LoRAPreLion` for what they keep dense: one momentum and a float32 counter."""
    return numbers * width + 4


_OPTIONS = options_of(LoRAPreAdamW)
_PAPER_OPTIONS = options_of(LoRAPreAdamW, PAPER_PRESET)
#: eps is AdamW's alone here, and options are for the matrices.
_MUON_OWNED = {**OWNED, "eps": "the matrices' update has none"}
_MUON_OPTIONS = options_of(LoRAPreMuon, owned=_MUON_OWNED)
_MUON_PAPER_OPTIONS = options_of(LoRAPreMuon, MUON_PAPER_PRESET, owned=_MUON_OWNED)
_SGD_OPTIONS = options_of(LoRAPreSGD)
#: Lion's betas are not Adam's: the first mixes the gradient in, the second is the momentum's decay.
_LION_OPTIONS = options_of(LoRAPreLion, owned={name: why for name, why in OWNED.items() if name != "betas"})


def _momentum_note(options: Mapping[str, Option]) -> str:
    nesterov = "Nesterov momentum" if options["nesterov"].default else "Momentum"
    return (
        f"{nesterov} {options['momentum'].default} whatever --beta1 says (--set momentum=... changes it); --beta1 and "
        "--beta2 are for the AdamW beside it."
    )


ENTRIES = (
    OptimizerEntry(
        name="lorapre-adamw",
        title="LoRA-Pre AdamW",
        source="arXiv 2602.24283; this library's defaults",
        build=_lorapre(LoRAPreAdamW, _OPTIONS),
        state_bytes=factored_adam_bytes(defaults(_OPTIONS)),
        state_bytes_with=factored_adam_bytes,
        options=_OPTIONS,
        default_lr=2e-3,
        ranked=True,
        compresses_stacks=True,
        factored=True,
    ),
    OptimizerEntry(
        name="lorapre-adamw-paper",
        title="LoRA-Pre Adam (paper)",
        source="arXiv 2602.24283, Algorithm 1 as printed; this library",
        build=_lorapre(LoRAPreAdamW, _PAPER_OPTIONS, PAPER_PRESET),
        state_bytes=factored_adam_bytes(defaults(_PAPER_OPTIONS)),
        state_bytes_with=factored_adam_bytes,
        options=_PAPER_OPTIONS,
        default_lr=2e-3,
        ranked=True,
        compresses_stacks=True,
        factored=True,
    ),
    OptimizerEntry(
        name="lorapre-muon",
        title="LoRA-Pre Muon",
        source="arXiv 2602.24283 at the scale of arXiv 2502.16982, 0.2 sqrt(max(p, q)); this library's defaults",
        build=_lorapre(LoRAPreMuon, _MUON_OPTIONS),
        state_bytes=factored_momentum_bytes(defaults(_MUON_OPTIONS)),
        state_bytes_with=factored_momentum_bytes,
        options=_MUON_OPTIONS,
        default_lr=1e-2,
        ranked=True,
        limitations=f"{_momentum_note(_MUON_OPTIONS)} Matrices at full rank take AdamW, at the same learning rate.",
        compresses_stacks=True,
        factored=True,
    ),
    OptimizerEntry(
        name="lorapre-muon-paper",
        title="LoRA-Pre Muon (paper)",
        source="arXiv 2602.24283, Algorithm 2 as printed, at Muon's scale sqrt(max(1, p / q)); this library",
        build=_lorapre(LoRAPreMuon, _MUON_PAPER_OPTIONS, MUON_PAPER_PRESET),
        state_bytes=factored_momentum_bytes(defaults(_MUON_PAPER_OPTIONS)),
        state_bytes_with=factored_momentum_bytes,
        options=_MUON_PAPER_OPTIONS,
        default_lr=2e-2,
        ranked=True,
        limitations=f"{_momentum_note(_MUON_PAPER_OPTIONS)} Matrices at full rank take AdamW, at the same learning "
        "rate. Its scale is an option, adjust_lr_fn.",
        compresses_stacks=True,
        factored=True,
    ),
    OptimizerEntry(
        name="lorapre-sgd",
        title="LoRA-Pre SGD",
        source="torch.optim.SGD with the momentum of arXiv 2602.24283, section 3; this library",
        build=_lorapre(LoRAPreSGD, _SGD_OPTIONS),
        state_bytes=factored_momentum_bytes(defaults(_SGD_OPTIONS)),
        state_bytes_with=factored_momentum_bytes,
        options=_SGD_OPTIONS,
        default_lr=0.2,
        ranked=True,
        limitations=f"{_momentum_note(_SGD_OPTIONS)} Weight decay is decoupled, unlike torch's. Matrices at full rank "
        "take SGD with a dense momentum.",
        compresses_stacks=True,
        dense_bytes=momentum_bytes,
        factored=True,
    ),
    OptimizerEntry(
        name="lorapre-lion",
        title="LoRA-Pre Lion",
        source="Lion (arXiv 2302.06675) with the momentum of arXiv 2602.24283, section 3; this library",
        build=_lorapre(LoRAPreLion, _LION_OPTIONS),
        state_bytes=factored_momentum_bytes(defaults(_LION_OPTIONS)),
        state_bytes_with=factored_momentum_bytes,
        options=_LION_OPTIONS,
        default_lr=2e-4,
        ranked=True,
        limitations=f"Lion's betas are {_LION_OPTIONS['betas'].default} whatever --beta1 and --beta2 say (--set "
        "betas=[...] changes them), which are for the AdamW beside it. Matrices at full rank take Lion with a dense "
        "momentum.",
        compresses_stacks=True,
        dense_bytes=momentum_bytes,
        factored=True,
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
