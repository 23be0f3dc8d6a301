"""What follows the first pass at high ranks: batched products by torch, few kernels. Imports triton.

Beyond `lorapre.backends.triton.table.KERNEL_RANK` a program's registers hold no (r, r) matrix. Factors are kept as rows
here, (r, p) and (r, q); what is (r, r) is done for all matrices at once, what is larger for a chunk of one shape at a
time, and the momentum X A is formed for a chunk, in scratch. Sides are filled up with zeros to the next
`lorapre.backends.triton.layout.lines`, since those that are no multiples of 16 bytes keep the tensor cores from all of
a product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorapre import spectral
from lorapre.backends.triton import copies, elements, layout, row_bases, second_pass, table
from lorapre.backends.triton.layout import lines
from lorapre.backends.triton.step import TYPES
from lorapre.routing import MatrixView

if TYPE_CHECKING:
    from lorapre.backends.triton.adamw import AdamStep


@dataclass(frozen=True)
class Chunk:
    """Some matrices of a bucket, numbers ``at`` of the step; p and q are `lines` of theirs.

    Attributes:
        view: their shape.
        at: which matrices of the step.
        rows: of the step's matrices, which are theirs.
        U: (n, r, p): K, and then the left basis, as rows; zeros in the last columns.
        X: (n, p, r): the left factor of the momentum; zeros in the last rows.
        L: (n, r, q), in the place of X where there is room for it; none in a step that does not sweep.
    """

    view: MatrixView
    at: slice
    rows: slice
    U: Tensor
    X: Tensor
    L: Tensor | None

    @property
    def n(self) -> int:
        return len(self.U)

    def sides(self, column: int) -> tuple[int, int, int, int]:
        """Rows and columns of a factor whose address is in ``column`` of the layout's table, and those in a batch."""
        p, q, r = self.view.p, self.view.q, self.view.rank
        return (p, r, lines(p), r) if column == layout.B else (r, q, r, lines(q))


def proceed(step: AdamStep) -> None:
    """Step all matrices of ``step``, whose ``U`` holds G A^T."""
    chunks = list(_chunks(step))
    with row_bases.precise("ieee"):
        step.left_factors()
        if step.spectral:
            _sketch(step, chunks)
        if step.sweeps:
            _sweep(step, chunks)
        else:
            for chunk in chunks:
                _update(step, chunk)
        step.advance_v_row()


def _chunks(step: AdamStep) -> Iterator[Chunk]:
    first = above = left = 0
    for bucket in step.buckets:
        view = bucket.view
        p, q, r = lines(view.p), lines(view.q), view.rank
        matrices, size = len(bucket.params) * view.batch, table.high_rank_batch(view)
        for start in range(0, matrices, size):
            n = min(size, matrices - start)
            U, X = (place[left : left + n * r * p] for place in (step.U, step.X))
            L = None
            if step.sweeps:
                L = (X[: n * r * q] if q <= p else step.U.new_empty(n * r * q)).view(n, r, q)
            at, rows = slice(first, first + n), slice(above, above + n * view.p)
            yield Chunk(view, at, rows, U.view(n, r, p), X.view(n, p, r), L)
            first, above, left = at.stop, rows.stop, left + n * r * p


def _sketch(step: AdamStep, chunks: Sequence[Chunk]) -> None:
    """What each update is divided by, from the sketch of all of it."""
    outside = step.coefficients[:, elements.OUTSIDE.value, None, None]
    rights = step.rights.view(step.n, step.r, spectral.COLUMNS).div_(outside)
    sketches = step.sketches.view(-1, spectral.COLUMNS)
    with row_bases.precise(table.PRECISION["project"]):
        for chunk in chunks:
            sketch = sketches[chunk.rows].view(chunk.n, chunk.view.p, spectral.COLUMNS)
            sketch.baddbmm_(chunk.X[:, : chunk.view.p], rights[chunk.at])
    step.divide()


