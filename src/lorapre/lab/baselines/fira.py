"""Fira: GaLore, and beside it the rest of the gradient, scaled as Adam scales the projected part."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lorapre.lab.baselines._matrix_optimizer import Group, MatrixOptimizer, State, adam_direction
from lorapre.lab.baselines.galore import current_projection, laid_as, low_rank_state, wide

#: Guards the two quotients of norms; the released code's.
_TINY = 1e-8


def fira_direction(
    G: Tensor,
    P: Tensor,
    m: Tensor,
    v: Tensor,
    last_norm: Tensor,
    *,
    step: int,
    betas: tuple[float, float],
    eps: float,
    alpha: float,
    max_growth: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of arXiv 2410.01623 for G (k, n), P (k, r), moments (r, n), the residual's last norm ().

    Returns the direction (k, n), the moments, and the residual's norm.
    """
    R = P.mT @ G  # (r, n)
    normalised, m, v = adam_direction(R, m, v, step=step, betas=betas, eps=eps)
    beta1, beta2 = betas
    correction = (1 - beta2**step) ** 0.5 / (1 - beta1**step)
    # Norm-based scaling, a factor a column: how much Adam, before its bias correction, enlarges the projected part.
    factors = normalised.norm(dim=0) / correction / (R.norm(dim=0) + _TINY)  # (n)
    S = (G - alpha * (P @ R)) * factors
    # Norm-growth limiter. A residual of zeros says nothing about the next one's size.
    norm = S.norm()
    excess = (norm / (last_norm + _TINY) / max_growth).clamp(min=1.0)
    excess = torch.where(last_norm > 0, excess, 1.0)
    return alpha * (P @ normalised) + correction * S / excess, m, v, norm / excess


class Fira(MatrixOptimizer):
    """Fira's AdamW (arXiv 2410.01623). State of a (p, q) matrix: (k + 2 n) r + 1 numbers, k <= n.

    The projected part moves as in `GaLore`, with ``alpha`` for its scale. The residual G - alpha P P^T G moves too,
    each column (row, where the matrix is tall) times the ratio of norms of Adam's direction and gradient in the
    subspace; its norm may grow by ``max_growth`` a step.

    Two things are the released code's where the paper reads otherwise: the paper's residual is G - P P^T G, which is
    the same at alpha = 1 alone; and the limiter sees norms before Adam's bias correction.

    Where it differs from the package fira 1.0.2:

    - eps, weight decay and the SVD's dtype, as in `GaLore`.
    - A residual of norm zero (a gradient of zeros) leaves the next one unlimited. In the package the limiter then
      cuts the residual to a norm of 1e-8, from where it needs thousands of steps to grow back at 1 % a step.

    Args:
        params: matrices, named ones, or groups of them; a group may set any option below.
        lr: learning rate.
        rank: r, at most the shorter side of each matrix.
        betas: decay rates of the moments.
        eps: added to sqrt(vhat).
        weight_decay: decoupled.
        update_gap: steps between two projections.
        alpha: a factor of the projected part.
        max_growth: gamma of the norm-growth limiter.

    Raises:
        ValueError: a parameter is no float32 or float64 matrix, or an option is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        rank: int = 128,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        update_gap: int = 200,
        alpha: float = 0.25,
        max_growth: float = 1.01,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "rank": rank,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "update_gap": update_gap,
                "alpha": alpha,
                "max_growth": max_growth,
            },
        )

    def _initial_state(self, param: Tensor, group: Group) -> State:
        state = low_rank_state(param, group["rank"], ("exp_avg", "exp_avg_sq"))
        return {**state, "residual_norm": param.new_zeros(())}

    def _direction(self, G: Tensor, state: State, group: Group, step: int) -> tuple[Tensor, State]:
        P = current_projection(G, state, group, step)
        direction, m, v, norm = fira_direction(
            wide(G),
            P,
            state["exp_avg"],
            state["exp_avg_sq"],
            state["residual_norm"],
            step=step,
            betas=group["betas"],
            eps=group["eps"],
            alpha=group["alpha"],
            max_growth=group["max_growth"],
        )
        return laid_as(direction, G), {"projection": P, "exp_avg": m, "exp_avg_sq": v, "residual_norm": norm}
