"""Rivals with packages of their own: AdamW with 8-bit state or clipped updates, Flora, Adam-mini, CAME, LoRA-RITE."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lorapre.lab.config import PretrainConfig
from lorapre.lab.errors import UserError
from lorapre.lab.optimizers.beside import (
    adam_options,
    beside_adamw,
    full_rank_groups,
    imported,
    low_rank_groups,
    make_imported,
)
from lorapre.lab.optimizers.entry import ClassAndKwargs, Group, OptimizerEntry, adamw_bytes, split_parameters

#: Below this many numbers both 8-bit packages keep float32 state, in blocks of _BLOCK above.
_MIN_8BIT = 4096
_BLOCK = 256
#: The two tables, 256 numbers each, that codes of a signed and an unsigned moment stand for.
_CODE_TABLES = 4 * 2 * 256


def _make_adam_mini(groups: list[Group], *, hidden: int, heads: int, head_dim: int, **options: Any) -> Optimizer:
    named = [pair for group in groups for pair in group["params"]]
    mini: Any = imported("adam_mini", "Adam_mini")(named, dim=hidden, n_heads=heads, verbose=False, **options)
    # The package takes dim^2 / n_heads, which is wrong where heads are wider or narrower than hidden / heads.
    mini.head_numel = hidden * head_dim
    for name, param in named:
        if any(part in name.lower() for part in mini.wqk_names) and param.numel() % mini.head_numel:
            raise UserError(
                f"--optimizer adam-mini: {name} of shape {tuple(param.shape)} does not consist of heads of {head_dim} "
                f"rows and {hidden} columns, as its name makes Adam-mini believe. Train this model with another one."
            )
    optimizer: Optimizer = mini
    return optimizer


def _torchao(model: nn.Module, config: PretrainConfig, lr: float, dense_lr: float) -> ClassAndKwargs:
    split = split_parameters(model, rank=None, dense_lr=dense_lr)
    part = (make_imported("torchao.optim", "AdamW8bit", **adam_options(config, lr)), full_rank_groups(split))
    return beside_adamw(part, split.dense, config, lr)


def _stable_adamw(model: nn.Module, config: PretrainConfig, lr: float, dense_lr: float) -> ClassAndKwargs:
    split = split_parameters(model, rank=None, dense_lr=dense_lr)
    make = make_imported("pytorch_optimizer", "StableAdamW", **adam_options(config, lr))
    return beside_adamw((make, full_rank_groups(split)), split.dense, config, lr)


def _bitsandbytes(model: nn.Module, config: PretrainConfig, lr: float, dense_lr: float) -> ClassAndKwargs:
    split = split_parameters(model, rank=None, dense_lr=dense_lr)
    make = make_imported("bitsandbytes.optim", "AdamW8bit", min_8bit_size=_MIN_8BIT, **adam_options(config, lr))
    return beside_adamw((make, full_rank_groups(split)), split.dense, config, lr)


def _flora(model: nn.Module, config: PretrainConfig, lr: float, dense_lr: float) -> ClassAndKwargs:
    split = split_parameters(model, rank=config.rank, dense_lr=dense_lr)
    options = {"lr": lr, "beta1": config.beta1, "weight_decay": config.weight_decay, "seed": config.seed}
    make = make_imported("flora_opt", "Flora", **options)
    rest = [*full_rank_groups(split), *split.dense]
    return beside_adamw((make, low_rank_groups(split, kappa=1000)), rest, config, lr)


def _adam_mini(model: nn.Module, config: PretrainConfig, lr: float, dense_lr: float) -> ClassAndKwargs:
    shape: Any = model.config
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    head_dim = getattr(shape, "head_dim", None) or hidden // heads
    make = partial(_make_adam_mini, hidden=hidden, heads=heads, head_dim=head_dim, **adam_options(config, lr))
    split = split_parameters(model, rank=None, dense_lr=dense_lr)
    # Adam_mini keeps names in a key of its own, so that torch takes its groups for nameless ones.
    rest = [group | {"params": [param for _, param in group["params"]]} for group in split.dense]
    return beside_adamw((make, full_rank_groups(split)), rest, config, lr)


def _came(model: nn.Module, config: PretrainConfig, lr: float, dense_lr: float) -> ClassAndKwargs:
    # The authors' advice for pre-training: AdamW's two betas and a third one so far above beta2 that (0.9, 0.95) goes
    # with 0.99 to 0.999, and (0.9, 0.999) with about 0.9999.
    betas = (config.beta1, config.beta2, 1 - (1 - config.beta2) / 10)
    split = split_parameters(model, rank=None, dense_lr=dense_lr)
    make = make_imported("came_pytorch", "CAME", lr=lr, betas=betas, weight_decay=config.weight_decay)
    return beside_adamw((make, full_rank_groups(split)), split.dense, config, lr)


def _lora_prepare(model: nn.Module, config: PretrainConfig) -> None:
    from lorapre.lab.baselines.lora import lora_prepare

    lora_prepare(model, config)


def _lora_rite(model: nn.Module, config: PretrainConfig, lr: float, dense_lr: float) -> ClassAndKwargs:
    from lorapre.lab.baselines.lora import LoRALinear

    pairs = [
        (f"{prefix}.{name}", param)
        for prefix, module in model.named_modules()
        if isinstance(module, LoRALinear)
        for name, param in (("lora_A", module.lora_A), ("lora_B", module.lora_B))
    ]
    factors = {id(param) for _, param in pairs}
    split = split_parameters(model, rank=None, dense_lr=dense_lr)
    others = [(name, param) for name, param in split.full_rank if id(param) not in factors]
    rest = [*([{"params": others}] if others else []), *split.dense]
    # Its eps regularises the root of a matrix, and keeps the authors' value rather than Adam's.
    options = adam_options(config, lr) | {"eps": 1e-6}
    part = (make_imported("pytorch_optimizer", "LoRARite", **options), [{"params": pairs}] if pairs else [])
    return beside_adamw(part, rest, config, lr)


def _torchao_bytes(p: int, q: int, r: int) -> int:
    if p * q < _MIN_8BIT or p * q % _BLOCK:
        return adamw_bytes(p * q)
    return 2 * (p * q + 4 * (p * q // _BLOCK)) + _CODE_TABLES + 4


def _bitsandbytes_bytes(p: int, q: int, r: int) -> int:
    if p * q < _MIN_8BIT:
        return 4 * 2 * p * q
    return 2 * (p * q + 4 * -(-p * q // _BLOCK)) + _CODE_TABLES


def _flora_bytes(p: int, q: int, r: int) -> int:
    momentum = max(p, q) * r if max(p, q) <= 4 * min(p, q) else p * q
    return 4 * (momentum + p + q + 1)


def _adam_mini_bytes(p: int, q: int, r: int) -> int:
    return 4 * (p * q + p)


def _came_bytes(p: int, q: int, r: int) -> int:
    return 4 * (p * q + 2 * (p + q) + 1)


def _lora_rite_bytes(p: int, q: int, r: int) -> int:
    return 4 * (2 * (p + q) * r + 2 * r * r + 2)


def _torchao_types() -> list[type]:
    return [imported("torchao.optim.subclass_8bit", "OptimState8bit")]


ENTRIES = (
    OptimizerEntry(
        name="adamw-8bit",
        title="AdamW, 8-bit state",
        source="arXiv 2110.02861; torchao",
        build=_torchao,
        state_bytes=_torchao_bytes,
        default_lr=1e-3,
        ranked=False,
        package="torchao",
        limitations=(
            "Compiles its step with torch.compile for each shape: on a CPU it needs a C++ compiler, and the first step "
            "takes seconds a shape. Matrices whose size is no multiple of 256 keep float32 state."
        ),
        checkpoint_types=_torchao_types,
    ),
    OptimizerEntry(
        name="adamw-8bit-bnb",
        title="AdamW, 8-bit state (bitsandbytes)",
        source="arXiv 2110.02861; bitsandbytes",
        build=_bitsandbytes,
        state_bytes=_bitsandbytes_bytes,
        default_lr=1e-3,
        ranked=False,
        package="bitsandbytes",
        limitations="All matrices of a device share the two code tables, 2 kB that are counted for each here.",
    ),
    OptimizerEntry(
        name="stable-adamw",
        title="StableAdamW",
        source="arXiv 2304.13013; pytorch-optimizer",
        build=_stable_adamw,
        state_bytes=lambda p, q, r: 4 * 2 * p * q,
        default_lr=2e-3,
        ranked=False,
        package="pytorch-optimizer",
        limitations="A clipped update takes weight decay down with it; bfloat16 weights are summed after Kahan.",
    ),
    OptimizerEntry(
        name="flora",
        title="Flora",
        source="arXiv 2402.03293; flora-opt, new projection every 1000 steps",
        build=_flora,
        state_bytes=_flora_bytes,
        default_lr=4e-2,
        ranked=True,
        package="flora-opt",
        limitations=(
            "Compresses the momentum of matrices up to an aspect ratio of 4 alone. The learning rate is relative to "
            "the RMS of each matrix, and the step sets its gradient to None."
        ),
    ),
    OptimizerEntry(
        name="adam-mini",
        title="Adam-mini",
        source="arXiv 2406.16793; adam-mini",
        build=_adam_mini,
        state_bytes=_adam_mini_bytes,
        default_lr=1e-3,
        ranked=False,
        package="adam-mini",
        limitations=(
            "Finds query and key by their names and gives them one second moment a head (there the formula, one a "
            "row, counts a few bytes too many)."
        ),
    ),
    OptimizerEntry(
        name="came",
        title="CAME",
        source="arXiv 2307.02047; came-pytorch, the authors' own",
        build=_came,
        state_bytes=_came_bytes,
        default_lr=3.5e-4,
        ranked=False,
        package="came-pytorch",
        limitations="Nothing corrects the bias of the averages; beta3 follows beta2 as 1 - (1 - beta2) / 10.",
    ),
    OptimizerEntry(
        name="lora-rite",
        title="LoRA-RITE",
        source="arXiv 2410.20625; pytorch-optimizer, on this library's LoRA layers",
        build=_lora_rite,
        state_bytes=_lora_rite_bytes,
        default_lr=1e-3,
        ranked=True,
        package="pytorch-optimizer",
        prepare=_lora_prepare,
        limitations=(
            "Two QR and two eigendecompositions a matrix and step. Freed of the other factor's scale, gradients are "
            "clipped once more, to a global norm of 1, and left out where their RMS is above 1."
        ),
    ),
)
