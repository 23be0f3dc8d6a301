"""MLorc: Adam whose two moments are rebuilt from low-rank factors each step, and compressed again afterwards."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lorapre.lab.baselines._matrix_optimizer import Group, MatrixOptimizer, State, adam_direction

Factors = tuple[Tensor, Tensor, Tensor]


def random_matrix(rows: int, columns: int, *, seed: int, step: int, name: str, like: Tensor) -> Tensor:
    """Normal numbers (rows, columns) that depend on ``seed``, ``step``, ``name`` and the kind of device alone.

    Nothing is kept between steps and the global generators stay as they are, so that a resumed run repeats exactly.
    """
    digest = hashlib.sha256(f"{seed}:{step}:{name}".encode()).digest()
    generator = torch.Generator(like.device).manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.randn(rows, columns, generator=generator, dtype=like.dtype, device=like.device)


def randomized_svd(A: Tensor, omega: Tensor, rank: int, power_iterations: int) -> Factors:
    """U (p, r), s (r), V^T (r, q) of A (p, q), from the range of (A A^T)^power_iterations A omega, omega (q, l)."""
    Q = torch.linalg.qr(A @ omega).Q  # (p, l)
    for _ in range(power_iterations):
        Q = torch.linalg.qr(A @ torch.linalg.qr(A.mT @ Q).Q).Q
    U, s, Vh = torch.linalg.svd(Q.mT @ A, full_matrices=False)
    return (Q @ U)[:, :rank], s[:rank], Vh[:rank]


def rebuilt(factors: Factors) -> Tensor:
    """U diag(s) V^T (p, q)."""
    U, s, Vh = factors
    return (U * s) @ Vh


def without_negatives(v: Tensor) -> Tensor:
    """``v`` with the mean absolute value of its negative entries in their places."""
    negative = v < 0
    mean = (-v).clamp(min=0).sum() / negative.sum().clamp(min=1)
    return torch.where(negative, mean, v)


def mlorc_direction(
    G: Tensor, m: Factors, v: Factors, *, step: int, betas: tuple[float, float], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of arXiv 2506.01897 for G (p, q), up to the compression: the direction, and both moments (p, q)."""
    return adam_direction(G, rebuilt(m), without_negatives(rebuilt(v)), step=step, betas=betas, eps=eps)


class MLorc(MatrixOptimizer):
    """MLorc-AdamW (arXiv 2506.01897). State of a (p, q) matrix: 2 (p + q + 1) r numbers.

    Each moment is kept as U diag(s) V^T from a randomized SVD. A step rebuilds both, gives the negative entries that
    compression left in v their mean absolute value, takes Adam's step with the full-size moments, and compresses them.
    So the update is full-rank, and at r = min(p, q) it is Adam's.

    Read from the authors' code: that the repair of v leaves the other entries alone, no oversampling, and one power
    iteration (their default is torch.pca_lowrank with niter=1; their own randomized SVD, a switch away, has none).
    The random matrices come from ``seed`` and the step, the same for all matrices of a shape; the authors draw from
    the global generator.

    Args:
        params: matrices, named ones, or groups of them; a group may set any option below.
        lr: learning rate.
        rank: r, at most the shorter side of each matrix.
        betas: decay rates of the moments.
        eps: added to sqrt(vhat).
        weight_decay: decoupled.
        oversampling: columns of the random matrix beyond r, as far as the matrix has them.
        power_iterations: of the randomized SVD.
        seed: of the random matrices.

    Raises:
        ValueError: a parameter is no float32 or float64 matrix, or an option is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        rank: int = 128,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        oversampling: int = 0,
        power_iterations: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "rank": rank,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "oversampling": oversampling,
                "power_iterations": power_iterations,
                "seed": seed,
            },
        )

    def _initial_state(self, param: Tensor, group: Group) -> State:
        (p, q), r = param.shape, group["rank"]
        shapes = {"U": (p, r), "s": (r,), "Vh": (r, q)}
        return {f"{moment}_{part}": param.new_zeros(shape) for moment in "mv" for part, shape in shapes.items()}

    def _direction(self, G: Tensor, state: State, group: Group, step: int) -> tuple[Tensor, State]:
        m, v = ((state[f"{name}_U"], state[f"{name}_s"], state[f"{name}_Vh"]) for name in "mv")
        direction, *moments = mlorc_direction(G, m, v, step=step, betas=group["betas"], eps=group["eps"])
        columns = min(group["rank"] + group["oversampling"], *G.shape)
        changed: State = {}
        for name, moment in zip("mv", moments, strict=True):
            omega = random_matrix(G.shape[1], columns, seed=group["seed"], step=step, name=name, like=G)
            U, s, Vh = randomized_svd(moment, omega, group["rank"], group["power_iterations"])
            changed |= {f"{name}_U": U, f"{name}_s": s, f"{name}_Vh": Vh}
        return direction, changed
