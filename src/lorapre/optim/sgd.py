"""LoRAPreSGD: SGD whose momentum is factored."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lorapre.backends.batches import Piece
from lorapre.backends.eager import momentum
from lorapre.factors import Coefficient, Regression, sum_weights
from lorapre.optim.base import Group, keywords
from lorapre.optim.checks import check_momentum
from lorapre.optim.momentum import MomentumOptimizer
from lorapre.routing import View3D


class LoRAPreSGD(MomentumOptimizer):
    """torch.optim.SGD with a low-rank momentum: buf <- mu buf + G, kept as m_B m_A (arXiv 2602.24283, section 3).

    A matrix of shape (p, q) costs (p + q) r numbers of state instead of p q. What is no matrix, or has min(p, q) <=
    rank, takes SGD with a dense momentum.

    Args:
        params: parameters, named parameters, or groups of them; a group may set any option below, and
            ``compress=False``.
        lr: learning rate, a float or a one-element tensor.
        rank: rank r of the factors, or a fraction of each matrix's smaller side.
        momentum: decay mu of the momentum, which is a sum, as in torch.
        nesterov: look one step ahead, G + mu buf.
        weight_decay: decoupled (W <- (1 - lr weight_decay) W), unlike torch's, so that it stays out of the factors.
        regression: "subspace", "tangent" or "newton", as in `lorapre.LoRAPreAdamW`.
        residual_gain: weight of the gradient's part outside the tracked subspace, as a share of the weight that a
            constant gradient gathers inside; None gives it the weight of a single gradient, as the paper does.
        damping: of "newton" alone, as in `lorapre.LoRAPreAdamW`.
        damping_mode: likewise.
        view_3d: a 3-D weight is a "stack" of matrices, or to be flattened to (out, in * kernel): "flatten".
        state_dtype: dtype of the state; None is the parameter's own, but at least float32.
        stochastic_rounding: round new bfloat16 weights up or down by chance, drawn from ``seed``, the step and the
            element, so that updates too small for bfloat16 arrive on average; dense parameters' too. Weights of other
            dtypes are not concerned.
        seed: of the random right factors and of stochastic rounding.
        maximize: ascend instead of descend.
        capturable: keep the step counters on the device, so that ``step()`` can be captured in a CUDA graph.
        nonfinite: what to do when a gradient holds inf or nan: "raise", or "skip" the whole step.

    Raises:
        ValueError: an option is out of range, or ``stochastic_rounding`` is on without any bfloat16 parameter.
        TypeError: a parameter is complex, sharded or flattened.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        rank: int | float = 0.25,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        *,
        regression: Regression = "subspace",
        residual_gain: float | None = 1.0,
        damping: float = 1e-4,
        damping_mode: Literal["absolute", "relative"] = "relative",
        view_3d: View3D = "stack",
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        maximize: bool = False,
        capturable: bool = False,
        nonfinite: Literal["raise", "skip"] | None = None,
    ) -> None:
        super().__init__(params, keywords(locals()))

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_momentum(group["momentum"])
        if group["nesterov"] and group["momentum"] == 0:
            raise ValueError("nesterov=True means nothing with momentum=0. Leave one of them out.")

    def _step_piece(self, piece: Piece, group: Group, lr: Coefficient) -> None:
        mu = group["momentum"]
        keep, inside, outside = sum_weights(mu, group["nesterov"], group["residual_gain"])
        m = momentum(piece, self._regressor(group), keep=keep, inside=inside, outside=outside, decay=mu, gain=1.0)
        piece.apply(m.mul_(-piece.on * lr), 1.0 - piece.on * lr * group["weight_decay"])
