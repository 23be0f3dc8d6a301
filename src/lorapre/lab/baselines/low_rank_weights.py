"""Weights that are a product of two trained factors from the start: W = B A."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lorapre.lab.baselines.factorised import FactorisedLinear, drawn_like, factorise, seeded_generator
from lorapre.lab.config import PretrainConfig


class LowRankLinear(FactorisedLinear):
    """y = (x A^T) B^T + b; the replaced weight is thrown away.

    Both factors are normal, drawn from ``seed`` and ``name`` alone. By default they have one deviation s with
    r s^4 = mean(W^2): then the entries of B A have the variance of the replaced layer's.

    Attributes:
        B: (p, r).
        A: (r, q).
    """

    def __init__(
        self, layer: nn.Linear, rank: int, *, name: str, seed: int, stds: tuple[float, float] | None = None
    ) -> None:
        """``stds`` are those of B and of A, where the default is not wanted."""
        super().__init__(layer)
        # Kept a tensor: a model on the meta device has no numbers to read, and is factorised to count its weights.
        std = (layer.weight.detach().square().mean() / rank) ** 0.25
        std_B, std_A = (std, std) if stds is None else stds
        generator = seeded_generator(seed, name)
        B = torch.randn(layer.out_features, rank, generator=generator)
        A = torch.randn(rank, layer.in_features, generator=generator)
        self.B, self.A = drawn_like(layer.weight, B), drawn_like(layer.weight, A)
        with torch.no_grad():
            self.B.mul_(std_B)
            self.A.mul_(std_A)

    def forward(self, x: Tensor) -> Tensor:
        """(..., q) to (..., p); B A is never formed."""
        return linear(linear(x, self.A), self.B, self.bias)

    def merged_weight(self) -> Tensor:
        """B A, (p, q)."""
        return self.B @ self.A


def low_rank_prepare(model: nn.Module, config: PretrainConfig) -> None:
    """Turn every attention and MLP linear layer above ``config.rank`` into a `LowRankLinear` of its variance.

    GaLore's row "Low-Rank" (arXiv 2403.03507, table 2), whose initialisation the paper does not give.

    Raises:
        UserError: as `factorise` does.
    """
    factorise(model, config.rank, lambda name, layer, rank: LowRankLinear(layer, rank, name=name, seed=config.seed))
