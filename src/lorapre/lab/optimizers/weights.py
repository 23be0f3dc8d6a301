"""Methods that factorise the weights rather than the optimizer's state. Their final model is a plain one."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from lorapre.lab.baselines.factorised import FactorisedLinear
from lorapre.lab.baselines.lora import LoRALinear, lora_prepare
from lorapre.lab.baselines.loro import LOROAdamW, loro_prepare
from lorapre.lab.baselines.low_rank_weights import low_rank_prepare
from lorapre.lab.baselines.relora import ReLoRAAdamW
from lorapre.lab.baselines.sltrain import sltrain_prepare, support_size
from lorapre.lab.config import PretrainConfig
from lorapre.lab.optimizers.beside import adam_options, beside_adamw
from lorapre.lab.optimizers.entry import ClassAndKwargs, Group, OptimizerEntry
from lorapre.lab.optimizers.ours import adamw_groups


def weight_groups(model: nn.Module, dense_lr: float) -> tuple[Group, list[Group]]:
    """A group of what the factorised weights of ``model`` are made of, and the groups of everything else.

    A sparse part's values are a vector, but belong to a matrix: they are in the first group. In the second are the
    layers that stayed whole, without a rate of their own, and embeddings, head, norms and biases with ``dense_lr``.
    """
    inside = [
        (f"{prefix}.{name}".lstrip("."), param)
        for prefix, module in model.named_modules()
        if isinstance(module, FactorisedLinear)
        for name, param in module.factors()
    ]
    ids = {id(param) for _, param in inside}
    outside = []
    for group in adamw_groups(model, dense_lr):
        rest = [(name, param) for name, param in group["params"] if id(param) not in ids]
        if rest:
            outside.append({**group, "params": rest})
    return {"params": inside}, outside


def _adamw(model: nn.Module, config: PretrainConfig, lr: float, dense_lr: float) -> ClassAndKwargs:
    factors, others = weight_groups(model, dense_lr)
    return torch.optim.AdamW, {"params": [factors, *others], **adam_options(config, lr)}


def restart_interval(config: PretrainConfig, cycles: int) -> int:
    """Steps between two restarts: the run in ``cycles`` equal parts, but at least 50 steps for the moments to settle.

    A run of fewer than 50 steps has no restart.
    """
    return max(50, config.total_steps // cycles)


def _relora(model: nn.Module, config: PretrainConfig, lr: float, dense_lr: float) -> ClassAndKwargs:
    factors, others = weight_groups(model, dense_lr)
    every = restart_interval(config, 10)  # the authors' 60M script: 1,000 of 10,000 steps, 100 of them warm-up
    ours = partial(
        ReLoRAAdamW,
        layers=[module for module in model.modules() if isinstance(module, LoRALinear)],
        every=every,
        rewarmup=min(100, every // 10),
        **adam_options(config, lr),
    )
    return beside_adamw((ours, [factors]), others, config, lr)


def _loro(model: nn.Module, config: PretrainConfig, lr: float, dense_lr: float) -> ClassAndKwargs:
    factors, others = weight_groups(model, dense_lr)
    every = restart_interval(config, 20)  # the authors' 60M script: 500 of 10,000 steps, 5 of them warm-up
    ours = partial(LOROAdamW, every=every, rewarmup=min(5, every // 10), **adam_options(config, lr))
    return beside_adamw((ours, [factors]), others, config, lr)


def _state(p: int, q: int, r: int, tensors: int, extra: int = 0) -> int:
    """Two float32 moments of the factors and of ``extra`` numbers, and a float32 counter for each of ``tensors``."""
    return 4 * (2 * ((p + q) * r + extra) + tensors)


def _factor_bytes(p: int, q: int, r: int) -> int:
    return _state(p, q, r, tensors=2)


def _sltrain_bytes(p: int, q: int, r: int) -> int:
    return _state(p, q, r, tensors=3, extra=support_size(p, q))


_RANDOM = "changes the model: {}, begun from random factors even where the model is a checkpoint"

ENTRIES = (
    OptimizerEntry(
        name="low-rank",
        title="Low-rank weights",
        source="arXiv 2403.03507, table 2; this library",
        build=_adamw,
        state_bytes=_factor_bytes,
        default_lr=1e-3,
        ranked=True,
        prepare=low_rank_prepare,
        limitations=_RANDOM.format("each matrix is a product of rank r"),
    ),
    OptimizerEntry(
        name="lora",
        title="LoRA",
        source="arXiv 2106.09685; this library",
        build=_adamw,
        state_bytes=_factor_bytes,
        default_lr=1e-3,
        ranked=True,
        prepare=lora_prepare,
        limitations="changes the model: each matrix stays as it began but for a product of rank r; alpha 32 as in "
        "GaLore's table, but no dropout",
    ),
    OptimizerEntry(
        name="relora",
        title="ReLoRA",
        source="arXiv 2307.05695; this library",
        build=_relora,
        state_bytes=_factor_bytes,
        default_lr=1e-3,
        ranked=True,
        prepare=lora_prepare,
        limitations="changes the model: each matrix moves by products of rank r, merged every tenth of the run (at "
        "least 50 steps); no full-rank warm-up (as in GaLore's table), no dropout; embeddings, head and norms are not "
        "restarted",
    ),
    OptimizerEntry(
        name="sltrain",
        title="SLTrain",
        source="arXiv 2406.02214; this library",
        build=_adamw,
        state_bytes=_sltrain_bytes,
        default_lr=3e-3,
        ranked=True,
        prepare=sltrain_prepare,
        limitations=_RANDOM.format("each matrix is a product of rank r plus 3 % of its entries") + "; alpha 32",
    ),
    OptimizerEntry(
        name="loro",
        title="LORO",
        source="OpenReview i0zzO7Hslk (ICLR 2025); this library",
        build=_loro,
        state_bytes=_factor_bytes,
        default_lr=1e-2,
        ranked=True,
        prepare=loro_prepare,
        limitations=_RANDOM.format("each matrix is a product of rank r")
        + "; restarts every twentieth of the run (at least 50 steps); embeddings, head and norms are not restarted",
    ),
)
