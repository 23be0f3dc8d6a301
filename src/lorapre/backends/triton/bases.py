"""Orthonormal bases by Cholesky QR, of the factors of matrices of several shapes at once. Imports triton.

The same as `lorapre.subspace.orthonormalize` with three passes in float32. A factor X is (length, R): the left one,
K (p, R), in scratch; the right one, the transpose of L (R, q), in scratch or in the place of m_A. It is taken in chunks
of rows; products of two factors come as one (R, R) matrix a chunk, which whoever needs their sum adds up.
"""

# Triton's decorators and types are untyped where they are not missing (other platforms than Linux).
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from lorapre.backends.triton.elements import (
    LEFT,
    ON,
    PART,
    RIGHT,
    ROWS,
    V_ROW,
    WIDTH,
    A,
    B,
    P,
    Q,
    base_of,
    field,
    nearest,
    place_in,
    size_of,
)

#: Shorter columns than this, after the matrix's largest element is 1, are zero.
_TINY = tl.constexpr(2.0**-63)


@triton.jit
def factor(matrices, matrix, scratch, rows, ranks, R: tl.constexpr, RIGHT_SIDE: tl.constexpr, IN_STATE: tl.constexpr):
    """Addresses of rows x ranks of a factor: row i, rank k."""
    if RIGHT_SIDE:
        q = size_of(matrices, matrix, Q)
        base = place_in(scratch, matrices, matrix, RIGHT, A, IN_STATE)
        addresses = base + (rows[:, None] + ranks[None, :] * q)
    else:
        base = place_in(scratch, matrices, matrix, LEFT, B, IN_STATE)
        addresses = base + (rows[:, None] * R + ranks[None, :])
    return addresses


