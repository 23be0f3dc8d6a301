"""The two passes over the gradients of the paper's regression, of matrices of any shapes. One matrix is (p, q).

Both moments are factored, m_B m_A of rank RM and (v_B v_A)^2 of rank RV, and follow G and |G| by equations (1) and (2)
of `lorapre.reference`. Every right-hand side reads the factors of step t - 1, so that two reads of G serve all: one by
rows, for H A^T, and one by columns, for B^T H, the update and W. What they are multiplied by, the inverses of
`lorapre.backends.triton.newton_inverses`, depends on the old factors alone and is there before.

The plan, per number of G in float32: 16 bytes (G twice, W read and written) and 12 r operations, four projections
and two reconstructions. On an H100 memory bounds below r = 100, tf32 above. A program holds two accumulators, one a
moment, of tile x rank: 64 x 128 twice are 64 registers a thread of 8 warps, all that pass 2 has room for; pass 1 takes
128 x 128 twice. Higher ranks are cut into blocks, of which
neighbours in the grid read the same G. A factor's tile is read by every program of its matrix, from the L2 cache:
2 * 4 * rank / tile bytes per number of G, hence tiles of 64 and more along the side that a program keeps.
"""

# Triton's decorators and types are untyped where they are not missing (other platforms than Linux).
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from lorapre.backends.triton.elements import (
    COLS,
    COLUMNS_ALIGNED,
    CROSS,
    DECAY,
    G_COL,
    G_ROW,
    KEEP,
    ON,
    OUTSIDE,
    RATE,
    ROWS,
    ROWS_ALIGNED,
    TINY,
    V_SCALE,
    W_COL,
    W_ROW,
    WIDTH,
    A,
    B,
    G,
    P,
    Q,
    W,
    base_of,
    field,
    rounded,
    size_of,
    sum_of_parts,
    tile_of,
    whole,
)
from lorapre.backends.triton.newton_squares import V_A, V_B, next_right


@triton.jit
def by_factor(g, wide, factor, total, PRECISION: tl.constexpr):
    """total + g factor. ``wide`` is g in float32; "bf16" takes g as it is and rounds ``factor``, to two numbers with
    "bf16x2", whose sum has 16 bits."""
    if PRECISION == "bf16" or PRECISION == "bf16x2":
        high = factor.to(tl.bfloat16)
        total = tl.dot(g, high, total)
        if PRECISION == "bf16x2":
            total = tl.dot(g, (factor - high.to(tl.float32)).to(tl.bfloat16), total)
    else:
        total = tl.dot(wide, factor, total, input_precision=PRECISION)
    return total


@triton.jit
def of_factor(factor, g, wide, total, PRECISION: tl.constexpr):
    """total + factor g, as `by_factor`."""
    if PRECISION == "bf16" or PRECISION == "bf16x2":
        high = factor.to(tl.bfloat16)
        total = tl.dot(high, g, total)
        if PRECISION == "bf16x2":
            total = tl.dot((factor - high.to(tl.float32)).to(tl.bfloat16), g, total)
    else:
        total = tl.dot(factor, wide, total, input_precision=PRECISION)
    return total


@triton.jit
def right_tile(base, ranks, cols, q, R: tl.constexpr):
    """ranks x cols of a right factor (R, q), float32; zeros beyond."""
    return tl.load(
        base + (ranks[:, None] * q + cols[None, :]), mask=(ranks < R)[:, None] & (cols < q)[None, :], other=0.0
    ).to(tl.float32)


@triton.jit
def left_tile(base, rows, ranks, p, R: tl.constexpr):
    """rows x ranks of a left factor (p, R), float32; zeros beyond."""
    return tl.load(
        base + (rows[:, None] * R + ranks[None, :]), mask=(rows < p)[:, None] & (ranks < R)[None, :], other=0.0
    ).to(tl.float32)


@triton.jit
def left_scratch(base, rows, ranks, p, R: tl.constexpr, values):
    tl.store(base + (rows[:, None] * R + ranks[None, :]), values, mask=(rows < p)[:, None] & (ranks < R)[None, :])


