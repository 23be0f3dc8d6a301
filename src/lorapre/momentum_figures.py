"""How good factors m_B m_A of a momentum are, in numbers. Pure functions on batches of matrices.

Shapes: ``m_B`` is (n, p, r), ``m_A`` (n, r, q), gradients ``G`` and dense momenta ``M`` are (n, p, q), all in float64;
a figure is a tensor (n,), one number a matrix. ``eps`` is that of the dtype in which the factors are kept,
by which what is rounding is told from a direction. `lorapre.diagnostics` takes them while an optimizer trains.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def row_space(m_A: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of the rows of m_A, (n, q, r), and the numbers of its columns that are not zero, (n,).

    A singular m_A has fewer than r directions; the columns of the missing ones are zero.
    """
    Q, R = torch.linalg.qr(m_A.mT)
    U, singular, _ = torch.linalg.svd(_evened(R))
    kept = singular > _rounding(m_A, eps) * singular[..., :1]
    return (Q @ U) * kept[..., None, :], kept.sum(dim=-1)


def conditions(m_B: Tensor, m_A: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Condition numbers (n,) of m_A and of the r singular values of m_B m_A, from thin QRs alone; inf if singular.

    With m_B = Q_B R_B and m_A^T = Q_A R_A the product is Q_B (R_B R_A^T) Q_A^T: its core is r x r. A factor is
    singular by its rows or columns brought to one length: each has its own rounding, however small it is.
    """
    R_A = torch.linalg.qr(m_A.mT, mode="r").R
    R_B = torch.linalg.qr(m_B, mode="r").R
    without_A = _singular(R_A, _rounding(m_A, eps))
    without = without_A | _singular(R_B, _rounding(m_B, eps))
    return _condition(R_A).masked_fill(without_A, math.inf), _condition(R_B @ R_A.mT).masked_fill(without, math.inf)


def _condition(core: Tensor) -> Tensor:
    S: Tensor = torch.linalg.svdvals(core)
    return S[..., 0] / S[..., -1]


def _singular(R: Tensor, rounding: float) -> Tensor:
    S: Tensor = torch.linalg.svdvals(_evened(R))
    return S[..., -1] <= rounding * S[..., 0]


def _evened(R: Tensor) -> Tensor:
    """Its columns at length 1, which are as long as those of what it is the triangle of; zeros stay."""
    lengths: Tensor = torch.linalg.vector_norm(R, dim=-2, keepdim=True)
    return R / lengths.where(lengths > 0, 1.0)


def _rounding(factor: Tensor, eps: float) -> float:
    """What of a singular value, relative to the largest, is rounding: of the numbers kept, or of the arithmetic."""
    return max(math.sqrt(min(factor.shape[-2:])) * eps, max(factor.shape[-2:]) * torch.finfo(factor.dtype).eps)


def energy_outside(G: Tensor, basis: Tensor) -> Tensor:
    """1 - ||G Q||^2 / ||G||^2, (n,); nan where G is zero."""
    inside = (G @ basis).square().sum(dim=(-2, -1)) / G.square().sum(dim=(-2, -1))
    return (1.0 - inside).clamp(min=0.0)


def drift(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> Tensor:
    """1 - ||Q_old^T Q_new||^2 / k, (n,), with k the larger dimension of two subspaces; nan where both are empty."""
    shared = (old[0].mT @ new[0]).square().sum(dim=(-2, -1))
    return (1.0 - shared / torch.maximum(old[1], new[1])).clamp(min=0.0)


def tracking(m_B: Tensor, m_A: Tensor, M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Error of m_B m_A relative to M, that of the best rank-r approximation, and the cosine; nan where M is zero.

    The best error is the tail of M's singular values (Eckart and Young), squared those of the smaller Gram matrix.
    """
    product = m_B @ m_A
    size = torch.linalg.matrix_norm(M)
    error = torch.linalg.matrix_norm(product - M) / size
    gram = M @ M.mT if M.shape[-2] <= M.shape[-1] else M.mT @ M
    energy = torch.linalg.eigvalsh(gram).clamp(min=0.0)  # ascending
    best = (energy[..., : -m_A.shape[-2]].sum(dim=-1) / energy.sum(dim=-1)).sqrt()
    cosine = (product * M).sum(dim=(-2, -1)) / (torch.linalg.matrix_norm(product) * size)
    undefined = size == 0
    return error.masked_fill(undefined, math.nan), best, cosine


def largest_singular_value(X: Tensor) -> Tensor:
    """Of each matrix (n, p, q), by the Gram matrix of its shorter side: (n,); nan where one is not finite."""
    if not X.isfinite().all():
        return X.new_full((len(X),), math.nan)
    gram = torch.bmm(X, X.mT) if X.shape[-2] <= X.shape[-1] else torch.bmm(X.mT, X)
    largest: Tensor = torch.linalg.eigvalsh(gram)[:, -1].clamp(min=0.0).sqrt()
    return largest