@triton.jit
def product(
    matrices,
    items,
    starts,
    X,
    Y,
    parts,
    part_starts,
    sizes,
    products,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    RIGHT_SIDE: tl.constexpr,
    X_IN_STATE: tl.constexpr,
    Y_IN_STATE: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """X^T Y of each chunk; where SCALE, of both divided by ``sizes``, which of the left side the parts give."""
    R_BLOCKS: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    pid = tl.program_id(0)
    item = pid // (R_BLOCKS * R_BLOCKS)
    block = pid % (R_BLOCKS * R_BLOCKS)
    matrix = tl.load(items + item * 2).to(tl.int64)
    chunk = tl.load(items + item * 2 + 1)
    length = size_of(matrices, matrix, Q if RIGHT_SIDE else P)
    i = (block // R_BLOCKS) * BLOCK_R + tl.arange(0, BLOCK_R)
    j = (block % R_BLOCKS) * BLOCK_R + tl.arange(0, BLOCK_R)
    factor_of = 1.0
    if SCALE:
        if RIGHT_SIDE:
            size = tl.load(sizes + matrix)
        else:
            largest = tl.zeros((128,), tl.float32)
            last = tl.load(part_starts + matrix + 1) * PARTS
            for start in range(tl.load(part_starts + matrix) * PARTS, last, 128):
                at = start + tl.arange(0, 128)
                largest = tl.maximum(largest, tl.load(parts + at.to(tl.int64) * PART + 2, mask=at < last, other=0.0))
            size = tl.max(largest, axis=0)
            if chunk == 0 and block == 0:
                tl.store(sizes + matrix, size)
        factor_of = tl.where(size > 0, 1.0 / size, 1.0)
    total = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
    first = chunk * CHUNK
    for start in range(first, tl.minimum(first + CHUNK, length), BLOCK):
        rows = start + tl.arange(0, BLOCK)
        lines = (rows < length)[:, None]
        x = tl.load(
            factor(matrices, matrix, X, rows, i, R, RIGHT_SIDE, X_IN_STATE), mask=lines & (i < R)[None, :], other=0.0
        )
        y = tl.load(
            factor(matrices, matrix, Y, rows, j, R, RIGHT_SIDE, Y_IN_STATE), mask=lines & (j < R)[None, :], other=0.0
        )
        total = tl.dot(tl.trans(x) * factor_of, y * factor_of, total, input_precision=PRECISION)
    out = products + (tl.load(starts + matrix) + chunk).to(tl.int64) * R * R
    tl.store(out + i[:, None] * R + j[None, :], total, mask=(i < R)[:, None] & (j < R)[None, :])


@triton.jit
def inverse_cholesky(
    products,
    starts,
    sizes,
    T,
    triangles,
    uppers,
    shift,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    PART_OF_BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """T (n, R, R) such that X T has orthonormal columns, from the chunks of X^T X; one matrix a program, in registers.

    The columns are scaled to length 1 and ``shift`` is added to the diagonal first. LAST leaves a matrix that has no
    decomposition as it is. ``triangles`` becomes the factor of what the first pass was given: it is Q times this.
    ``uppers`` (n, R, R) is scratch.
    """
    matrix = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    rows, cols = i[:, None], i[None, :]
    inside = (rows < R) & (cols < R)
    diagonal = rows == cols
    S = tl.zeros((BLOCK, BLOCK), tl.float32)
    first = tl.load(starts + matrix)
    chunk = products + first.to(tl.int64) * R * R + (rows * R + cols)
    for _ in range(first, tl.load(starts + matrix + 1)):
        S += tl.load(chunk, mask=inside, other=0.0)
        chunk += R * R
    length = tl.sqrt(tl.sum(tl.where(diagonal, S, 0.0), axis=1))
    scale = tl.where(length > _TINY, 1.0 / tl.maximum(length, _TINY), 0.0)
    S = S * scale[:, None] * scale[None, :]
    S += tl.where(diagonal, tl.where(rows < R, shift, 1.0), 0.0)
    # L column by column, and at once what turns L into the identity: its inverse.
    inverse = tl.where(diagonal, 1.0, 0.0)
    lower = tl.zeros((BLOCK, BLOCK), tl.float32)
    works = 1
    for k in range(R):
        at = i == k
        column = tl.sum(tl.where(at[None, :], S, 0.0), axis=1)
        pivot = tl.sum(tl.where(at, column, 0.0), axis=0)
        works = works & (pivot > 0).to(tl.int32)
        root = 1.0 / tl.sqrt(tl.maximum(pivot, _TINY))
        column = tl.where(i >= k, column * root, 0.0)
        row = tl.sum(tl.where(at[:, None], inverse, 0.0), axis=0) * root
        S -= column[:, None] * column[None, :]
        below = tl.where(i > k, column, 0.0)
        lower = tl.where(at[None, :], column[:, None], lower)
        inverse = tl.where(at[:, None], row[None, :], inverse - below[:, None] * row[None, :])
    # Of the triangle L^T D, for which it is written transposed.
    lower = lower * tl.where(length > _TINY, length, 0.0)[:, None]
    result = inverse * scale[None, :]
    if LAST:
        result = tl.where(works != 0, result, tl.where(diagonal, 1.0, 0.0))
        lower = tl.where(works != 0, lower, tl.where(diagonal, 1.0, 0.0))
    tl.store(T + matrix * R * R + cols * R + rows, result, mask=inside)
    here = triangles + matrix * R * R + rows * R + cols
    if FIRST:
        size = tl.load(sizes + matrix)
        size = tl.where(size > 0, size, 1.0)  # by which `apply` divides what it is given
        tl.store(triangles + matrix * R * R + cols * R + rows, lower * size, mask=inside)
    else:
        upper = uppers + matrix * R * R
        before = triangles + matrix * R * R
        tl.store(upper + cols * R + rows, lower, mask=inside)
        tl.debug_barrier()
        total = tl.zeros((BLOCK, BLOCK), tl.float32)
        for start in range(0, BLOCK, PART_OF_BLOCK):
            inner = start + tl.arange(0, PART_OF_BLOCK)
            u = tl.load(upper + (rows * R + inner[None, :]), mask=(rows < R) & (inner < R)[None, :], other=0.0)
            t = tl.load(before + (inner[:, None] * R + cols), mask=(inner < R)[:, None] & (cols < R), other=0.0)
            total = tl.dot(u, t, total, input_precision=PRECISION)
        tl.debug_barrier()
        tl.store(here, total, mask=inside)


@triton.jit
def apply(
    matrices,
    items,
    starts,
    coefficients,
    sizes,
    X,
    Y,
    T,
    products,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
    OUT: tl.constexpr,
    CHUNK: tl.constexpr,
    RIGHT_SIDE: tl.constexpr,
    X_IN_STATE: tl.constexpr,
    Y_IN_STATE: tl.constexpr,
    SCALE: tl.constexpr,
    GRAM: tl.constexpr,
    CARRY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """X <- X T in place, OUT ranks at once; and of the new X each chunk's X^T X (GRAM) or X^T Y (CARRY).

    SCALE divides X by ``sizes`` before, without which T might overflow.
    """
    item = tl.program_id(0)
    matrix = tl.load(items + item * 2).to(tl.int64)
    chunk = tl.load(items + item * 2 + 1)
    length = size_of(matrices, matrix, Q if RIGHT_SIDE else P)
    live = length
    if X_IN_STATE:  # which stays as it is where the step is not enabled
        live = length * (tl.load(coefficients + matrix * WIDTH + ON) != 0).to(tl.int32)
    scale = 1.0
    if SCALE:
        size = tl.load(sizes + matrix)
        scale = tl.where(size > 0, 1.0 / size, 1.0)
    ranks = tl.arange(0, BLOCK_R)
    first = chunk * CHUNK
    total = tl.zeros((BLOCK_R, OUT), tl.float32)
    for start in range(first, tl.minimum(first + CHUNK, length), BLOCK):
        rows = start + tl.arange(0, BLOCK)
        inside = (rows < length)[:, None] & (ranks < R)[None, :]
        x = tl.load(factor(matrices, matrix, X, rows, ranks, R, RIGHT_SIDE, X_IN_STATE), mask=inside, other=0.0)
        for at in range(0, BLOCK_R, OUT):
            out = at + tl.arange(0, OUT)
            t = tl.load(
                T + matrix * R * R + ranks[:, None] * R + out[None, :],
                mask=(ranks < R)[:, None] & (out < R)[None, :],
                other=0.0,
            )
            new = tl.dot(x * scale, t, input_precision=PRECISION)
            tl.store(
                factor(matrices, matrix, X, rows, out, R, RIGHT_SIDE, X_IN_STATE),
                new,
                mask=(rows < live)[:, None] & (out < R)[None, :],
            )
            if GRAM:  # OUT is all ranks then
                total = tl.dot(tl.trans(new), new, total, input_precision=PRECISION)
            if CARRY:
                y = tl.load(factor(matrices, matrix, Y, rows, ranks, R, RIGHT_SIDE, Y_IN_STATE), mask=inside, other=0.0)
                total = tl.dot(tl.trans(new), y, total, input_precision=PRECISION)
    if GRAM or CARRY:
        at = products + (tl.load(starts + matrix) + chunk).to(tl.int64) * R * R
        tl.store(at + ranks[:, None] * R + ranks[None, :], total, mask=(ranks < R)[:, None] & (ranks < R)[None, :])


@triton.jit
def finish(
    matrices,
    right_items,
    left_items,
    right_programs,
    coefficients,
    U,
    L,
    T,
    triangles,
    row_sums,
    beta2,
    S_TYPE: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
    OUT: tl.constexpr,
    L_IN_STATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The new state, where the step is enabled: m_A from L^T T, m_B = U R^T with R of L's basis, v_row."""
    pid = tl.program_id(0)
    left = pid >= right_programs
    item = tl.where(left, left_items + (pid - right_programs) * 2, right_items + pid * 2)
    matrix = tl.load(item).to(tl.int64)
    tile = tl.load(item + 1)
    p = size_of(matrices, matrix, P)
    q = size_of(matrices, matrix, Q)
    on = (tl.load(coefficients + matrix * WIDTH + ON) != 0).to(tl.int32)
    rows = tile * BLOCK + tl.arange(0, BLOCK)
    ranks = tl.arange(0, BLOCK_R)
    length = tl.where(left, p, q)
    # Of element (row, rank), in the left factor and in the right one.
    row_stride = tl.where(left, R, 1)
    rank_stride = tl.where(left, 1, q)
    source = tl.where(left, U + field(matrices, matrix, LEFT), place_in(L, matrices, matrix, RIGHT, A, L_IN_STATE))
    target = tl.where(left, base_of(matrices, matrix, B, S_TYPE), base_of(matrices, matrix, A, S_TYPE))
    factor_of = tl.where(left, triangles, T) + matrix * R * R
    in_stride = tl.where(left, 1, R)
    out_stride = tl.where(left, R, 1)
    lines = (rows < length)[:, None]
    x = tl.load(
        source + (rows[:, None] * row_stride + ranks[None, :] * rank_stride),
        mask=lines & (ranks < R)[None, :],
        other=0.0,
    )
    for at in range(0, BLOCK_R, OUT):
        out = at + tl.arange(0, OUT)
        t = tl.load(
            factor_of + (ranks[:, None] * in_stride + out[None, :] * out_stride),
            mask=(ranks < R)[:, None] & (out < R)[None, :],
            other=0.0,
        )
        new = tl.dot(x, t, input_precision=PRECISION)
        tl.store(
            target + (rows[:, None] * row_stride + out[None, :] * rank_stride),
            nearest(new, S_TYPE),
            mask=(rows < length * on)[:, None] & (out < R)[None, :],
        )
    base = base_of(matrices, matrix, V_ROW, S_TYPE)
    inside = rows < tl.where(left, p * on, 0)
    old = tl.load(base + rows, mask=inside, other=0.0).to(tl.float32)
    now = tl.load(row_sums + field(matrices, matrix, ROWS) + rows, mask=inside, other=0.0) / q
    tl.store(base + rows, nearest(old + (1.0 - beta2) * (now - old), S_TYPE), mask=inside)
