"""Orthonormal bases of the rows of factors of several shapes, as at high ranks: Cholesky QR. Imports triton.

It is `lorapre.subspace.orthonormalize` with the (r, r) matrices of all shapes in one batch, their decompositions by
`lorapre.backends.triton.blocked_cholesky`, and Gram matrices of `lorapre.backends.triton.table.GRAMS`.

Shapes: ``stacks`` are X (n_i, r, m_i) of one shape each; (r, r) matrices are (n, r, r), n the sum of the n_i.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lorapre import subspace
from lorapre.backends.triton import products, table
from lorapre.backends.triton.blocked_cholesky import inverse_cholesky


def conditioned(stacks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """All passes but the last, in place: X becomes R^-1 X, whose rows are close to orthonormal.

    Returns its Gram matrices W, in the precision of the last pass, and R.
    """
    first, *others = table.GRAMS
    n, r = sum(len(X) for X in stacks), stacks[0].shape[1]
    W = _empty(n, r, first, stacks[0])
    R = torch.empty((n, r, r), dtype=torch.float32, device=W.device)
    sizes = R.new_empty((n, 1, 1))
    for at, X in _placed(stacks):
        # A largest element of 1, so that no square under- or overflows.
        size = torch.linalg.vector_norm(X, torch.inf, dim=(-2, -1), keepdim=True)
        sizes[at] = torch.where(size > 0, size, 1.0)
        W[at] = products.gram(X.div_(sizes[at]), first)
    for number, precision in enumerate(others):
        T, triangle, _ = _triangles(W, last=False)
        R = triangle * sizes if number == 0 else _square(R, triangle)
        W = _empty(n, r, precision, R)
        for at, X in _placed(stacks):
            X.copy_(products.multiply(T[at], X, table.PRECISION["bases"]))
            W[at] = products.gram(X, precision)
    return W, R


def last_pass(W: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """(E, S) such that Q = X + E X has orthonormal rows and S is the old X times Q^T, from what `conditioned` returns.

    ``W`` is used up.
    """
    S = _square(R, W.float())
    T, _, works = _triangles(W, last=True)
    # Without its shift it may find no decomposition; what came before is bounded, if less exact.
    E = torch.where(works[:, None, None], T - torch.eye(T.shape[-1], device=T.device), 0.0)
    return E, S + _square(S, E.mT)


def corrected(X: Tensor, E: Tensor) -> Tensor:
    """X + E X: in this form a product of less precision may do, as E is small where X was well conditioned."""
    return products.multiply(E, X, table.PRECISION["polish"]).add_(X)


def projector(W: Tensor) -> Tensor:
    """P such that X^T P X projects on the rows of X, whose Gram matrices are ``W``: W^-1 up to (I - W)^3.

    It stands in for a last pass where nobody needs the basis itself. X^T P X has eigenvalues between 0 and 1 whatever
    the condition of X is: 1 - (1 - w)^3 for an eigenvalue w of W. W^-1 would enlarge what is rounded away from weak
    directions.
    """
    W = W.float()
    P = _square(W, W).sub_(W, alpha=3.0)
    P.diagonal(dim1=-2, dim2=-1).add_(3.0)
    return P


def _triangles(W: Tensor, *, last: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(T, R, works) of X = R Q, Q = T X, from W, which is used up; R and T are lower triangles."""
    shift = subspace.diagonal_shift(W.shape[-1], torch.float32, W.dtype, last=last)
    length = W.diagonal(dim1=-2, dim2=-1).sqrt()  # (n, r)
    there = length > torch.finfo(torch.float32).tiny ** 0.5
    inverse_length = torch.where(there, length.reciprocal(), 0.0)
    W.mul_(inverse_length[:, :, None]).mul_(inverse_length[:, None, :])
    W.diagonal(dim1=-2, dim2=-1).add_(shift)
    T, works = inverse_cholesky(W, shift / 2)
    R = W.mul_(torch.where(there, length, 0.0)[:, :, None])
    return T.mul_(inverse_length[:, None, :]).float(), R.float(), works


def _square(X: Tensor, Y: Tensor) -> Tensor:
    """The product of (r, r) matrices; the time of another precision would hardly differ."""
    return products.multiply(X, Y, "ieee")


def _empty(n: int, r: int, precision: str, like: Tensor) -> Tensor:
    return like.new_empty((n, r, r), dtype=torch.float64 if precision == "float64" else torch.float32)


def _placed(stacks: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    start = 0
    for X in stacks:
        yield slice(start, start + len(X)), X
        start += len(X)
