"""What Muon's step does around Newton-Schulz: the momentum out, the update into the weights. Imports triton.

Each launch is for some matrices of one shape, ``first`` and those behind it, whose momenta and updates lie behind each
other in scratch: (rows, q_of) numbers each, p and q up to multiples of 8 with zeros at the end, which change neither a
product nor a norm and let the tensor cores read what they want to. Sums are in parts, one for each tile of a matrix.
"""

# Triton's decorators and types are untyped where they are not missing (other platforms than Linux).
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from lorapre.backends.triton.elements import (
    COLUMNS_ALIGNED,
    DECAY,
    G_COL,
    G_ROW,
    LEFT,
    ON,
    OUTSIDE,
    RATE,
    ROWS_ALIGNED,
    V_ROW,
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
    lines_of,
    nearest,
    place_in,
    rounded,
    size_of,
    sum_of_parts,
    tile_of,
    whole,
)
from lorapre.backends.triton.second_pass import basis_in, next_rows, tracked

#: Smaller gradients count as if they were of this size: what is divided by it keeps its squares in float32's range.
_LEAST = tl.constexpr(2.0**-60)
#: Times this the momentum goes out: float16's smallest numbers are near those of a large matrix of norm 1.
_ROOM = tl.constexpr(64.0)


@triton.jit
def eights(length):
    """``length`` up to a multiple of 8: `lorapre.backends.triton.table.eights`."""
    return (length + 7) // 8 * 8


