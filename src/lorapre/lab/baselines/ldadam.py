"""LDAdam: Adam in a subspace that turns a little every step, with its moments turned along and its errors fed back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lorapre.lab.baselines._matrix_optimizer import Group, MatrixOptimizer, State, adam_direction


def next_projection(a: Tensor, P: Tensor, mhat: Tensor, rho: float) -> Tensor:
    """P_t (k, r): one block power iteration, begun at P_{t-1}, on rho P_{t-1} mhat_{t-1} + (1 - rho) a, a (k, n)."""
    b = rho * (P @ mhat) + (1 - rho) * a
    new: Tensor = torch.linalg.qr(b @ (b.mT @ P)).Q
    return new


def turned_moments(
    turn: Tensor, m: Tensor, v: Tensor, *, step: int, betas: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """The moments (r, n) of t - 1 >= 1 in the coordinates of t, turn = P_t^T P_{t-1} (r, r).

    A variance turns with the squares of the coefficients, as if the coordinates were uncorrelated; where that
    overshoots into the negative, the absolute value is taken.
    """
    beta1, beta2 = betas
    mhat, vhat = m / (1 - beta1 ** (step - 1)), v / (1 - beta2 ** (step - 1))
    second = turn.square() @ (vhat - mhat.square()) + (turn @ mhat).square()
    return turn @ m, (1 - beta2 ** (step - 1)) * second.abs()


def ldadam_direction(
    a: Tensor, P: Tensor, m: Tensor, v: Tensor, *, step: int, betas: tuple[float, float], eps: float, rho: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Algorithm 1 of arXiv 2410.16103 for a = G + error (k, n), last projection (k, r), last moments (r, n).

    Returns the direction (k, n), the new projection and moments, and the new error (k, n): what the projection took
    from a, and what turning took from the momentum, as often as the momentum would have acted.
    """
    beta1 = betas[0]
    if step == 1:
        new: Tensor = torch.linalg.svd(a, full_matrices=False).U[:, : P.shape[1]]
        turned, turned_square = m, v  # zeros
    else:
        new = next_projection(a, P, m / (1 - beta1 ** (step - 1)), rho)
        turned, turned_square = turned_moments(new.mT @ P, m, v, step=step, betas=betas)
    R = new.mT @ a  # (r, n)
    error = a - new @ R + beta1 / (1 - beta1) * (P @ m - new @ turned)
    normalised, m, v = adam_direction(R, turned, turned_square, step=step, betas=betas, eps=eps)
    return new @ normalised, new, m, v, error


class LDAdam(MatrixOptimizer):
    """LDAdamW (arXiv 2410.16103). State of a (p, q) matrix: (k + 2 n) r numbers, k <= n, and p q of error feedback.

    The left side of a square matrix is projected, as in the released code. There the error lives in the gradient's
    own memory, which ``zero_grad`` then must not free; here it is a buffer of the state, so that any loop and
    checkpoint will do. Clipping of gradients sees the gradient here, and gradient plus error there.

    Args:
        params: matrices, named ones, or groups of them; a group may set any option below.
        lr: learning rate.
        rank: r, at most the shorter side of each matrix.
        betas: decay rates of the moments.
        eps: added to sqrt(vhat).
        weight_decay: decoupled.
        rho: share of the momentum in what the projection follows; None is beta1, as the authors set it.
        error_feedback: keep and feed back the error; without it the state is GaLore's.

    Raises:
        ValueError: a parameter is no float32 or float64 matrix, or an option is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        rank: int = 16,
        betas: tuple[float, float] = (0.908, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rho: float | None = None,
        error_feedback: bool = True,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "rank": rank,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "rho": rho,
                "error_feedback": error_feedback,
            },
        )

    def _initial_state(self, param: Tensor, group: Group) -> State:
        k, n, r = min(param.shape), max(param.shape), group["rank"]
        state = {"projection": param.new_zeros(k, r), "exp_avg": param.new_zeros(r, n)}
        state["exp_avg_sq"] = param.new_zeros(r, n)
        if group["error_feedback"]:
            state["error"] = param.new_zeros(k, n)
        return state

    def _direction(self, G: Tensor, state: State, group: Group, step: int) -> tuple[Tensor, State]:
        tall = G.shape[0] > G.shape[1]
        a = G.mT if tall else G
        if group["error_feedback"]:
            a = a + state["error"]
        direction, P, m, v, error = ldadam_direction(
            a,
            state["projection"],
            state["exp_avg"],
            state["exp_avg_sq"],
            step=step,
            betas=group["betas"],
            eps=group["eps"],
            rho=group["betas"][0] if group["rho"] is None else group["rho"],
        )
        changed = {"projection": P, "exp_avg": m, "exp_avg_sq": v}
        if group["error_feedback"]:
            changed["error"] = error
        return direction.mT if tall else direction, changed
