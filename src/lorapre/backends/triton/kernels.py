"""The two passes over the gradients. One matrix of a batch is (p, q) of rank R.

G and W are found through tables of addresses. Grids are flat (an axis of its own for the batch would be limited to
65,535), fastest index first: rank block, part of the loop, tile, matrix. Offsets within a matrix are int64. No sum is
atomic: a rerun gives the same bits. `lorapre.backends.triton.elements` says what coefficients and scalars are.
"""

# Triton's decorators and types are untyped where they are not missing (other platforms than Linux).
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from lorapre.backends.triton.elements import DECAY, ON, OUTSIDE, RATE, STEP, V_SCALE, WIDTH, base_of, cut, nearest

#: Smallest normal float32, what `torch.finfo` calls tiny.
TINY = tl.constexpr(2.0**-126)


@triton.jit
def tile_of(base, rows, cols, row_stride, col_stride, ALIGNED: tl.constexpr):
    """Addresses of rows x cols. ALIGNED: 1 where runs along a row start at multiples of 16 bytes, 2 along a column."""
    addresses = base + (rows.to(tl.int64)[:, None] * row_stride + cols.to(tl.int64)[None, :] * col_stride)
    # Without the hint a base address that was read from memory keeps every access scalar.
    if ALIGNED == 1:
        addresses = tl.multiple_of(addresses, (1, 16))
    elif ALIGNED == 2:
        addresses = tl.multiple_of(addresses, (16, 1))
    return addresses