@triton.jit(do_not_specialize=["first"])
def momentum(
    matrices,
    coefficients,
    U,
    X,
    L,
    C,
    sums,
    sizes,
    new_sizes,
    parts,
    M,
    first,
    tiles,
    gain,
    weight,
    sign,
    G_TYPE: tl.constexpr,
    S_TYPE: tl.constexpr,
    M_TYPE: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    X_IN_STATE: tl.constexpr,
    X_ALIGNED: tl.constexpr,
    L_IN_STATE: tl.constexpr,
    ORDER: tl.constexpr,
    MOMENTUM_PRECISION: tl.constexpr,
    LEFT_PRECISION: tl.constexpr,
):
    """Pass 2 over G, a program a block of columns: M = X A + outside G, and L = C A + gain U^T G.

    M goes out divided by ``weight`` (the largest of what counts in it) and by the size of G and K, so that no square
    of it leaves float32's range, whatever the gradient's scale is; in ``parts`` are the sums of its squares.
    ``sizes`` (n) are those of K, ``new_sizes`` (n) become those of L's rows. Products are formed as in
    `lorapre.backends.triton.second_pass.update`.
    """
    ALIGNED: tl.constexpr = (ORDER == ROWS_ALIGNED) | (ORDER == COLUMNS_ALIGNED)
    pid = tl.program_id(0)
    tile = pid % tiles
    number = pid // tiles
    matrix = (first + number).to(tl.int64)
    p = whole(size_of(matrices, matrix, P), ORDER, COLUMNS_ALIGNED)
    q = whole(size_of(matrices, matrix, Q), ORDER, ROWS_ALIGNED)
    row_stride = size_of(matrices, matrix, G_ROW)
    col_stride = size_of(matrices, matrix, G_COL)
    M_rows = eights(p)
    M_cols = eights(q)
    cols = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    ranks = tl.arange(0, BLOCK_R)
    row = coefficients + matrix * WIDTH
    on = (tl.load(row + ON) != 0).to(tl.int32)
    outside = tl.load(row + OUTSIDE)
    size = tl.maximum(tl.load(sizes + matrix), tl.sqrt(tl.load(sums + matrix)))
    scale = _ROOM / (weight * tl.maximum(size, _LEAST))
    G_base = base_of(matrices, matrix, G, G_TYPE, ALIGNED)
    A_base = base_of(matrices, matrix, A, S_TYPE, ALIGNED)
    X_base = place_in(X, matrices, matrix, LEFT, B, X_IN_STATE, X_ALIGNED)
    U_base = U + field(matrices, matrix, LEFT) // 16 * 16
    U_column = lines_of(p)
    M_base = M + number.to(tl.int64) * M_rows * M_cols
    basis = basis_in(A_base, ranks, cols, q, R)
    left = tl.zeros((BLOCK_Q, BLOCK_R), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
    for start in range(0, p, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        raw = tl.load(
            tile_of(G_base, rows, cols, row_stride, col_stride, ORDER),
            mask=(rows < p)[:, None] & (cols < q)[None, :],
            other=0.0,
        )
        # A factor, whatever it is, has the product take G from registers: see the update of Adam.
        g = sign * raw.to(tl.float32)
        u = tl.load(
            U_base + (ranks[:, None] * U_column + rows[None, :]),
            mask=(ranks < R)[:, None] & (rows < U_column)[None, :],
            other=0.0,
        )
        left = tl.dot(tl.trans(g), tl.trans(u), left, input_precision=LEFT_PRECISION)
        inside = tracked(X_base, basis, ranks, rows, p, R, MOMENTUM_PRECISION)
        m = (outside * g + tl.trans(inside)) * scale
        squares += m * m
        tl.store(
            tile_of(M_base, rows, cols, M_cols, 1, ROWS_ALIGNED),
            nearest(m, M_TYPE),
            mask=(rows < M_rows)[:, None] & (cols < M_cols)[None, :],
        )
    tl.store(parts + number * tiles + tile, tl.sum(squares))
    size_of_row = next_rows(
        matrices, matrix, C, L, sums, basis, left, gain, ranks, cols, q, on, R, L_IN_STATE, ALIGNED, LEFT_PRECISION
    )
    if tile == 0:
        tl.store(new_sizes + matrix, size_of_row)


@triton.jit
def normalize(M, parts, tiles, numel, M_TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """M of ``numel`` numbers, a multiple of 64, by its norm, in place; zeros stay zeros."""
    BLOCKS = (numel + BLOCK - 1) // BLOCK
    number = tl.program_id(0) // BLOCKS
    squared = sum_of_parts(parts, number * tiles, number * tiles + tiles, 0, 1)
    inverse = tl.where(squared > 0, 1.0 / tl.sqrt(tl.where(squared > 0, squared, 1.0)), 0.0)
    numel = numel // 64 * 64
    at = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    address = M + number.to(tl.int64) * numel + at
    m = tl.load(address, mask=at < numel, other=0.0).to(tl.float32)
    tl.store(address, nearest(m * inverse, M_TYPE), mask=at < numel)


@triton.jit(do_not_specialize=["first"])
def lengths(
    matrices,
    coefficients,
    O,  # noqa: E741  (the paper's name)
    inverses,
    parts,
    first,
    tiles,
    beta2,
    S_TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    OTHER: tl.constexpr,
    BY_ROW: tl.constexpr,
):
    """NorMuon's averages one step on: of mean squares of O's rows, or columns, a program a block of them.

    ``inverses`` become 1 / the roots of the new averages; ``parts`` are the sums of O's squares, and of those of O by
    the roots: two numbers a tile.
    """
    pid = tl.program_id(0)
    tile = pid % tiles
    number = pid // tiles
    matrix = (first + number).to(tl.int64)
    p = size_of(matrices, matrix, P)
    q = size_of(matrices, matrix, Q)
    O_cols = eights(q)
    base = O + number.to(tl.int64) * eights(p) * O_cols
    own = tile * BLOCK + tl.arange(0, BLOCK)
    size = p if BY_ROW else q
    length = q if BY_ROW else p
    inside = own < size
    squares = tl.zeros((BLOCK, OTHER) if BY_ROW else (OTHER, BLOCK), tl.float32)
    for start in range(0, length, OTHER):
        other = start + tl.arange(0, OTHER)
        if BY_ROW:
            addresses = tile_of(base, own, other, O_cols, 1, ROWS_ALIGNED)
            mask = inside[:, None] & (other < O_cols)[None, :]
        else:
            addresses = tile_of(base, other, own, O_cols, 1, ROWS_ALIGNED)
            mask = (other < length)[:, None] & (own < O_cols)[None, :]
        o = tl.load(addresses, mask=mask, other=0.0).to(tl.float32)
        squares += o * o
    total = tl.sum(squares, axis=1 if BY_ROW else 0)
    on = (tl.load(coefficients + matrix * WIDTH + ON) != 0).to(tl.int32)
    base = base_of(matrices, matrix, V_ROW, S_TYPE)
    old = tl.load(base + own, mask=inside, other=0.0).to(tl.float32)
    average = old + (1.0 - beta2) * (total / length - old)
    tl.store(base + own, nearest(average, S_TYPE), mask=own < size * on)
    inverse = tl.where(average > 0, 1.0 / tl.sqrt(tl.where(average > 0, average, 1.0)), 0.0)
    tl.store(inverses + number.to(tl.int64) * size + own, inverse, mask=inside)
    part = parts + (number * tiles + tile) * 2
    tl.store(part, tl.sum(total))
    tl.store(part + 1, tl.sum(total * inverse * inverse))


@triton.jit(do_not_specialize=["first"])
def turn(
    matrices,
    coefficients,
    O,  # noqa: E741
    inverses,
    parts,
    first,
    tiles,
    row_tiles,
    col_tiles,
    factor,
    seed,
    W_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    NORMALIZED: tl.constexpr,
    BY_ROW: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROUNDS: tl.constexpr,
    ORDER: tl.constexpr,
):
    """W <- decay W - rate ``factor`` O in place, a program a tile.

    NORMALIZED: of O divided by what `lengths`, which has ``tiles`` of a matrix, has left; its norm stays what it was.
    """
    pid = tl.program_id(0)
    number = pid // (row_tiles * col_tiles)
    matrix = (first + number).to(tl.int64)
    p = whole(size_of(matrices, matrix, P), ORDER, COLUMNS_ALIGNED)
    q = whole(size_of(matrices, matrix, Q), ORDER, ROWS_ALIGNED)
    rows = pid // col_tiles % row_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    cols = pid % col_tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    O_cols = eights(q)
    row = coefficients + matrix * WIDTH
    on = (tl.load(row + ON) != 0).to(tl.int32)
    rate = tl.load(row + RATE) * factor
    inside = (rows < p * on)[:, None] & (cols < q)[None, :]
    base = O + number.to(tl.int64) * eights(p) * O_cols
    o = tl.load(
        tile_of(base, rows, cols, O_cols, 1, ROWS_ALIGNED),
        mask=(rows < p)[:, None] & (cols < O_cols)[None, :],
        other=0.0,
    ).to(tl.float32)
    if NORMALIZED:
        before = sum_of_parts(parts, number * tiles, number * tiles + tiles, 0, 2)
        after = sum_of_parts(parts, number * tiles, number * tiles + tiles, 1, 2)
        rate = rate * tl.sqrt(before / tl.where(after > 0, after, 1.0))
        if BY_ROW:
            o *= tl.load(inverses + number.to(tl.int64) * p + rows, mask=rows < p, other=0.0)[:, None]
        else:
            o *= tl.load(inverses + number.to(tl.int64) * q + cols, mask=cols < q, other=0.0)[None, :]
    W_base = base_of(matrices, matrix, W, W_TYPE, (ORDER == ROWS_ALIGNED) | (ORDER == COLUMNS_ALIGNED))
    row_stride = size_of(matrices, matrix, W_ROW)
    col_stride = size_of(matrices, matrix, W_COL)
    addresses = tile_of(W_base, rows, cols, row_stride, col_stride, ORDER)
    w = tl.load(addresses, mask=inside, other=0.0).to(tl.float32) * tl.load(row + DECAY) - rate * o
    new = rounded(w, seed, matrices, matrix, coefficients, rows, cols, q, W_TYPE, STOCHASTIC, ROUNDS)
    tl.store(addresses, new, mask=inside)
