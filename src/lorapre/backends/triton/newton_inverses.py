"""Gram matrices of the paper's regression, and their inverses.

Of each moment a matrix has two, of its right factor (side 0, A A^T) and of its left one (side 1, B^T B), in float64 as
in `lorapre.factors.newton_step`. They are formed by float64 tensor cores, and inverted in their place, by blocks, so
that all but the blocks on the diagonal are products.

``squares`` is (n, 2, R, R), float64, of one moment or of two of one rank behind each other; ``scales`` (2, n, 3),
float64: of each moment and matrix the size of the two inverses, which are divided by it, and the gauge.
"""

# Triton's decorators and types are untyped where they are not missing (other platforms than Linux).
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from lorapre.backends.triton.elements import P, Q, size_of
from lorapre.backends.triton.newton_squares import factor_of

#: What float64 rounds away of a Gram matrix, a rank at a time, and the smallest size and mean square of a row that
#: relative damping tells from zero; see `lorapre.factors`.
_ROUNDING = tl.constexpr(4 * 2.0**-52)
_LEAST_SIZE = tl.constexpr(1e-60)
_VANISHING = tl.constexpr(1e-20)


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