@triton.jit
def project(
    G_table,
    A,
    GA,
    row_sums,
    coefficients,
    p,
    q,
    row_stride,
    col_stride,
    tiles,
    parts,
    part_length,
    G_TYPE: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    NEGATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Pass 1 over G: GA (n, parts, p, R) += G A^T, and ``row_sums`` (n, parts, p) of G^2; a program has a row block."""
    R_BLOCKS: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    pid = tl.program_id(0)
    part = (pid // R_BLOCKS) % parts
    tile = (pid // R_BLOCKS // parts) % tiles
    matrix = (pid // R_BLOCKS // parts // tiles).to(tl.int64)
    rows = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    ranks = (pid % R_BLOCKS) * BLOCK_R + tl.arange(0, BLOCK_R)
    # Where the step is not enabled the gradients may be nan, and none is read.
    live = p * (tl.load(coefficients + matrix * WIDTH + ON) != 0).to(tl.int32)
    base = base_of(G_table, matrix, G_TYPE)
    A_base = A + matrix * R * q

    total = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
    first = part * part_length
    for start in range(first, tl.minimum(first + part_length, q), BLOCK_Q):
        cols = start + tl.arange(0, BLOCK_Q)
        addresses = tile_of(base, rows, cols, row_stride, col_stride, ALIGNED)
        g = tl.load(addresses, mask=(rows < live)[:, None] & (cols < q)[None, :], other=0.0)
        a = tl.load(
            A_base + ranks.to(tl.int64)[:, None] * q + cols[None, :],
            mask=(ranks < R)[:, None] & (cols < q)[None, :],
            other=0.0,
        )
        if NEGATE:
            g = -g
        wide = g.to(tl.float32)
        if BF16:
            total = tl.dot(g, tl.trans(a.to(tl.bfloat16)), total)
        else:
            total = tl.dot(wide, tl.trans(a), total, input_precision=PRECISION)
        squares += wide * wide
    out = matrix * parts + part
    tl.store(
        GA + out * p * R + rows.to(tl.int64)[:, None] * R + ranks[None, :],
        total,
        mask=(rows < p)[:, None] & (ranks < R)[None, :],
    )
    first_of_ranks = (pid % R_BLOCKS == 0).to(tl.int32)
    tl.store(row_sums + out * p + rows, tl.sum(squares, axis=1), mask=rows < p * first_of_ranks)


@triton.jit
def update(
    W_table,
    G_table,
    row_table,
    col_table,
    X,
    A,
    U,
    UG,
    col_sums,
    scalars,
    coefficients,
    p,
    q,
    W_row_stride,
    W_col_stride,
    G_row_stride,
    G_col_stride,
    tiles,
    parts,
    part_length,
    beta2,
    limit,
    first_matrix,
    stream,
    seed,
    W_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    S_TYPE: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    NEGATE: tl.constexpr,
    RELATIVE: tl.constexpr,
    BOUNDED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROUNDS: tl.constexpr,
    W_ALIGNED: tl.constexpr,
    G_ALIGNED: tl.constexpr,
    BF16: tl.constexpr,
    MOMENTUM_PRECISION: tl.constexpr,
    LEFT_PRECISION: tl.constexpr,
):
    """Pass 2 over G: W in place, UG (n, parts, R, q) += U^T G, ``col_sums`` (n, parts, q) of G^2.

    A program has a column block. Of the programs of one block, one for each rank block, the first updates W.
    """
    R_BLOCKS: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    pid = tl.program_id(0)
    r_block = pid % R_BLOCKS
    part = (pid // R_BLOCKS) % parts
    tile = (pid // R_BLOCKS // parts) % tiles
    matrix = (pid // R_BLOCKS // parts // tiles).to(tl.int64)
    cols = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    ranks = r_block * BLOCK_R + tl.arange(0, BLOCK_R)
    row = coefficients + matrix * WIDTH
    live = p * (tl.load(row + ON) != 0).to(tl.int32)
    outside = tl.load(row + OUTSIDE)
    v_scale = tl.load(row + V_SCALE)
    rate = tl.load(row + RATE)
    decay = tl.load(row + DECAY)
    mean = tl.load(scalars + matrix * 2)
    mean = tl.where(mean > 0, mean, 1.0)
    eps = tl.load(scalars + matrix * 2 + 1)
    W_base = base_of(W_table, matrix, W_TYPE)
    G_base = base_of(G_table, matrix, G_TYPE)
    v_row = base_of(row_table, matrix, S_TYPE)
    v_col = tl.load(base_of(col_table, matrix, S_TYPE) + cols, mask=cols < q, other=0.0).to(tl.float32)
    A_base = A + matrix * R * q + cols[None, :]
    X_base = X + matrix * p * R
    U_base = U + matrix * p * R

    if R_BLOCKS == 1:  # the loop below stores, so that the compiler would read it again in every turn
        whole = tl.load(
            A_base + ranks.to(tl.int64)[:, None] * q, mask=(ranks < R)[:, None] & (cols < q)[None, :], other=0.0
        )

    left = tl.zeros((BLOCK_R, BLOCK_Q), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
    first = part * part_length
    for start in range(first, tl.minimum(first + part_length, p), BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        lines = rows.to(tl.int64)[:, None] * R
        inside = (rows < live)[:, None] & (cols < q)[None, :]
        raw = tl.load(tile_of(G_base, rows, cols, G_row_stride, G_col_stride, G_ALIGNED), mask=inside, other=0.0)
        if NEGATE:
            raw = -raw
        g = raw.to(tl.float32)
        square = g * g
        squares += square
        u = tl.load(U_base + lines + ranks[None, :], mask=(rows < p)[:, None] & (ranks < R)[None, :], other=0.0)
        if BF16:
            left = tl.dot(tl.trans(u.to(tl.bfloat16)), raw, left)
        else:
            left = tl.dot(tl.trans(u), g, left, input_precision=LEFT_PRECISION)
        if r_block == 0:
            m = outside * g
            for k in range(0, R, BLOCK_R):
                r = k + tl.arange(0, BLOCK_R)
                x = tl.load(X_base + lines + r[None, :], mask=(rows < p)[:, None] & (r < R)[None, :], other=0.0)
                if R_BLOCKS > 1:
                    a = tl.load(
                        A_base + r.to(tl.int64)[:, None] * q, mask=(r < R)[:, None] & (cols < q)[None, :], other=0.0
                    )
                else:
                    a = whole
                if BF16:
                    m = tl.dot(x.to(tl.bfloat16), a.to(tl.bfloat16), m)
                else:
                    m = tl.dot(x, a, m, input_precision=MOMENTUM_PRECISION)
            v = tl.load(v_row + rows, mask=rows < p, other=0.0).to(tl.float32) / mean * beta2
            v_hat = (v[:, None] * v_col[None, :] + (1.0 - beta2) * square) * v_scale
            denominator = tl.sqrt(v_hat) + eps
            still = denominator <= eps  # where v is 0
            if RELATIVE:
                denominator = tl.maximum(denominator, TINY)
            direction = m / denominator
            if BOUNDED:
                direction = tl.where(still, 0.0, tl.minimum(tl.maximum(direction, -limit), limit))
            W_addresses = tile_of(W_base, rows, cols, W_row_stride, W_col_stride, W_ALIGNED)
            w = tl.load(W_addresses, mask=inside, other=0.0).to(tl.float32)
            w = w * decay - rate * direction
            if STOCHASTIC:
                element = (rows.to(tl.int64)[:, None] * q + cols[None, :]).to(tl.uint32)
                zero = element * 0
                counter = zero + tl.load(row + STEP).to(tl.uint32)
                bits, _, _, _ = tl.philox(
                    seed, element, zero + (first_matrix + matrix).to(tl.uint32), counter, zero + stream, ROUNDS
                )
                tl.store(W_addresses, cut(w, (bits >> 16).to(tl.int32)), mask=inside)
            else:
                tl.store(W_addresses, nearest(w, W_TYPE), mask=inside)
    out = matrix * parts + part
    tl.store(
        UG + out * R * q + ranks.to(tl.int64)[:, None] * q + cols[None, :],
        left,
        mask=(ranks < R)[:, None] & (cols < q)[None, :],
    )
    tl.store(col_sums + out * q + cols, tl.sum(squares, axis=0), mask=cols < q * (r_block == 0).to(tl.int32))
