"""The first pass over the gradients, of matrices of any shapes. One matrix is (p, q) of rank R. Imports triton.

G and W are found through `lorapre.backends.triton.layout`'s table. The grids of both passes are flat: the rank block is
the fastest index, behind it the list of work. Offsets within a matrix are int32, as `supports` sees to. No sum is
atomic: a rerun gives the same bits.
"""

# Triton's decorators and types are untyped where they are not missing (other platforms than Linux).
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from lorapre.backends.triton.elements import (
    COLUMNS_ALIGNED,
    CROSS,
    FULL_COL,
    FULL_ROW,
    G_COL,
    G_ROW,
    KEEP,
    LEFT,
    LINES,
    OUTSIDE,
    PART,
    ROWS,
    ROWS_ALIGNED,
    TINY,
    V_COL,
    V_ROW,
    V_SCALE,
    WIDTH,
    A,
    B,
    G,
    P,
    Q,
    base_of,
    field,
    lines_of,
    mean_of,
    size_of,
    tile_of,
    whole,
)
from lorapre.backends.triton.spectral import K, by_rows


@triton.jit
def project(
    matrices,
    items,
    starts,
    coefficients,
    U,
    row_sums,
    parts,
    signs,
    sign_starts,
    rights,
    sketches,
    decay,
    gain,
    beta2,
    G_TYPE: tl.constexpr,
    S_TYPE: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    NEGATE: tl.constexpr,
    CLIP: tl.constexpr,
    SPECTRAL: tl.constexpr,
    WHOLE: tl.constexpr,
    FULL: tl.constexpr,
    SWEEPS: tl.constexpr,
    ORDER: tl.constexpr,
    V_ORDER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Pass 1 over G, a program a block of rows: G A^T to ``U``. It changes no state: G may turn out not to be finite.

    ``U`` is transposed where it is to be multiplied, in a step that SWEEPS. Besides ``row_sums`` of G^2, and in
    ``parts`` the sums of G^2 and of G^2 / v_hat and the largest |K| of the block, K = decay B + gain G A^T. SPECTRAL
    sketches the update by `lorapre.backends.triton.spectral.signs`, which has left ``signs``, S, and ``rights``, A S:
    of these rows Y^T Y (16, 16) to ``sketches`` if WHOLE, else G S, (p, 16) of each matrix. FULL: v lies in full where
    v_row's address says, and ``row_sums`` are of the old v.
    """
    R_BLOCKS: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
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
    ranks = r_block * BLOCK_R + tl.arange(0, BLOCK_R)
    row = coefficients + matrix * WIDTH
    base = base_of(matrices, matrix, G, G_TYPE, ALIGNED)
    A_base = base_of(matrices, matrix, A, S_TYPE, ALIGNED)
    B_base = base_of(matrices, matrix, B, S_TYPE, ALIGNED)
    v_scale = tl.load(row + V_SCALE)
    if FULL:
        V_base = base_of(matrices, matrix, V_ROW, S_TYPE, (V_ORDER == ROWS_ALIGNED) | (V_ORDER == COLUMNS_ALIGNED))
        V_row_stride = size_of(matrices, matrix, FULL_ROW)
        V_col_stride = size_of(matrices, matrix, FULL_COL)
        V_live = p * (r_block == 0).to(tl.int32)  # the others' sums are not read
        V_sums = tl.zeros((BLOCK_P,), tl.float32)
    elif CLIP:
        row_base = base_of(matrices, matrix, V_ROW, S_TYPE)
        col_base = base_of(matrices, matrix, V_COL, S_TYPE, ALIGNED)
        mean = mean_of(row_base, p, 512)
        mean = tl.where(mean > 0, mean, 1.0)
        fresh = (1.0 - beta2) * v_scale
        v_row = tl.load(row_base + rows, mask=rows < p, other=0.0).to(tl.float32) / mean * (beta2 * v_scale)
    if SPECTRAL:
        k = tl.arange(0, K)
        S_line = lines_of(q)
        S_base = signs + field(matrices, matrix, LINES) // 16 * 16 * K
        sketch = tl.zeros((BLOCK_P, K), tl.float32)

    total = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
    surprise = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
    for start in range(0, q, BLOCK_Q):
        cols = start + tl.arange(0, BLOCK_Q)
        addresses = tile_of(base, rows, cols, row_stride, col_stride, ORDER)
        g = tl.load(addresses, mask=(rows < p)[:, None] & (cols < q)[None, :], other=0.0)
        a = tl.load(
            A_base + (ranks[:, None] * q + cols[None, :]),
            mask=(ranks < R)[:, None] & (cols < q)[None, :],
            other=0.0,
        ).to(tl.float32)
        wide = g.to(tl.float32)
        if NEGATE:
            wide = -wide
        total = tl.dot(wide, tl.trans(a), total, input_precision=PRECISION)
        square = wide * wide
        squares += square
        if FULL:
            v = tl.load(
                tile_of(V_base, rows, cols, V_row_stride, V_col_stride, V_ORDER),
                mask=(rows < V_live)[:, None] & (cols < q)[None, :],
                other=0.0,
            ).to(tl.float32)
            V_sums += tl.sum(v, axis=1)
        elif CLIP:
            v_col = tl.load(col_base + cols, mask=cols < q, other=0.0).to(tl.float32)
        if SPECTRAL:
            sign = tl.load(S_base + (k[:, None] * S_line + cols[None, :]), mask=(cols < S_line)[None, :], other=0.0)
            sketch = tl.dot(wide, tl.trans(sign), sketch, input_precision=PRECISION)
        if CLIP:
            # TINY, far below what counts, has no square divided by 0 without asking of each whether it is.
            if FULL:
                v_hat = (beta2 * v + (1.0 - beta2) * square) * v_scale + TINY
            else:
                v_hat = (v_row[:, None] * v_col[None, :] + TINY) + fresh * square
            ratio = wide * tl.rsqrt(v_hat)
            surprise += ratio * ratio
        if G_TYPE == tl.float32:  # noqa: SIM300 (no constant)
            # G is an operand as it lies in shared memory. A use of the sum in every turn, of no instruction, has the
            # product waited for before what it reads is filled again: of a load that is an operand and more, Triton 3.6
            # keeps one buffer too few (its issue 6691).
            total = total.to(tl.int32, bitcast=True).to(tl.float32, bitcast=True)
            if SPECTRAL:
                sketch = sketch.to(tl.int32, bitcast=True).to(tl.float32, bitcast=True)
    b = tl.load(
        B_base + (rows[:, None] * R + ranks[None, :]), mask=(rows < p)[:, None] & (ranks < R)[None, :], other=0.0
    ).to(tl.float32)
    U_base = U + field(matrices, matrix, LEFT) // 16 * 16
    # Zeros down to the end of the last line: who reads it need not ask where p ends.
    column = lines_of(p)
    within = (rows < column)[:, None] & (ranks < R)[None, :]
    if SWEEPS:
        tl.store(U_base + (ranks[None, :] * column + rows[:, None]), total, mask=within)
    else:
        tl.store(U_base + (rows[:, None] * R + ranks[None, :]), total, mask=within)
    first_of_ranks = (r_block == 0).to(tl.int32)
    sums = V_sums if FULL else tl.sum(squares, axis=1)
    tl.store(row_sums + field(matrices, matrix, ROWS) + rows, sums, mask=rows < p * first_of_ranks)
    if SPECTRAL:
        if WHOLE:
            # All ranks are here. The update's numerator is outside G + X A: its sketch is outside G S + X (A S).
            right = tl.zeros((BLOCK_R, K), tl.float32)
            for at in range(tl.load(sign_starts + matrix), tl.load(sign_starts + matrix + 1)):
                there = rights + ((at * R + ranks)[:, None] * K + k[None, :])
                right += tl.load(there, mask=(ranks < R)[:, None], other=0.0)
            x = tl.load(row + KEEP) * b + tl.load(row + CROSS) * total
            y = tl.dot(x, right, tl.load(row + OUTSIDE) * sketch, input_precision=PRECISION)
            y = by_rows(y, base_of(matrices, matrix, V_ROW, S_TYPE), rows, p, sums / q, beta2, v_scale)
            products = tl.dot(tl.trans(y), y, input_precision=PRECISION)
            place = sketches + (tl.load(starts + matrix) + tile).to(tl.int64) * (K * K)
            tl.store(place + (k[:, None] * K + k[None, :]), products)
        else:
            there = (field(matrices, matrix, ROWS) + rows)[:, None] * K + k[None, :]
            tl.store(sketches + there, sketch, mask=(rows < p * first_of_ranks)[:, None])
    part = parts + ((tl.load(starts + matrix) + tile).to(tl.int64) * R_BLOCKS + r_block) * PART
    tl.store(part, tl.sum(squares))
    tl.store(part + 1, tl.sum(surprise))
    tl.store(part + 2, tl.max(tl.abs(decay * b + gain * total)))
