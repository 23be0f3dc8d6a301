"""LoRAPreLion: Lion whose momentum is factored."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lorapre.backends.batches import Piece
from lorapre.backends.eager import momentum
from lorapre.factors import Coefficient, Regression
from lorapre.optim.base import Group, keywords
from lorapre.optim.checks import check_betas
from lorapre.optim.momentum import MomentumOptimizer
from lorapre.routing import View3D


class LoRAPreLion(MomentumOptimizer):
    """Lion (arXiv 2302.06675) with a low-rank momentum, kept as m_B m_A (arXiv 2602.24283, section 3).

    W moves by the sign of beta1 m + (1 - beta1) G, and m by beta2. A matrix of shape (p, q) costs (p + q) r numbers
    of state instead of p q. What is no matrix, or has min(p, q) <= rank, takes Lion with a dense momentum.

    Args:
        params: parameters, named parameters, or groups of them; a group may set any option below, and
            ``compress=False``.
        lr: learning rate, a float or a one-element tensor; three to ten times below AdamW's.
        rank: rank r of the factors, or a fraction of each matrix's smaller side.
        betas: weight of the momentum in the update, and decay of the momentum.
        weight_decay: decoupled, as in AdamW.
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
        lr: float | Tensor = 1e-4,
        rank: int | float = 0.25,
        betas: tuple[float, float] = (0.9, 0.99),
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
        check_betas(group["betas"])

    def _step_piece(self, piece: Piece, group: Group, lr: Coefficient) -> None:
        (beta1, beta2), gain = group["betas"], group["residual_gain"]
        inside = 1.0 - beta1
        m = momentum(
            piece,
            self._regressor(group),
            keep=beta1,
            inside=inside,
            outside=inside if gain is None else gain,
            decay=beta2,
            gain=1.0 - beta2,
        )
        piece.apply(m.sign_().mul_(-piece.on * lr), 1.0 - piece.on * lr * group["weight_decay"])
