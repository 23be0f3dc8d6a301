"""The robust regression: factors with an orthonormal right side, moved by one sweep of block least squares.

The momentum is M = B A with A A^T = I. A step brings M' = decay M + gain G, and the sweep keeps the part of it that
one round of subspace iteration finds, starting from the rows of A:

    K = M' A^T,  U = orth(K),  L = U^T M',  M <- U L = U U^T M'

with U L re-orthonormalised on the right. No small singular value is inverted anywhere, ||M_t|| never exceeds
decay ||M_(t-1)|| + gain ||G_t||, and at r = min(p, q) it is the exact average. M' itself is never formed.

Shapes as in `lorapre.factors`: ``G`` is (n, p, q), ``B`` is (n, p, r), ``A`` is (n, r, q).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def orthonormalize(X: Tensor, *, passes: int = 2, gram_dtype: torch.dtype = torch.float64) -> Tensor:
    """An orthonormal basis Q (n, p, r) of the columns of ``X`` (n, p, r), by Cholesky QR with equilibrated columns.

    Each pass forms the Gram matrix of the columns, scaled to length 1, in ``gram_dtype``, shifts its diagonal by
    what that precision rounds away, and multiplies by the inverse of its Cholesky factor: only products of X's
    size, no factorisation of it. The first pass leaves an error of about eps * condition(X), the next one removes
    it. In float64, 2 passes hold Q^T Q = I to float32's rounding up to a condition of 1e6 and beyond; in float32
    take 3.

    Where X is singular, Q^T Q has eigenvalues between 0 and 1 instead: never more, so that Q Q^T does not enlarge
    anything. Zero columns stay zero.
    """
    r = X.shape[-1]
    identity = torch.eye(r, dtype=gram_dtype, device=X.device)
    tiny = torch.finfo(X.dtype).tiny ** 0.5
    Q = scaled(X)
    for number in range(passes):
        last = number == passes - 1
        wide = Q.to(gram_dtype)
        gram = wide.mT @ wide  # (n, r, r)
        length = gram.diagonal(dim1=-2, dim2=-1).sqrt()  # (n, r)
        inverse_length = torch.where(length > tiny, length.reciprocal(), 0.0)[:, None, :]  # (n, 1, r)
        gram = gram * inverse_length * inverse_length.mT
        lower, info = torch.linalg.cholesky_ex(gram + diagonal_shift(r, X.dtype, gram_dtype, last=last) * identity)
        inverse = torch.linalg.solve_triangular(lower, identity.expand_as(gram), upper=False)  # (n, r, r)
        polished = torch.bmm(Q, (inverse_length.mT * inverse.mT).to(X.dtype))
        # Without its shift the last pass may find no decomposition; what came before is bounded, if less exact.
        Q = torch.where((info == 0)[:, None, None], polished, Q) if last and number > 0 else polished
    return Q


def basis(X: Tensor) -> Tensor:
    """An orthonormal basis (n, p, r) of the columns of ``X`` (n, p, r): what `sweep` takes.

    On a CPU by Householder's reflections, which LAPACK makes in less time; elsewhere, where they are
    slow, by `orthonormalize`. Columns come in the same order and with the same signs. What is missing in a singular X
    the reflections fill up, so that Q^T Q = I throughout.
    """
    if X.device.type != "cpu":
        return orthonormalize(X)
    Q: Tensor
    Q, R = torch.linalg.qr(scaled(X))
    return Q.mul_(torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[:, None, :])


def scaled(X: Tensor) -> Tensor:
    """``X`` (n, p, r) with a largest element of 1 in each matrix, so that no square under- or overflows."""
    return X / X.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(X.dtype).tiny)


def diagonal_shift(r: int, dtype: torch.dtype, gram_dtype: torch.dtype, *, last: bool) -> float:
    """What a pass of `orthonormalize` adds to the diagonal of a Gram matrix whose columns have length 1."""
    eps = torch.finfo(gram_dtype).eps
    if gram_dtype == dtype:
        return eps if last else 8 * r * eps
    # Dependent columns come out 1 / sqrt(shift) times what X's own precision rounds away: that must stay small.
    return float(r * torch.finfo(dtype).eps ** 1.5)


def sweep(B: Tensor, A: Tensor, G: Tensor, GA: Tensor, *, decay: float, gain: float) -> tuple[Tensor, Tensor]:
    """One sweep from M = B A towards decay M + gain G; returns the new (B, A) with A's rows orthonormal.

    Args:
        B: (n, p, r).
        A: (n, r, q), orthonormal rows.
        G: (n, p, q).
        GA: G A^T (n, p, r), which the weight update needs as well.
        decay: weight of the old momentum.
        gain: weight of the gradient.
    """
    U = basis(B * decay + GA * gain)  # (n, p, r)
    L = torch.bmm(torch.bmm(U.mT, B) * decay, A).baddbmm_(U.mT, G, alpha=gain)  # U^T M' (n, r, q)
    new_A = _next_basis(L, A)
    return torch.bmm(U, torch.bmm(L, new_A.mT)), new_A


def on_old_basis(B: Tensor, GA: Tensor, *, decay: float, gain: float) -> Tensor:
    """The left factor (n, p, r) of (decay M + gain G) A^T A, the momentum's projection on the old rows of A.

    ``B`` and ``GA`` = G A^T are (n, p, r). What a step costs that does not `sweep`: no second product with G, no basis.
    """
    return B * decay + GA * gain


def _next_basis(L: Tensor, A: Tensor, basis_of: Callable[[Tensor], Tensor] = basis) -> Tensor:
    """An orthonormal basis (n, r, q) of the rows of ``L`` (n, r, q), filled up from the old basis ``A``.

    Where the momentum has a rank below r (a first gradient of low rank, none at all), L leaves directions open. A
    share of the old basis at the size of L's own rounding closes them and changes nothing elsewhere.
    """
    size = torch.linalg.vector_norm(L, dim=(-2, -1), keepdim=True) / L.shape[-2] ** 0.5
    size = torch.where(size > 0, size, 1.0)
    return basis_of((L / size + 8 * torch.finfo(L.dtype).eps * A).mT).mT.contiguous()


def tangent_step(B: Tensor, A: Tensor, G: Tensor, GA: Tensor, *, decay: float, gain: float) -> tuple[Tensor, Tensor]:
    """The same step from one read of G: projections on the old bases, and the core from the tangent space.

    With U = orth(B) and V^T = A: K = M' V, L = M'^T U, C = U^T M' V; the new bases are those of K and L, the new
    core is the best approximation of M' that the tangent space of the old factors holds, seen from them:

        S = (U1^T U)(L^T V1) + (U1^T K)(V^T V1) - (U1^T U) C (V^T V1)

    (projector splitting for dynamical low-rank approximation: Lubich and Oseledets; Ceruti and others).
    """
    U = orthonormalize(B)  # (n, p, r)
    S = torch.bmm(U.mT, B)  # (n, r, r)
    GU = torch.bmm(G.mT, U)  # (n, q, r); with GA all that is read of G, and both at once
    K = B * decay + GA * gain
    L = torch.bmm(A.mT, S.mT) * decay + GU * gain  # (n, q, r)
    C = S * decay + torch.bmm(U.mT, GA) * gain
    U1 = orthonormalize(K)
    new_A = _next_basis(L.mT, A, orthonormalize)
    V1 = new_A.mT
    turn_U, turn_V = torch.bmm(U1.mT, U), torch.bmm(A, V1)  # (n, r, r) each
    core = turn_U @ (L.mT @ V1 - C @ turn_V) + torch.bmm(U1.mT, K) @ turn_V
    return torch.bmm(U1, core), new_A
