"""What the inverses of the paper's regression are multiplied by: the left target, and the factors' next step.

``squares`` and ``scales`` are those of `lorapre.backends.triton.newton_inverses`.
"""

# Triton's decorators and types are untyped where they are not missing (other platforms than Linux).
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from lorapre.backends.triton import layout
from lorapre.backends.triton.elements import (
    COLS,
    ON,
    ROWS,
    WIDTH,
    A,
    B,
    P,
    Q,
    base_of,
    field,
    nearest,
    size_of,
)

#: The second moment's factors, where others have row and column means.
V_B = tl.constexpr(layout.V_ROW)
V_A = tl.constexpr(layout.V_COL)


@triton.jit
def root_of(scales, matrix, n, moment, side):
    """The square root of the size of an inverse, float32."""
    return tl.sqrt(tl.load(scales + (moment * n + matrix) * 3 + side)).to(tl.float32)


@triton.jit
def gauge_of(scales, matrix, n, moment):
    """By which the left factor is divided and the right one multiplied, float32."""
    return tl.load(scales + (moment * n + matrix) * 3 + 2).to(tl.float32)


@triton.jit
def inverse_tile(squares, scales, matrix, n, moment, side, rows, cols, R: tl.constexpr):
    """Rows x cols of an inverse times its size, float32."""
    size = tl.load(scales + (moment * n + matrix) * 3 + side)
    tile = tl.load(
        squares + (matrix * 2 + side) * R * R + (rows[:, None] * R + cols[None, :]),
        mask=(rows < R)[:, None] & (cols < R)[None, :],
        other=0.0,
    )
    return (size * tile).to(tl.float32)


@triton.jit
def factor_of(matrices, matrix, moment, side, dtype: tl.constexpr):
    """Where m_A or v_A (side 0), m_B or v_B (side 1) begins."""
    column = tl.where(moment == 0, tl.where(side == 0, A, B), tl.where(side == 0, V_A, V_B))
    return base_of(matrices, matrix, column, dtype)


