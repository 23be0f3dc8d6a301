"""GaLore: Adam on the gradient's projection to its leading singular vectors, which are renewed now and then."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lorapre.lab.baselines._matrix_optimizer import Group, MatrixOptimizer, State, adam_direction


def wide(G: Tensor) -> Tensor:
    """``G`` (p, q) laid on its longer side: (k, n) with k = min(p, q) <= n. A square matrix is transposed.

    GaLore projects the shorter side, the right one of a square; on this view that is always the left.
    """
    return G.mT if G.shape[0] >= G.shape[1] else G


def laid_as(wide_matrix: Tensor, G: Tensor) -> Tensor:
    """What ``wide`` did to G (p, q), undone on another matrix of (k, n)."""
    return wide_matrix.mT if G.shape[0] >= G.shape[1] else wide_matrix


def top_singular_vectors(G: Tensor, rank: int) -> Tensor:
    """GaLore's projection P (k, r): the first ``rank`` left singular vectors of ``wide(G)``.

    Their signs are the decomposition's own. Moments survive a new projection in GaLore, so that the signs matter
    then: the SVD is of G as it lies, as in the released code, not of its transpose, whose signs may differ.
    """
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    P: Tensor = Vh[:rank].mT if G.shape[0] >= G.shape[1] else U[:, :rank]
    return P


def low_rank_state(param: Tensor, rank: int, moments: tuple[str, ...]) -> State:
    """Zeros: ``projection`` (k, r), and ``moments`` (r, n) each, with k the shorter side of (p, q)."""
    k, n = min(param.shape), max(param.shape)
    return {
        "projection": param.new_zeros(k, rank),
        **{name: param.new_zeros(rank, n) for name in moments},
    }


def current_projection(G: Tensor, state: State, group: Group, step: int) -> Tensor:
    """P (k, r): the leading singular vectors of G at steps 1, 1 + update_gap, ...; the stored one between."""
    if (step - 1) % group["update_gap"] == 0:
        return top_singular_vectors(G, group["rank"])
    return state["projection"]


def galore_direction(
    G: Tensor, P: Tensor, m: Tensor, v: Tensor, *, step: int, betas: tuple[float, float], eps: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 2 of arXiv 2403.03507 for G (k, n), P (k, r), moments (r, n): direction (k, n), and the moments."""
    R = P.mT @ G  # (r, n)
    normalised, m, v = adam_direction(R, m, v, step=step, betas=betas, eps=eps)
    return scale * (P @ normalised), m, v


class GaLore(MatrixOptimizer):
    """GaLore's AdamW (arXiv 2403.03507, Algorithm 2). State of a (p, q) matrix: (k + 2 n) r numbers, k <= n.

    Every ``update_gap`` steps P becomes the r leading singular vectors of the gradient's shorter side (the right ones
    of a square). R = P^T G enters Adam, whose direction returns as scale P N. The moments go on when P changes, in
    the coordinates of the new P, as in the released code.

    Where it differs from the package galore-torch 1.0:

    - eps is added to sqrt(vhat), as the paper has it. The package adds it to sqrt(v) before the bias correction,
      which is this one's eps / sqrt(1 - beta2^t).
    - Weight decay shrinks the weight before the update, as torch's AdamW does; the package shrinks the updated weight.
    - The SVD is in the parameter's dtype; the package's is in float32 always.

    Args:
        params: matrices, named ones, or groups of them; a group may set any option below.
        lr: learning rate.
        rank: r, at most the shorter side of each matrix.
        betas: decay rates of the moments.
        eps: added to sqrt(vhat).
        weight_decay: decoupled.
        update_gap: steps between two projections.
        scale: the paper's alpha, a factor of the direction.

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
        scale: float = 0.25,
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
                "scale": scale,
            },
        )

    def _initial_state(self, param: Tensor, group: Group) -> State:
        return low_rank_state(param, group["rank"], ("exp_avg", "exp_avg_sq"))

    def _direction(self, G: Tensor, state: State, group: Group, step: int) -> tuple[Tensor, State]:
        P = current_projection(G, state, group, step)
        direction, m, v = galore_direction(
            wide(G),
            P,
            state["exp_avg"],
            state["exp_avg_sq"],
            step=step,
            betas=group["betas"],
            eps=group["eps"],
            scale=group["scale"],
        )
        return laid_as(direction, G), {"projection": P, "exp_avg": m, "exp_avg_sq": v}
