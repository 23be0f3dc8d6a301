"""LoRA as a pre-training baseline: a frozen random weight plus a trained product of two factors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lorapre.lab.baselines.factorised import FactorisedLinear, drawn_like, factorise, seeded_generator
from lorapre.lab.config import PretrainConfig

#: GaLore's setting for its LoRA rows (arXiv 2403.03507, section 5.1); the product is scaled by ALPHA / r.
ALPHA = 32.0


def kaiming_uniform(shape: tuple[int, int], seed: int, key: str) -> Tensor:
    """(r, q) from U(-1 / sqrt(q), 1 / sqrt(q)): what ``nn.init.kaiming_uniform_`` gives for a = sqrt(5)."""
    bound = shape[1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=seeded_generator(seed, key))


class LoRALinear(FactorisedLinear):
    """y = x W^T + (alpha / r) (x A^T) B^T + b with W frozen (arXiv 2106.09685, eq. 3).

    A (r, q) is Kaiming-uniform and B (p, r) zero, so that the layer begins as the one that it replaces.
    A depends on ``seed`` and ``name`` alone.

    Attributes:
        weight: (p, q), frozen, the replaced layer's own parameter.
        lora_A: (r, q).
        lora_B: (p, r).
        scaling: alpha / r.
    """

    def __init__(self, layer: nn.Linear, rank: int, *, name: str, seed: int, alpha: float = ALPHA) -> None:
        super().__init__(layer)
        self.name, self.seed = name, seed
        self.scaling = alpha / rank
        self.weight = layer.weight.requires_grad_(False)
        self.lora_A = drawn_like(layer.weight, self.initial_A(rank, "0"))
        self.lora_B = drawn_like(layer.weight, torch.zeros(layer.out_features, rank))

    def initial_A(self, rank: int, draw: str) -> Tensor:
        """A fresh A (r, q), float32 on the CPU; each ``draw`` gives another one."""
        return kaiming_uniform((rank, self.in_features), self.seed, f"{self.name}.lora_A:{draw}")

    def forward(self, x: Tensor) -> Tensor:
        """(..., q) to (..., p); B A is never formed."""
        return linear(x, self.weight, self.bias) + self.scaling * linear(linear(x, self.lora_A), self.lora_B)

    def merged_weight(self) -> Tensor:
        """W + (alpha / r) B A, (p, q)."""
        return self.weight + self.scaling * (self.lora_B @ self.lora_A)


def lora_prepare(model: nn.Module, config: PretrainConfig) -> None:
    """Turn every attention and MLP linear layer above ``config.rank`` into a `LoRALinear`.

    Raises:
        UserError: as `factorise` does.
    """
    factorise(model, config.rank, lambda name, layer, rank: LoRALinear(layer, rank, name=name, seed=config.seed))
