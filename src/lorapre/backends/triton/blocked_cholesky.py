"""Inverse Cholesky factors of many large matrices at once, nearly all of it by batched products. Imports triton."""

# Triton's decorators and types are untyped where they are not missing (other platforms than Linux).
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorapre.backends.triton import table


@triton.jit
def decompose(S, T, works, floor, start, R, BLOCK: tl.constexpr):
    """L and L^-1 of the block of columns from ``start`` on, in place and to T; one matrix (R, R) a program.

    No pivot counts less than ``floor``; ``works`` (n) becomes 0 where one is not positive.
    """
    matrix = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    rows = start + i
    at = matrix * R * R + rows[:, None] * R + rows[None, :]
    inside = (rows < R)[:, None] & (rows < R)[None, :]
    left = tl.load(S + at, mask=inside, other=0.0)
    one = (i[:, None] == i[None, :]).to(left.dtype)
    inverse = one
    good = tl.load(works + matrix)
    tl.debug_barrier()  # all of the block has been read, which is overwritten column by column
    # Column by column, and at once what turns it into the identity: its inverse.
    for k in range(0, tl.minimum(BLOCK, R - start)):
        here = i == k
        column = tl.sum(tl.where(here[None, :], left, 0.0), axis=1)
        pivot = tl.sum(tl.where(here, column, 0.0), axis=0)
        good = good & (pivot > 0).to(tl.int32)
        pivot = tl.maximum(pivot, floor)
        root = 1.0 / tl.sqrt(pivot)
        column = tl.where(here, pivot, tl.where(i > k, column, 0.0)) * root
        line = tl.sum(tl.where(here[:, None], inverse, 0.0), axis=0) * root
        left -= column[:, None] * column[None, :]
        under = tl.where(i > k, column, 0.0)
        inverse = tl.where(here[:, None], line[None, :], inverse - under[:, None] * line[None, :])
        # With the zeros above the diagonal.
        tl.store(S + (matrix * R * R + rows * R + (start + k)), column, mask=rows < R)
    tl.store(T + at, inverse, mask=inside)
    tl.store(works + matrix, good)


def inverse_cholesky(S: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """L^-1 of S = L L^T (n, r, r), and whether there is such an L (n), 1 or 0; ``S`` becomes L.

    By halves: of the four blocks of S the one above gives L11 and its inverse, hence L21 = A21 L11^-T, and what is
    left of the one below, A22 - L21 L21^T, gives the rest. Only blocks on the diagonal are decomposed number by
    number, all matrices at once: what takes time there is how many columns come one after the other.
    """
    T = torch.zeros_like(S)
    works = torch.ones(len(S), dtype=torch.int32, device=S.device)
    _halve(S, T, works, floor, 0, S.shape[-1])
    S.tril_()
    return T, works


def _halve(S: Tensor, T: Tensor, works: Tensor, floor: float, start: int, stop: int) -> None:
    block = table.blocked_cholesky_blocks()
    blocks = math.ceil((stop - start) / block.rows)
    if blocks == 1:
        decompose[(len(S),)](S, T, works, floor, start, S.shape[-1], BLOCK=block.rows, **table.launch(block))
        return
    middle = start + math.ceil(blocks / 2) * block.rows
    above, below = slice(start, middle), slice(middle, stop)
    _halve(S, T, works, floor, start, middle)
    L = T[:, below, above]  # whose own place has what it is made of
    torch.bmm(S[:, below, above], T[:, above, above].mT, out=L)
    S[:, below, above] = L
    S[:, below, below].baddbmm_(L, L.mT, alpha=-1.0)
    _halve(S, T, works, floor, middle, stop)
    L.baddbmm_(T[:, below, below], torch.bmm(L, T[:, above, above]), beta=0.0, alpha=-1.0)