def _sweep(step: AdamStep, chunks: Sequence[Chunk]) -> None:
    """Move the bases: M' = decay B A + gain G becomes U^T P U M', with the rows of L = U M' as the next basis.

    Hence m_B = U^T P S for L = S A.
    """
    W, _ = row_bases.conditioned([chunk.U for chunk in chunks])
    P = row_bases.projector(W)
    del W
    C, sizes = _carried(step, chunks)
    stacks = [_next_rows(step, chunk, C, sizes) for chunk in chunks]
    del C
    E, S = row_bases.last_pass(*row_bases.conditioned(stacks))
    PS = torch.bmm(P, S).mul_(sizes)
    del P, S
    for chunk, L in zip(chunks, stacks, strict=True):
        _scatter(step, chunk, torch.baddbmm(L, E[chunk.at], L), layout.A)
    del E, stacks
    with row_bases.precise(table.PRECISION["factors"]):
        for chunk in chunks:
            _scatter(step, chunk, torch.bmm(chunk.U.mT, PS[chunk.at]), layout.B)


def _carried(step: AdamStep, chunks: Sequence[Chunk]) -> tuple[Tensor, Tensor]:
    """C (n, r, r) such that L = (C A + gain U G) / size, and the size of a row at most, (n, 1, 1).

    The diagonal of C holds a share of the old basis, in case L's own rows leave directions open.
    """
    C = step.U.new_empty((step.n, step.r, step.r))
    with row_bases.precise(table.PRECISION["factors"]):
        for chunk in chunks:
            torch.bmm(chunk.U, _gather(step, chunk, layout.B), out=C[chunk.at])
    C.mul_(step.decay)
    sizes = torch.linalg.vector_norm(C, dim=(-2, -1)).square_().add_(step.squares, alpha=step.gain**2)
    sizes.div_(step.r).sqrt_()
    sizes = torch.where(sizes > 0, sizes, 1.0)
    C.diagonal(dim1=-2, dim2=-1).add_(sizes[:, None], alpha=second_pass.CLOSING.value)
    return C, sizes[:, None, None]


def _update(step: AdamStep, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """The weights and v_col, or v in full, from X; returns m_A (n, r, q) and, in a step that sweeps, G (n, p, q)."""
    A = _gather(step, chunk, layout.A)
    with row_bases.precise(table.PRECISION["momentum"]):
        M = torch.bmm(chunk.X, A)
    step.update_given(M, chunk.at)
    return A, M


def _next_rows(step: AdamStep, chunk: Chunk, C: Tensor, sizes: Tensor) -> Tensor:
    """The weights, and L = (C A + gain U G) / size."""
    A, G = _update(step, chunk)
    assert chunk.L is not None
    with row_bases.precise(table.PRECISION["left"]):
        torch.bmm(C[chunk.at], A, out=chunk.L)
        chunk.L.baddbmm_(chunk.U, G, alpha=-step.gain if step.maximize else step.gain)
    return chunk.L.div_(sizes[chunk.at])


def _gather(step: AdamStep, chunk: Chunk, column: int) -> Tensor:
    """The factors whose addresses are in ``column`` of the layout's table, as float32 (n, height, width)."""
    batch = step.U.new_empty((chunk.n, *chunk.sides(column)[2:]))
    _copy(step, chunk, column, copies.gather, batch)
    return batch


def _scatter(step: AdamStep, chunk: Chunk, batch: Tensor, column: int) -> None:
    """The inverse of `_gather`, where the step is enabled."""
    _copy(step, chunk, column, copies.scatter, step.coefficients, batch)


def _copy(step: AdamStep, chunk: Chunk, column: int, kernel: Any, *tensors: Tensor) -> None:
    rows, columns, height, width = chunk.sides(column)
    block = table.COPY
    kernel[(chunk.n * math.ceil(height / block.rows) * math.ceil(width / block.cols),)](
        step.matrices.table,
        *tensors,
        chunk.at.start,
        rows,
        columns,
        height,
        width,
        COLUMN=column,
        TYPE=TYPES[step.S_dtype],
        ALIGNED=_aligned(step, chunk),
        BLOCK_P=block.rows,
        BLOCK_Q=block.cols,
        **table.launch(block),
    )


def _aligned(step: AdamStep, chunk: Chunk) -> bool:
    """Whether the state begins at multiples of 16 bytes: it does where that lets the kernels read G so, too."""
    _, order, _ = step.matrices.kinds[chunk.at.start]
    return order in (layout.ROWS_ALIGNED, layout.COLUMNS_ALIGNED)
