"""Factors out of their own tensors into one batch, and back: a launch each. Imports triton.

They are of one shape and contiguous, those of `lorapre.backends.triton.layout`'s table from matrix ``first`` on.
"""

# Triton's decorators and types are untyped where they are not missing (other platforms than Linux).
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from lorapre.backends.triton.elements import ON, WIDTH, base_of, nearest


@triton.jit
def tile_in(height, width, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Matrix, rows and columns of this program, of those that cover matrices (height, width)."""
    across = (width + BLOCK_Q - 1) // BLOCK_Q
    each = (height + BLOCK_P - 1) // BLOCK_P * across
    tile = tl.program_id(0) % each
    row = tile // across * BLOCK_P + tl.arange(0, BLOCK_P)
    column = tile % across * BLOCK_Q + tl.arange(0, BLOCK_Q)
    return (tl.program_id(0) // each).to(tl.int64), row, column


@triton.jit(do_not_specialize=["first"])
def gather(
    matrices,
    batch,
    first,
    rows,
    columns,
    height,
    width,
    COLUMN: tl.constexpr,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """``batch`` (n, height, width), float32: the matrices (rows, columns) at the addresses in COLUMN, zeros behind."""
    number, row, column = tile_in(height, width, BLOCK_P, BLOCK_Q)
    base = base_of(matrices, first + number, COLUMN, TYPE, ALIGNED)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    found = tl.load(base + (row[:, None] * columns + column[None, :]), mask=inside, other=0.0)
    at = batch + number * height * width + (row[:, None] * width + column[None, :])
    tl.store(at, found.to(tl.float32), mask=(row < height)[:, None] & (column < width)[None, :])


@triton.jit(do_not_specialize=["first"])
def scatter(
    matrices,
    coefficients,
    batch,
    first,
    rows,
    columns,
    height,
    width,
    COLUMN: tl.constexpr,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """The matrices (rows, columns) from ``batch`` as `gather` leaves it, where the step is enabled."""
    number, row, column = tile_in(height, width, BLOCK_P, BLOCK_Q)
    live = rows * (tl.load(coefficients + (first + number) * WIDTH + ON) != 0).to(tl.int32)
    inside = (row < live)[:, None] & (column < columns)[None, :]
    new = tl.load(batch + number * height * width + (row[:, None] * width + column[None, :]), mask=inside, other=0.0)
    base = base_of(matrices, first + number, COLUMN, TYPE, ALIGNED)
    tl.store(base + (row[:, None] * columns + column[None, :]), nearest(new, TYPE), mask=inside)
