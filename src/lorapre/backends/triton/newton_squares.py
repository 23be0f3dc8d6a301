"""The small algebra of the paper's regression: Gram matrices, their inverses, the left factors' next step.

Of each moment a matrix has two Gram matrices, of its right factor (side 0, A A^T) and of its left one (side 1, B^T B),
in float64 as in `lorapre.factors.newton_step`. They are formed by float64 tensor cores, and inverted in their place,
by blocks, so that all but the blocks on the diagonal are products.

``squares`` is (n, 2, R, R), float64, of one moment or of two of one rank behind each other; ``scales`` (2, n, 3),
float64: of each moment and matrix the size of the two inverses, which are divided by it, and the gauge.
"""

# Triton's decorators and types are untyped where they are not missing (other platforms than Linux).
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from lorapre.backends.triton import layout
from lorapre.backends.triton.elements import (
    ON,
    RIGHT,
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

#: What float64 rounds away of a Gram matrix, a rank at a time, and the smallest size and mean square of a row that
#: relative damping tells from zero; see `lorapre.factors`.
_ROUNDING = tl.constexpr(4 * 2.0**-52)
_LEAST_SIZE = tl.constexpr(1e-60)
_VANISHING = tl.constexpr(1e-20)


@triton.jit
def right_offset(matrices, matrix, RM: tl.constexpr):
    """Columns of the matrices before this one."""
    return field(matrices, matrix, RIGHT) // RM


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
def in_float64(x, dtype: tl.constexpr):
    wide = x
    if dtype != tl.float32:
        # A sum over one is what the compiler does not look through: for a product of numbers that were loaded as 16
        # bits it would choose a layout that float64 has not, and fail.
        wide = tl.sum(x.to(tl.float32)[None, :, :], axis=0)
    return wide.to(tl.float64)


@triton.jit
def gram(
    matrices,
    squares,
    n,
    S_TYPE: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """One block of one Gram matrix, and its mirror image, a program."""
    BLOCKS: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    PAIRS: tl.constexpr = BLOCKS * (BLOCKS + 1) // 2
    pid = tl.program_id(0)
    pair = pid % PAIRS
    above = 0
    for block in range(1, BLOCKS):
        above += (pair >= block * (block + 1) // 2).to(tl.int32)
    beside = pair - above * (above + 1) // 2
    rest = pid // PAIRS
    side = rest % 2
    local = (rest // 2) % MOMENTS
    moment = FIRST + local
    matrix = (rest // (2 * MOMENTS)).to(tl.int64)
    i = above * BLOCK_R + tl.arange(0, BLOCK_R)
    j = beside * BLOCK_R + tl.arange(0, BLOCK_R)
    base = factor_of(matrices, matrix, moment, side, S_TYPE)
    total = tl.zeros((BLOCK_R, BLOCK_R), tl.float64)
    if side == 0:
        length = size_of(matrices, matrix, Q)
        for start in range(0, length, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = (at < length)[None, :]
            x = tl.load(base + (i[:, None] * length + at[None, :]), mask=inside & (i < R)[:, None], other=0.0)
            y = tl.load(base + (j[:, None] * length + at[None, :]), mask=inside & (j < R)[:, None], other=0.0)
            total = tl.dot(in_float64(x, S_TYPE), tl.trans(in_float64(y, S_TYPE)), total, out_dtype=tl.float64)
    else:
        length = size_of(matrices, matrix, P)
        for start in range(0, length, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = (at < length)[:, None]
            x = tl.load(base + (at[:, None] * R + i[None, :]), mask=inside & (i < R)[None, :], other=0.0)
            y = tl.load(base + (at[:, None] * R + j[None, :]), mask=inside & (j < R)[None, :], other=0.0)
            total = tl.dot(tl.trans(in_float64(x, S_TYPE)), in_float64(y, S_TYPE), total, out_dtype=tl.float64)
    out = squares + ((local * n + matrix) * 2 + side) * R * R
    inside = (i < R)[:, None] & (j < R)[None, :]
    tl.store(out + i[:, None] * R + j[None, :], total, mask=inside)
    if above != beside:
        tl.store(out + i[:, None] + j[None, :] * R, total, mask=inside)


@triton.jit
def overlap(squares, out, R: tl.constexpr, BLOCK: tl.constexpr):
    """||B A||^2 of each matrix, the sum over the products of its two Gram matrices' elements."""
    matrix = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    base = squares + matrix * 2 * R * R
    for start in range(0, R * R, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < R * R
        total += tl.load(base + at, mask=inside, other=0.0) * tl.load(base + R * R + at, mask=inside, other=0.0)
    tl.store(out + matrix, tl.sum(total, axis=0).to(tl.float32))


@triton.jit
def inverse_factor(S, shift, BLOCK: tl.constexpr):
    """The inverse of S's Cholesky factor, lower triangular. No pivot is below S's least eigenvalue, nor ``shift``."""
    i = tl.arange(0, BLOCK)
    inverse = tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(tl.float64)
    for k in range(BLOCK):
        at = i == k
        column = tl.sum(tl.where(at[None, :], S, 0.0), axis=1)
        root = 1.0 / tl.sqrt(tl.maximum(tl.sum(tl.where(at, column, 0.0), axis=0), shift))
        column = tl.where(i >= k, column * root, 0.0)
        line = tl.sum(tl.where(at[:, None], inverse, 0.0), axis=0) * root
        S -= column[:, None] * column[None, :]
        below = tl.where(i > k, column, 0.0)
        inverse = tl.where(at[:, None], line[None, :], inverse - below[:, None] * line[None, :])
    return inverse


@triton.jit
def square_tile(base, rows, cols, mask, R: tl.constexpr):
    return tl.load(
        base + (rows[:, None] * R + cols[None, :]), mask=(rows < R)[:, None] & (cols < R)[None, :] & mask, other=0.0
    )


@triton.jit
def put_square(base, rows, cols, mask, values, R: tl.constexpr):
    """Stores once every warp has read what this overwrites, and before any reads it again."""
    tl.debug_barrier()
    tl.store(base + (rows[:, None] * R + cols[None, :]), values, mask=(rows < R)[:, None] & (cols < R)[None, :] & mask)
    tl.debug_barrier()


@triton.jit
def invert(
    squares,
    scales,
    parts,
    starts,
    n,
    damping,
    rate_m,
    rate_v,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
    FIRST: tl.constexpr,
    MOMENTS: tl.constexpr,
    FIRST_SIDE: tl.constexpr,
    SIDES: tl.constexpr,
    RELATIVE: tl.constexpr,
):
    """(gram + shift I)^-1 in the place of a Gram matrix, a program each, with the shift of `factors.damped_inverse`.

    By Cholesky's decomposition S = L L^T in blocks, of which the diagonal ones are kept as inverses; then T = L^-1 and
    T^T T, each in the place of the one before. Gauss's and Jordan's elimination would take the same products, but loses
    three more digits at a condition of 1e7. ``parts`` are the squares of the left target by tiles of rows.
    """
    pid = tl.program_id(0)
    side = FIRST_SIDE + pid % SIDES
    local = (pid // SIDES) % MOMENTS
    moment = FIRST + local
    matrix = (pid // (SIDES * MOMENTS)).to(tl.int64)
    base = squares + ((local * n + matrix) * 2 + side) * R * R
    every = tl.arange(0, WIDE)
    mean = tl.sum(tl.load(base + every * (R + 1), mask=every < R, other=0.0), axis=0) / R
    size = mean * 0.0 + 1.0
    row = scales + (moment * n + matrix) * 3
    if RELATIVE:
        size = mean
        if side == 1:
            coming = tl.zeros((128,), tl.float64)
            last = tl.load(starts + matrix + 1)
            for start in range(tl.load(starts + matrix), last, 128):
                at = start + tl.arange(0, 128)
                coming += tl.load(parts + (at.to(tl.int64) * MOMENTS + local), mask=at < last, other=0.0)
            rate = tl.where(moment == 0, rate_m, rate_v).to(tl.float64)
            size = tl.maximum(size, tl.sum(coming, axis=0) * rate * rate / R)
        else:
            gauge = tl.where((mean < _VANISHING) & (mean > 0), 1.0 / tl.sqrt(tl.where(mean > 0, mean, 1.0)), 1.0)
            tl.store(row + 2, gauge)
        size = tl.maximum(size, _LEAST_SIZE)
    elif side == 0:
        tl.store(row + 2, size)
    tl.store(row + side, size)
    shift = tl.maximum(_ROUNDING * R * mean, damping * size)

    within = tl.arange(0, BLOCK)
    diagonal = within[:, None] == within[None, :]
    floor = tl.minimum(shift, 1.0)
    for k in range(0, R, BLOCK):
        kk = k + within
        S = square_tile(base, kk, kk, True, R)
        S += tl.where(diagonal, tl.where(kk < R, shift, 1.0)[:, None], 0.0)
        M = inverse_factor(S, floor, BLOCK)
        put_square(base, kk, kk, True, M, R)
        for i in range(k + BLOCK, R, BLOCK):
            rows = i + within
            C = square_tile(base, rows, kk, True, R)
            put_square(base, rows, kk, True, tl.dot(C, tl.trans(M), out_dtype=tl.float64), R)
        for i in range(k + BLOCK, R, BLOCK):
            rows = i + within
            C = square_tile(base, rows, kk, True, R)
            for j in range(k + BLOCK, i + BLOCK, COLS):
                cols = j + tl.arange(0, COLS)
                lower = (cols < i + BLOCK)[None, :]
                other = square_tile(base, cols, kk, tl.trans(lower), R)
                old = square_tile(base, rows, cols, lower, R)
                put_square(base, rows, cols, lower, tl.dot(-C, tl.trans(other), old, out_dtype=tl.float64), R)
    for i in range(BLOCK, R, BLOCK):
        rows = i + within
        M = square_tile(base, rows, rows, True, R)
        for j in range(0, i, COLS):  # what these columns take the place of, those behind them do not read
            cols = j + tl.arange(0, COLS)
            total = tl.zeros((BLOCK, COLS), tl.float64)
            for k in range(j, i, BLOCK):
                kk = k + within
                C = square_tile(base, rows, kk, True, R)
                done = square_tile(base, kk, cols, (cols < k + BLOCK)[None, :], R)
                total = tl.dot(C, done, total, out_dtype=tl.float64)
            put_square(base, rows, cols, (cols < i)[None, :], tl.dot(-M, total, out_dtype=tl.float64), R)
    for i in range(0, R, BLOCK):
        rows = i + within
        for j in range(0, i + BLOCK, COLS):
            cols = j + tl.arange(0, COLS)
            total = tl.zeros((BLOCK, COLS), tl.float64)
            for k in range(i, R, BLOCK):
                kk = k + within
                T = square_tile(base, kk, rows, True, R)
                beside = square_tile(base, kk, cols, (cols < i + BLOCK)[None, :], R)
                total = tl.dot(tl.trans(T), beside, total, out_dtype=tl.float64)
            put_square(base, rows, cols, (cols < i + BLOCK)[None, :], total, R)
            put_square(base, cols, rows, (cols < i)[:, None], tl.trans(total), R)


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
        place = Z + local * right_shift + right_offset(matrices, matrix, RM) * R
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
