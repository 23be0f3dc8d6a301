"""Orthonormal bases of the rows of factors of several shapes, as at high ranks: Cholesky QR. Imports triton.

It is `lorapre.subspace.orthonormalize` with the (r, r) matrices of all shapes in one batch, their decompositions by
`lorapre.backends.triton.blocked_cholesky`, and Gram matrices of `lorapre.backends.triton.table.GRAMS`. Its products
are float32's own where torch's are: see `precise`.

Shapes: ``stacks`` are X (n_i, r, m_i) of one shape each, with elements of moderate size, so that no square under- or
overflows; (r, r) matrices are (n, r, r), n the sum of the n_i.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lorapre import subspace
from lorapre.backends.triton import table
from lorapre.backends.triton.blocked_cholesky import inverse_cholesky


@contextmanager
def precise(precision: str) -> Iterator[None]:
    """Torch's float32 products on a GPU: by tensor cores where that is "tf32", else as they are."""
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        backend.fp32_precision = before


def conditioned(stacks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """All passes but the last, in place: X becomes R^-1 X, whose rows are close to orthonormal.

    Returns its Gram matrices W, in the precision of the last pass, and R.
    """
    first, *others = table.GRAMS
    W = grams(stacks, first)
    R: Tensor | None = None
    for precision in others:
        T, triangle, _ = _triangles(W, last=False)
        R = triangle if R is None else torch.bmm(R, triangle)
        for at, X in _placed(stacks):
            X.copy_(torch.bmm(T[at], X))
        del T, triangle, W
        W = grams(stacks, precision)
    assert R is not None  # one pass leaves no basis of float32's precision
    return W, R


def grams(stacks: Sequence[Tensor], precision: str) -> Tensor:
    """X X^T (n, r, r) of each X, in float64 or "ieee", which is float32."""
    dtype = torch.float64 if precision == "float64" else torch.float32
    r = stacks[0].shape[1]
    W = stacks[0].new_empty((sum(map(len, stacks)), r, r), dtype=dtype)
    for at, X in _placed(stacks):
        wide = X.to(dtype)
        torch.bmm(wide, wide.mT, out=W[at])
        del wide  # before the next one is made
    return W


def last_pass(W: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """(E, S) such that Q = X + E X has orthonormal rows and S is the old X times Q^T, from what `conditioned` returns.

    ``W`` is used up.
    """
    S = torch.bmm(R, W.float())
    E, _, works = _triangles(W, last=True)
    E.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    # Without its shift it may find no decomposition; what came before is bounded, if less exact.
    E.mul_(works[:, None, None])
    return E, torch.baddbmm(S, S, E.mT)


def projector(W: Tensor) -> Tensor:
    """P such that X^T P X projects on the rows of X, whose Gram matrices are ``W``: W^-1 up to (I - W)^3.

    It stands in for a last pass where nobody needs the basis itself. X^T P X has eigenvalues between 0 and 1 whatever
    the condition of X is: 1 - (1 - w)^3 for an eigenvalue w of W. W^-1 would enlarge what is rounded away from weak
    directions.
    """
    W = W.float()
    P = torch.baddbmm(W, W, W, beta=-3.0)
    P.diagonal(dim1=-2, dim2=-1).add_(3.0)
    return P


def _triangles(W: Tensor, *, last: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(T, R, works) of X = R Q, Q = T X, from W, which is used up; R and T are lower triangles.

    ``works`` (n) is 1 where W has a decomposition, else 0.
    """
    shift = subspace.diagonal_shift(W.shape[-1], torch.float32, W.dtype, last=last)
    length = W.diagonal(dim1=-2, dim2=-1).sqrt()  # (n, r)
    there = length > torch.finfo(torch.float32).tiny ** 0.5
    inverse_length = torch.where(there, length.reciprocal(), 0.0)
    W.mul_(inverse_length[:, :, None]).mul_(inverse_length[:, None, :])
    W.diagonal(dim1=-2, dim2=-1).add_(shift)
    T, works = inverse_cholesky(W, shift / 2)
    T = T.mul_(inverse_length[:, None, :]).float()  # and the wide one is gone, before there is R
    return T, W.mul_(length.mul_(there)[:, :, None]).float(), works


def _placed(stacks: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    start = 0
    for X in stacks:
        yield slice(start, start + len(X)), X
        start += len(X)