@triton.jit
def left_target(
    source,
    squares,
    scales,
    matrix,
    n,
    moment,
    rows,
    p,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """H A^T (A A^T + delta I)^-1 in these rows, of all ranks, from H A^T in ``source``."""
    ranks = tl.arange(0, BLOCK_R)
    root = root_of(scales, matrix, n, moment, 0)
    total = tl.zeros((BLOCK, BLOCK_R), tl.float32)
    for first in range(0, BLOCK_R, INNER):
        inner = first + tl.arange(0, INNER)
        y = tl.load(
            source + (rows[:, None] * R + inner[None, :]), mask=(rows < p)[:, None] & (inner < R)[None, :], other=0.0
        )
        inverse = inverse_tile(squares, scales, matrix, n, moment, 0, inner, ranks, R)
        total = tl.dot(y / root, inverse, total, input_precision=PRECISION)
    return total / root


@triton.jit
def targets(
    matrices,
    items,
    starts,
    Y,
    offset,
    squares,
    scales,
    parts,
    n,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    FIRST: tl.constexpr,
    MOMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The left target in the place of H A^T, and in ``parts`` its squares."""
    pid = tl.program_id(0)
    local = (pid % MOMENTS).to(tl.int64)
    item = pid // MOMENTS
    matrix = tl.load(items + item * 2).to(tl.int64)
    tile = tl.load(items + item * 2 + 1)
    p = size_of(matrices, matrix, P)
    rows = tile * BLOCK + tl.arange(0, BLOCK)
    ranks = tl.arange(0, BLOCK_R)
    base = Y + local * offset + field(matrices, matrix, ROWS) * R
    mine = squares + local * n * 2 * R * R
    target = left_target(
        base, mine, scales, matrix, n, FIRST + local, rows, p, R, BLOCK_R, BLOCK, INNER, PRECISION
    )  # fmt: skip
    tl.debug_barrier()
    tl.store(base + (rows[:, None] * R + ranks[None, :]), target, mask=(rows < p)[:, None] & (ranks < R)[None, :])
    wide = target.to(tl.float64)
    total = tl.sum(tl.sum(wide * wide, axis=1), axis=0)
    tl.store(parts + (tl.load(starts + matrix) + tile).to(tl.int64) * MOMENTS + local, total)


@triton.jit
def next_right(
    base,
    squares,
    scales,
    matrix,
    n,
    moment,
    z,
    cols,
    q,
    rate,
    on,
    S_TYPE: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Equation (2) in these columns from ``z``, B^T H, of all ranks: OUT rows of the factor at once."""
    ranks = tl.arange(0, BLOCK_R)
    root = root_of(scales, matrix, n, moment, 1)
    gauge = gauge_of(scales, matrix, n, moment)
    scaled = z / root
    for first in range(0, BLOCK_R, OUT):
        out = first + tl.arange(0, OUT)
        there = out[:, None] * q + cols[None, :]
        inverse = inverse_tile(squares, scales, matrix, n, moment, 1, out, ranks, R)
        target = tl.dot(inverse, scaled, input_precision=PRECISION) / root
        old = tl.load(base + there, mask=(cols < q)[None, :] & (out < R)[:, None], other=0.0).to(tl.float32)
        new = nearest((old + rate * (target - old)) * gauge, S_TYPE)
        tl.store(base + there, new, mask=(cols < q)[None, :] & (out < R * on)[:, None])


@triton.jit
def finish(
    matrices,
    right_items,
    left_items,
    right_programs,
    coefficients,
    Y,
    Z,
    left_offset,
    right_shift,
    squares,
    scales,
    n,
    rate_m,
    rate_v,
    S_TYPE: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    RM: tl.constexpr,
    FIRST: tl.constexpr,
    MOMENTS: tl.constexpr,
    DONE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The left factors' next step from H A^T in ``Y``, or from the left target if DONE, equation (1); and the right
    ones', (2), from B^T H in ``Z``, of which there are no programs where pass 2 took it."""
    pid = tl.program_id(0)
    local = (pid % MOMENTS).to(tl.int64)
    moment = FIRST + local
    pid = pid // MOMENTS
    left = pid >= right_programs
    item = tl.where(left, left_items + (pid - right_programs) * 2, right_items + pid * 2)
    matrix = tl.load(item).to(tl.int64)
    at = tl.load(item + 1) * BLOCK + tl.arange(0, BLOCK)
    ranks = tl.arange(0, BLOCK_R)
    on = (tl.load(coefficients + matrix * WIDTH + ON) != 0).to(tl.int32)
    rate = tl.where(moment == 0, rate_m, rate_v)
    gauge = gauge_of(scales, matrix, n, moment)
    mine = squares + local * n * 2 * R * R
    if left:
        p = size_of(matrices, matrix, P)
        B_base = factor_of(matrices, matrix, moment, 1, S_TYPE)
        rows_there = at[:, None] * R + ranks[None, :]
        ranked = (ranks < R)[None, :]
        source = Y + local * left_offset + field(matrices, matrix, ROWS) * R
        if DONE:
            row_target = tl.load(source + rows_there, mask=(at < p)[:, None] & ranked, other=0.0)
        else:
            row_target = left_target(
                source, mine, scales, matrix, n, moment, at, p, R, BLOCK_R, BLOCK, INNER, PRECISION
            )  # fmt: skip
        old_rows = tl.load(B_base + rows_there, mask=(at < p)[:, None] & ranked, other=0.0).to(tl.float32)
        new_rows = nearest((old_rows + rate * (row_target - old_rows)) / gauge, S_TYPE)
        tl.store(B_base + rows_there, new_rows, mask=(at < p * on)[:, None] & ranked)
    else:
        q = size_of(matrices, matrix, Q)
        A_base = factor_of(matrices, matrix, moment, 0, S_TYPE)
        cols_there = ranks[:, None] * q + at[None, :]
        inside = (ranks < R)[:, None] & (at < q)[None, :]
        place = Z + local * right_shift + field(matrices, matrix, COLS) * R
        root = root_of(scales, matrix, n, moment, 1)
        total = tl.zeros((BLOCK_R, BLOCK), tl.float32)
        for first in range(0, BLOCK_R, INNER):
            inner = first + tl.arange(0, INNER)
            z = tl.load(
                place + (inner[:, None] * q + at[None, :]), mask=(inner < R)[:, None] & (at < q)[None, :], other=0.0
            )
            inverse = inverse_tile(mine, scales, matrix, n, moment, 1, ranks, inner, R)
            total = tl.dot(inverse, z / root, total, input_precision=PRECISION)
        old_cols = tl.load(A_base + cols_there, mask=inside, other=0.0).to(tl.float32)
        new_cols = nearest((old_cols + rate * (total / root - old_cols)) * gauge, S_TYPE)
        tl.store(A_base + cols_there, new_cols, mask=(ranks < R * on)[:, None] & (at < q)[None, :])
