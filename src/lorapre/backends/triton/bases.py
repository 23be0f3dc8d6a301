"""Orthonormal bases by Cholesky QR, the r x r algebra of a pass in one launch. Imports triton.

The same as `lorapre.subspace.orthonormalize` with three passes in float32. Decompositions, inversions and the dozen
small operations around them are a hundred launches there.
"""

# Triton's decorators and types are untyped where they are not missing (other platforms than Linux).
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorapre import subspace
from lorapre.backends.triton import table

#: Shorter columns than this, after the matrix's largest element is 1, are zero.
_TINY = tl.constexpr(2.0**-63)


@triton.jit
def inverse_cholesky(gram, T, shift, R: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr):
    """T (n, R, R) such that X T has orthonormal columns, from X^T X; one matrix a program, held in registers.

    The columns are scaled to length 1 and ``shift`` is added to the diagonal first. LAST leaves a matrix that has no
    decomposition as it is.
    """
    matrix = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    rows, cols = i[:, None], i[None, :]
    inside = (rows < R) & (cols < R)
    diagonal = rows == cols
    S = tl.load(gram + matrix * R * R + rows * R + cols, mask=inside, other=0.0)
    length = tl.sqrt(tl.sum(tl.where(diagonal, S, 0.0), axis=1))
    scale = tl.where(length > _TINY, 1.0 / tl.maximum(length, _TINY), 0.0)
    S = S * scale[:, None] * scale[None, :]
    S += tl.where(diagonal, tl.where(rows < R, shift, 1.0), 0.0)
    # L column by column, and at once what turns L into the identity: its inverse.
    inverse = tl.where(diagonal, 1.0, 0.0)
    works = 1
    for k in range(R):
        at = i == k
        column = tl.sum(tl.where(at[None, :], S, 0.0), axis=1)
        pivot = tl.sum(tl.where(at, column, 0.0), axis=0)
        works = works & (pivot > 0).to(tl.int32)
        root = 1.0 / tl.sqrt(tl.maximum(pivot, _TINY))
        column = tl.where(i >= k, column * root, 0.0)
        row = tl.sum(tl.where(at[:, None], inverse, 0.0), axis=0) * root
        S -= column[:, None] * column[None, :]
        below = tl.where(i > k, column, 0.0)
        inverse = tl.where(at[:, None], row[None, :], inverse - below[:, None] * row[None, :])
    result = inverse * scale[None, :]
    if LAST:
        result = tl.where(works != 0, result, tl.where(diagonal, 1.0, 0.0))
    tl.store(T + matrix * R * R + cols * R + rows, result, mask=inside)


def orthonormalize(X: Tensor) -> Tensor:
    """An orthonormal basis (n, p, r) of the columns of ``X`` (n, p, r), float32; `lorapre.subspace.orthonormalize`.

    Ranks above what a program's registers hold are left to that.
    """
    n, _, r = X.shape
    if r > table.REGISTER_RANK:
        return subspace.orthonormalize(X)
    block = max(16, 1 << (r - 1).bit_length())
    T = X.new_empty((n, r, r))
    Q = subspace.scaled(X)
    for number in range(3):
        inverse_cholesky[(n,)](
            torch.bmm(Q.mT, Q),
            T,
            subspace.diagonal_shift(r, torch.float32, torch.float32, last=number == 2),
            R=r,
            BLOCK=block,
            LAST=number == 2,
            num_warps=8 if block > 64 else 4,
        )
        Q = torch.bmm(Q, T)
    return Q
