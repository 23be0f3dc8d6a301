"""MoFaSGD: the momentum as a truncated SVD that follows the gradient in its tangent space; the step is U V^T."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lorapre.lab.baselines._matrix_optimizer import Group, MatrixOptimizer, State


def advance_momentum(G: Tensor, U: Tensor, s: Tensor, V: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """The best rank-r approximation of beta U diag(s) V^T + T, T = U U^T G + G V V^T - U U^T G V V^T.

    T is the part of G (p, q) in the tangent space at U (p, r), s (r), V (q, r) (arXiv 2507.08091). Two thin QR
    decompositions and the SVD of a matrix of at most 2r x 2r give sum and approximation.
    """
    r = s.shape[0]
    GV, GtU = G @ V, G.mT @ U  # (p, r), (q, r)
    left, R_left = torch.linalg.qr(torch.cat([U, GV], dim=1))  # (p, l), (l, 2r) with l = min(p, 2r)
    right, R_right = torch.linalg.qr(torch.cat([V, GtU], dim=1))
    identity = torch.eye(r, dtype=G.dtype, device=G.device)
    core = torch.cat(
        [
            torch.cat([beta * torch.diag(s) - U.mT @ GV, identity], dim=1),
            torch.cat([identity, torch.zeros_like(identity)], dim=1),
        ]
    )  # (2r, 2r): the sum is [U, GV] core [V, G^T U]^T
    U_core, s, Vh_core = torch.linalg.svd(R_left @ core @ R_right.mT, full_matrices=False)
    return left @ U_core[:, :r], s[:r], right @ Vh_core[:r].mT


def spectral_direction(U: Tensor, s: Tensor, V: Tensor) -> Tensor:
    """U V^T (p, q) over the directions that the momentum has: all singular values one, but for those at zero."""
    zero = s[0] * 2 * max(U.shape[0], V.shape[0]) * torch.finfo(s.dtype).eps
    return (U * (s > zero)) @ V.mT


class MoFaSGD(MatrixOptimizer):
    """MoFaSGD (arXiv 2507.08091). State of a (p, q) matrix: (p + q + 1) r numbers.

    Momentum U diag(s) V^T, orthonormal U and V, moves by the gradient's part in its tangent space, and the weight by
    W <- W - lr U V^T: an update of rank r and spectral norm lr, whatever the gradient's size and the matrix's shape.

    Where the paper and its released code part, this is the paper: the code steps along U diag(1 / s) V^T with
    clipped 1 / s. The momentum is a sum, as in the code; an average with 1 - beta is a multiple of it and has the same
    U and V. The code begins with the truncated SVD of the weight, which is not in units of a gradient and outlives many
    steps; here the momentum begins with that of the first gradient. Singular values that are zero to rounding have no
    direction: U V^T leaves them out.

    Args:
        params: matrices, named ones, or groups of them; a group may set any option below.
        lr: learning rate, the spectral norm of each step.
        rank: r, at most the shorter side of each matrix.
        beta: decay rate of the momentum.
        weight_decay: decoupled.

    Raises:
        ValueError: a parameter is no float32 or float64 matrix, or an option is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 2e-2,
        rank: int = 32,
        beta: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "rank": rank, "beta": beta, "weight_decay": weight_decay})

    def _initial_state(self, param: Tensor, group: Group) -> State:
        (p, q), r = param.shape, group["rank"]
        return {"U": param.new_zeros(p, r), "s": param.new_zeros(r), "V": param.new_zeros(q, r)}

    def _direction(self, G: Tensor, state: State, group: Group, step: int) -> tuple[Tensor, State]:
        r = group["rank"]
        if step == 1:
            left, singular, right = torch.linalg.svd(G, full_matrices=False)
            U, s, V = left[:, :r], singular[:r], right[:r].mT
        else:
            U, s, V = advance_momentum(G, state["U"], state["s"], state["V"], group["beta"])
        return spectral_direction(U, s, V), {"U": U, "s": s, "V": V}
