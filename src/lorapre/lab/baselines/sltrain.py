"""SLTrain: a product of two factors plus a sparse matrix whose support is drawn once (arXiv 2406.02214)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from lorapre.lab.baselines.factorised import FactorisedLinear, drawn_like, factorise, seeded_generator
from lorapre.lab.baselines.lora import ALPHA, kaiming_uniform
from lorapre.lab.config import PretrainConfig

#: Share of the entries that the sparse part holds, for all of the paper's models (section 5).
DENSITY = 0.03


def support_size(p: int, q: int, density: float = DENSITY) -> int:
    """Entries of the sparse part of a (p, q) weight; at least one."""
    return max(1, int(density * p * q))


def dense_weight(B: Tensor, A: Tensor, values: Tensor, support: Tensor, scaling: float) -> Tensor:
    """scaling * B A + S, (p, q), with S zero but for ``values`` at the flat positions ``support``."""
    weight = (scaling * B) @ A
    weight.view(-1).index_add_(0, support, values)
    return weight


class _SparsePlusLowRank(torch.autograd.Function):
    """x W^T for the W of `dense_weight`, which is formed again in the backward pass instead of kept (algorithm 1)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, B: Tensor, A: Tensor, values: Tensor, support: Tensor, scaling: float) -> Tensor:
        """(..., q) to (..., p); B (p, r), A (r, q), values and support (entries,)."""
        ctx.save_for_backward(x, B, A, values, support)
        ctx.scaling = scaling
        return linear(x, dense_weight(B, A, values, support, scaling))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """dW = dy^T x is formed for the length of this call; eq. 2 of the paper gives the rest from it."""
        x, B, A, values, support = ctx.saved_tensors
        dx = dB = dA = dv = None
        if ctx.needs_input_grad[0]:
            dx = dy @ dense_weight(B, A, values, support, ctx.scaling)
        if any(ctx.needs_input_grad[1:4]):
            dW = dy.flatten(0, -2).mT @ x.flatten(0, -2)  # (p, q)
            dB, dA = ctx.scaling * (dW @ A.mT), ctx.scaling * (B.mT @ dW)
            dv = dW.view(-1)[support]
        return dx, dB, dA, dv, None, None


class SLTrainLinear(FactorisedLinear):
    """y = x ((alpha / r) B A + S)^T + b; the replaced weight is thrown away.

    As its authors begin: A Kaiming-uniform, B zero, the values of S from U(-1 / sqrt(q), 1 / sqrt(q)), its support
    uniform without repetition. All is drawn from ``seed`` and ``name`` alone.

    Attributes:
        B: (p, r).
        A: (r, q).
        values: (entries,), trained.
        support: (entries,), ascending flat positions in (p, q), int64; a buffer, in the checkpoints too.
        scaling: alpha / r.
    """

    support: Tensor

    def __init__(
        self,
        layer: nn.Linear,
        rank: int,
        *,
        name: str,
        seed: int,
        alpha: float = ALPHA,
        density: float = DENSITY,
    ) -> None:
        super().__init__(layer)
        p, q = layer.weight.shape
        entries = support_size(p, q, density)
        self.scaling = alpha / rank
        self.B = drawn_like(layer.weight, torch.zeros(p, rank))
        self.A = drawn_like(layer.weight, kaiming_uniform((rank, q), seed, f"{name}.A"))
        generator = seeded_generator(seed, f"{name}.support")
        support = torch.randperm(p * q, generator=generator)[:entries].sort().values
        bound = q**-0.5
        values = torch.empty(entries).uniform_(-bound, bound, generator=seeded_generator(seed, f"{name}.values"))
        self.values = drawn_like(layer.weight, values)
        self.register_buffer("support", support.to(layer.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """(..., q) to (..., p)."""
        device = x.device.type
        # A custom function must cast for itself: autocast would do so in one of its two passes only.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        B, A, values = (param.to(dtype) for param in (self.B, self.A, self.values))
        y: Tensor = _SparsePlusLowRank.apply(x.to(dtype), B, A, values, self.support, self.scaling)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(dtype)

    def merged_weight(self) -> Tensor:
        """(alpha / r) B A + S, (p, q)."""
        return dense_weight(self.B, self.A, self.values, self.support, self.scaling)


def sltrain_prepare(model: nn.Module, config: PretrainConfig) -> None:
    """Turn every attention and MLP linear layer above ``config.rank`` into a `SLTrainLinear`.

    Raises:
        UserError: as `factorise` does.
    """
    factorise(model, config.rank, lambda name, layer, rank: SLTrainLinear(layer, rank, name=name, seed=config.seed))