@triton.jit
def right_scratch(base, ranks, cols, q, R: tl.constexpr, values):
    tl.store(base + (ranks[:, None] * q + cols[None, :]), values, mask=(ranks < R)[:, None] & (cols < q)[None, :])


@triton.jit
def project(
    matrices,
    items,
    starts,
    coefficients,
    Y_m,
    Y_v,
    parts,
    G_TYPE: tl.constexpr,
    S_TYPE: tl.constexpr,
    RM: tl.constexpr,
    RV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    R_BLOCKS: tl.constexpr,
    NEGATE: tl.constexpr,
    SQUARES: tl.constexpr,
    ORDER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Pass 1 over G, a program a block of rows: G m_A^T to ``Y_m`` and |G| v_A^T to ``Y_v``; the block's sum of G^2."""
    ALIGNED: tl.constexpr = (ORDER == ROWS_ALIGNED) | (ORDER == COLUMNS_ALIGNED)
    pid = tl.program_id(0)
    item = pid // R_BLOCKS
    r_block = pid % R_BLOCKS
    matrix = tl.load(items + item * 2).to(tl.int64)
    tile = tl.load(items + item * 2 + 1)
    p = whole(size_of(matrices, matrix, P), ORDER, COLUMNS_ALIGNED)
    q = whole(size_of(matrices, matrix, Q), ORDER, ROWS_ALIGNED)
    row_stride = size_of(matrices, matrix, G_ROW)
    col_stride = size_of(matrices, matrix, G_COL)
    rows = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    ranks_m = r_block * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks_v = r_block * BLOCK_V + tl.arange(0, BLOCK_V)
    # Where the step is not enabled the gradients may be nan, and none is read.
    live = p * (tl.load(coefficients + matrix * WIDTH + ON) != 0).to(tl.int32)
    base = base_of(matrices, matrix, G, G_TYPE, ALIGNED)
    m_A = base_of(matrices, matrix, A, S_TYPE, ALIGNED)
    v_A = base_of(matrices, matrix, V_A, S_TYPE, ALIGNED)
    y_m = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
    y_v = tl.zeros((BLOCK_P, BLOCK_V), tl.float32)
    squares = tl.zeros((BLOCK_P,), tl.float32)
    for start in range(0, q, BLOCK_Q):
        cols = start + tl.arange(0, BLOCK_Q)
        g = tl.load(
            tile_of(base, rows, cols, row_stride, col_stride, ORDER),
            mask=(rows < live)[:, None] & (cols < q)[None, :],
            other=0.0,
        )
        a_m = right_tile(m_A, ranks_m, cols, q, RM)
        a_v = right_tile(v_A, ranks_v, cols, q, RV)
        wide = g.to(tl.float32)
        y_m = by_factor(g, wide, tl.trans(a_m), y_m, PRECISION)
        magnitude = tl.abs(wide)
        y_v = by_factor(magnitude.to(G_TYPE), magnitude, tl.trans(a_v), y_v, PRECISION)
        if SQUARES:
            squares += tl.sum(wide * wide, axis=1)
    if NEGATE:
        y_m = -y_m
    at = field(matrices, matrix, ROWS)
    left_scratch(Y_m + at * RM, rows, ranks_m, p, RM, y_m)
    left_scratch(Y_v + at * RV, rows, ranks_v, p, RV, y_v)
    if SQUARES:
        tl.store(parts + (tl.load(starts + matrix) + tile) * R_BLOCKS + r_block, tl.sum(squares, axis=0))


@triton.jit
def update(
    matrices,
    items,
    starts,
    coefficients,
    Y_m,
    Z_m,
    Z_v,
    squares_m,
    squares_v,
    scales,
    overlaps,
    parts,
    n,
    rate_m,
    rate_v,
    beta2,
    eps,
    limit,
    seed,
    W_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    S_TYPE: tl.constexpr,
    RM: tl.constexpr,
    RV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    OUT: tl.constexpr,
    INNER: tl.constexpr,
    R_BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    NEGATE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELATIVE: tl.constexpr,
    BOUNDED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROUNDS: tl.constexpr,
    W_ORDER: tl.constexpr,
    G_ORDER: tl.constexpr,
    PRECISION: tl.constexpr,
    MOMENT_PRECISION: tl.constexpr,
    SQUARE_PRECISION: tl.constexpr,
):
    """Pass 2 over G, a program a block of columns: W in place, equations (4) to (7), and the right factors' next step.

    Of the programs of one block, one for each rank block, the first updates W. RESIDUAL takes what P(G) weighs more or
    less than the rest from ``Y_m``, which then holds the left target.
    """
    ALIGNED: tl.constexpr = (G_ORDER == ROWS_ALIGNED) | (G_ORDER == COLUMNS_ALIGNED)
    pid = tl.program_id(0)
    item = pid // R_BLOCKS
    r_block = pid % R_BLOCKS
    matrix = tl.load(items + item * 2).to(tl.int64)
    tile = tl.load(items + item * 2 + 1)
    p = whole(whole(size_of(matrices, matrix, P), G_ORDER, COLUMNS_ALIGNED), W_ORDER, COLUMNS_ALIGNED)
    q = whole(whole(size_of(matrices, matrix, Q), G_ORDER, ROWS_ALIGNED), W_ORDER, ROWS_ALIGNED)
    W_row_stride = size_of(matrices, matrix, W_ROW)
    W_col_stride = size_of(matrices, matrix, W_COL)
    G_row_stride = size_of(matrices, matrix, G_ROW)
    G_col_stride = size_of(matrices, matrix, G_COL)
    cols = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    ranks_m = r_block * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks_v = r_block * BLOCK_V + tl.arange(0, BLOCK_V)
    row = coefficients + matrix * WIDTH
    on = (tl.load(row + ON) != 0).to(tl.int32)
    live = p * on
    keep = tl.load(row + KEEP)
    cross = tl.load(row + CROSS)
    outside = tl.load(row + OUTSIDE)
    v_scale = tl.load(row + V_SCALE)
    rate = tl.load(row + RATE)
    decay = tl.load(row + DECAY)
    W_base = base_of(matrices, matrix, W, W_TYPE, (W_ORDER == ROWS_ALIGNED) | (W_ORDER == COLUMNS_ALIGNED))
    G_base = base_of(matrices, matrix, G, G_TYPE, ALIGNED)
    m_B = base_of(matrices, matrix, B, S_TYPE, ALIGNED)
    m_A = base_of(matrices, matrix, A, S_TYPE, ALIGNED)
    v_B = base_of(matrices, matrix, V_B, S_TYPE, ALIGNED)
    v_A = base_of(matrices, matrix, V_A, S_TYPE, ALIGNED)
    L_base = Y_m + field(matrices, matrix, ROWS) * RM
    if RELATIVE:
        # The mean of v_hat, without forming it: ||v_B v_A||^2 is a sum over products of the two Gram matrices.
        squared = sum_of_parts(parts, tl.load(starts + matrix), tl.load(starts + matrix + 1), 0, PARTS)
        mean = (beta2 * tl.load(overlaps + matrix) + (1.0 - beta2) * squared) / (p.to(tl.float32) * q.to(tl.float32))
        eps = tl.maximum(eps * tl.sqrt(mean * v_scale), TINY)

    if R_BLOCKS == 1:  # the loop below stores, so that the compiler would read them again in every turn
        whole_m = right_tile(m_A, ranks_m, cols, q, RM)
        whole_v = right_tile(v_A, ranks_v, cols, q, RV)

    z_m = tl.zeros((BLOCK_M, BLOCK_Q), tl.float32)
    z_v = tl.zeros((BLOCK_V, BLOCK_Q), tl.float32)
    first_rows = tl.arange(0, BLOCK_P)
    # W is asked for one turn ahead, as in `kernels.update`.
    inside = (first_rows < live)[:, None] & (cols < q)[None, :]
    coming = tl.load(tile_of(W_base, first_rows, cols, W_row_stride, W_col_stride, W_ORDER), mask=inside, other=0.0)
    for start in range(0, p, BLOCK_P):
        rows = start + first_rows
        inside = (rows < live)[:, None] & (cols < q)[None, :]
        here = coming
        after = rows + BLOCK_P
        coming = tl.load(
            tile_of(W_base, after, cols, W_row_stride, W_col_stride, W_ORDER),
            mask=(after < live)[:, None] & (cols < q)[None, :],
            other=0.0,
        )
        g = tl.load(tile_of(G_base, rows, cols, G_row_stride, G_col_stride, G_ORDER), mask=inside, other=0.0)
        wide = g.to(tl.float32)
        magnitude = tl.abs(wide)
        b_m = left_tile(m_B, rows, ranks_m, p, RM)
        b_v = left_tile(v_B, rows, ranks_v, p, RV)
        # Negated, by which they come from registers: tensor cores read no float32 across its rows from shared memory,
        # and one copy there serves the momentum as well.
        z_m = of_factor(tl.trans(-b_m), g, wide, z_m, PRECISION)
        z_v = of_factor(tl.trans(-b_v), magnitude.to(G_TYPE), magnitude, z_v, PRECISION)
        if r_block == 0:
            W_addresses = tile_of(W_base, rows, cols, W_row_stride, W_col_stride, W_ORDER)
            if R_BLOCKS == 1:  # transposed, so that the factors are read as they lie
                x = b_m
                if RESIDUAL:
                    x = keep * x + cross * left_tile(L_base, rows, ranks_m, p, RM)
                m = tl.trans(tl.dot(tl.trans(whole_m), tl.trans(x), input_precision=MOMENT_PRECISION))
                v = tl.trans(tl.dot(tl.trans(whole_v), tl.trans(b_v), input_precision=MOMENT_PRECISION))
            else:
                m = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
                v = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
                for first in range(0, RM if RM > RV else RV, INNER):
                    r = first + tl.arange(0, INNER)
                    x = left_tile(m_B, rows, r, p, RM)
                    if RESIDUAL:
                        x = keep * x + cross * left_tile(L_base, rows, r, p, RM)
                    m = tl.dot(x, right_tile(m_A, r, cols, q, RM), m, input_precision=MOMENT_PRECISION)
                    y = left_tile(v_B, rows, r, p, RV)
                    v = tl.dot(y, right_tile(v_A, r, cols, q, RV), v, input_precision=MOMENT_PRECISION)
            share = outside
            if NEGATE:
                share = -outside
            if not RESIDUAL:
                m = keep * m
            m += share * wide
            root = tl.sqrt((beta2 * (v * v) + (1.0 - beta2) * (wide * wide)) * v_scale)
            inverse = tl.rsqrt(root + eps)  # as in `second_pass.update`
            direction = m * (inverse * inverse)
            if BOUNDED:
                direction = tl.where(root > 0, tl.minimum(tl.maximum(direction, -limit), limit), 0.0)
            w = here.to(tl.float32) * decay - rate * direction
            new = rounded(w, seed, matrices, matrix, coefficients, rows, cols, q, W_TYPE, STOCHASTIC, ROUNDS)
            tl.store(W_addresses, new, mask=inside)
    z_m = z_m if NEGATE else -z_m
    z_v = -z_v
    if R_BLOCKS == 1:  # in the place of the old factors, whose columns nobody else reads
        next_right(
            m_A, squares_m, scales, matrix, n, 0, z_m, cols, q, rate_m, on,
            S_TYPE, RM, BLOCK_M, OUT, SQUARE_PRECISION,
        )  # fmt: skip
        next_right(
            v_A, squares_v, scales, matrix, n, 1, z_v, cols, q, rate_v, on,
            S_TYPE, RV, BLOCK_V, OUT, SQUARE_PRECISION,
        )  # fmt: skip
    else:
        at = field(matrices, matrix, COLS)
        right_scratch(Z_m + at * RM, ranks_m, cols, q, RM, z_m)
        right_scratch(Z_v + at * RV, ranks_v, cols, q, RV, z_v)
