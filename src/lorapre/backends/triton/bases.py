"""Orthonormal bases by Cholesky QR, of the factors of matrices of several shapes at once. Imports triton.

The same as `lorapre.subspace.orthonormalize` with three passes in float32. A factor X is (length, R), its columns one
after the other: the left one, K, in scratch, where the first pass leaves G A^T of it; the right one, the transpose of
L (R, q), in scratch or in the place of m_A. It is taken in chunks of rows; products of two factors come as one (R, R)
matrix a chunk, which whoever needs their sum adds up.
"""

# Triton's decorators and types are untyped where they are not missing (other platforms than Linux).
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from lorapre.backends.triton.elements import (
    CROSS,
    KEEP,
    LEFT,
    ON,
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
    lines_of,
    nearest,
    place_in,
    size_of,
)


@triton.jit
def factor(
    matrices,
    matrix,
    scratch,
    length,
    RIGHT_SIDE: tl.constexpr,
    IN_STATE: tl.constexpr,
    ALIGNED: tl.constexpr = False,
):
    """Where a factor begins, the distance of its columns, and the rows that may be read: behind K's are zeros.

    ALIGNED: as in `lorapre.backends.triton.layout.Matrices`; left ones in scratch always are.
    """
    if RIGHT_SIDE:
        base = place_in(scratch, matrices, matrix, RIGHT, A, IN_STATE, ALIGNED)
        column = length
        if ALIGNED:
            column = length // 8 * 8
    else:
        base = scratch + field(matrices, matrix, LEFT) // 16 * 16
        column = lines_of(length)
    return base, column


@triton.jit
def factor_of_rows(base, rows, ranks, length, R: tl.constexpr):
    """These rows of a left factor in the state, (rows, ranks) as float32."""
    address = base + (rows[:, None] * R + ranks[None, :])
    return tl.load(address, mask=(rows < length)[:, None] & (ranks < R)[None, :], other=0.0).to(tl.float32)


@triton.jit
def product(
    matrices,
    items,
    starts,
    X,
    Y,
    sizes,
    products,
    decay,
    gain,
    S_TYPE: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    RIGHT_SIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    X_IN_STATE: tl.constexpr,
    Y_IN_STATE: tl.constexpr,
    SCALE: tl.constexpr,
    FORM: tl.constexpr,
    WITH_X: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """X^T X of each chunk, or X^T Y with the update's X (p, R) for Y where WITH_X.

    Where SCALE, of X divided by ``sizes``. Where FORM, X is G A^T as yet, and K = decay B + gain X is multiplied. Of
    X^T X, which is symmetric, one of two blocks beside the diagonal is formed: `product_programs`.
    """
    R_BLOCKS: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    PROGRAMS: tl.constexpr = R_BLOCKS * R_BLOCKS if WITH_X else R_BLOCKS * (R_BLOCKS + 1) // 2
    pid = tl.program_id(0)
    item = pid // PROGRAMS
    block = pid % PROGRAMS
    matrix = tl.load(items + item * 2).to(tl.int64)
    chunk = tl.load(items + item * 2 + 1)
    length = size_of(matrices, matrix, Q if RIGHT_SIDE else P)
    if WITH_X:
        i_block = block // R_BLOCKS
        j_block = block % R_BLOCKS
    else:  # blocks on the diagonal and to its right, line by line
        i_block = 0
        for line in tl.static_range(1, R_BLOCKS):
            i_block += (block >= line * R_BLOCKS - line * (line - 1) // 2).to(tl.int32)
        j_block = block - (i_block * R_BLOCKS - i_block * (i_block - 1) // 2) + i_block
    i = i_block * BLOCK_R + tl.arange(0, BLOCK_R)
    j = j_block * BLOCK_R + tl.arange(0, BLOCK_R)
    factor_of = 1.0
    if SCALE:
        size = tl.load(sizes + matrix)
        factor_of = tl.where(size > 0, 1.0 / size, 1.0)
    base, column = factor(matrices, matrix, X, length, RIGHT_SIDE, X_IN_STATE, ALIGNED)
    Y_base = place_in(Y, matrices, matrix, LEFT, B, Y_IN_STATE)
    B_base = base_of(matrices, matrix, B, S_TYPE)
    total = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
    first = chunk * CHUNK
    for start in range(first, tl.minimum(first + CHUNK, length), BLOCK):
        rows = start + tl.arange(0, BLOCK)
        x = tl.load(
            base + (i[:, None] * column + rows[None, :]), mask=(i < R)[:, None] & (rows < column)[None, :], other=0.0
        )
        if FORM:
            x = decay * tl.trans(factor_of_rows(B_base, rows, i, length, R)) + gain * x
        if WITH_X:
            y = tl.load(
                Y_base + (rows[:, None] * R + j[None, :]), mask=(rows < length)[:, None] & (j < R)[None, :], other=0.0
            )
        elif R_BLOCKS == 1:
            y = tl.trans(x)
        else:
            y = tl.trans(
                tl.load(
                    base + (j[:, None] * column + rows[None, :]),
                    mask=(j < R)[:, None] & (rows < column)[None, :],
                    other=0.0,
                )
            )
            if FORM:
                y = decay * factor_of_rows(B_base, rows, j, length, R) + gain * y
        total = tl.dot(x * factor_of, y * factor_of, total, input_precision=PRECISION)
    out = products + (tl.load(starts + matrix) + chunk).to(tl.int64) * R * R
    inside = (i < R)[:, None] & (j < R)[None, :]
    tl.store(out + (i[:, None] * R + j[None, :]), total, mask=inside)
    if not WITH_X:
        beside = (j_block > i_block).to(tl.int32)
        tl.store(out + (i[:, None] + j[None, :] * R), total, mask=(i < R * beside)[:, None] & (j < R)[None, :])


def product_programs(rank: int, block: int, *, with_X: bool) -> int:
    """Programs of `product` for one chunk."""
    blocks = -(-rank // block)
    return blocks * blocks if with_X else blocks * (blocks + 1) // 2


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
    decay,
    gain,
    S_TYPE: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
    OUT: tl.constexpr,
    CHUNK: tl.constexpr,
    RIGHT_SIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    X_IN_STATE: tl.constexpr,
    Y_IN_STATE: tl.constexpr,
    SCALE: tl.constexpr,
    FORM: tl.constexpr,
    GRAM: tl.constexpr,
    CARRY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """X <- X T in place, OUT ranks at once; and of the new X each chunk's X^T X (GRAM) or X^T Y (CARRY), Y (p, R).

    SCALE divides X by ``sizes`` before, without which T might overflow. FORM makes, of G A^T in X's place and of m_B,
    X = decay B + gain G A^T first, and Y = keep B + cross G A^T, which takes m_B's place where Y_IN_STATE.
    """
    item = tl.program_id(0)
    matrix = tl.load(items + item * 2).to(tl.int64)
    chunk = tl.load(items + item * 2 + 1)
    length = size_of(matrices, matrix, Q if RIGHT_SIDE else P)
    base, column = factor(matrices, matrix, X, length, RIGHT_SIDE, X_IN_STATE, ALIGNED)
    row = coefficients + matrix * WIDTH
    on = (tl.load(row + ON) != 0).to(tl.int32)
    # The state stays as it is where the step is not enabled.
    live = column * on if X_IN_STATE else column
    formed = length * on if Y_IN_STATE else length
    scale = 1.0
    if SCALE:
        size = tl.load(sizes + matrix)
        scale = tl.where(size > 0, 1.0 / size, 1.0)
    ranks = tl.arange(0, BLOCK_R)
    Y_base = place_in(Y, matrices, matrix, LEFT, B, Y_IN_STATE)
    B_base = base_of(matrices, matrix, B, S_TYPE)
    T_base = T + matrix * R * R
    if OUT == BLOCK_R:
        t = tl.load(
            T_base + (ranks[None, :] * R + ranks[:, None]), mask=(ranks < R)[:, None] & (ranks < R)[None, :], other=0.0
        )
    first = chunk * CHUNK
    total = tl.zeros((OUT, BLOCK_R), tl.float32)
    for start in range(first, tl.minimum(first + CHUNK, length), BLOCK):
        rows = start + tl.arange(0, BLOCK)
        x = tl.load(
            base + (ranks[:, None] * column + rows[None, :]),
            mask=(ranks < R)[:, None] & (rows < column)[None, :],
            other=0.0,
        )
        if FORM:
            b = tl.trans(factor_of_rows(B_base, rows, ranks, length, R))
            y = tl.load(row + KEEP) * b + tl.load(row + CROSS) * x
            tl.store(
                Y_base + (rows[None, :] * R + ranks[:, None]),
                y,
                mask=(rows < formed)[None, :] & (ranks < R)[:, None],
            )
            x = decay * b + gain * x
        x = x * scale
        for at in range(0, BLOCK_R, OUT):
            out = at + tl.arange(0, OUT)
            if OUT != BLOCK_R:
                t = tl.load(
                    T_base + (ranks[None, :] * R + out[:, None]),
                    mask=(out < R)[:, None] & (ranks < R)[None, :],
                    other=0.0,
                )
            new = tl.dot(t, x, input_precision=PRECISION)
            tl.store(
                base + (out[:, None] * column + rows[None, :]),
                new,
                mask=(out < R)[:, None] & (rows < live)[None, :],
            )
            if GRAM:  # OUT is all ranks then
                total = tl.dot(new, tl.trans(new), total, input_precision=PRECISION)
            if CARRY:
                y = tl.load(
                    Y_base + (rows[:, None] * R + ranks[None, :]),
                    mask=(rows < length)[:, None] & (ranks < R)[None, :],
                    other=0.0,
                )
                total = tl.dot(new, y, total, input_precision=PRECISION)
    if GRAM or CARRY:
        at = products + (tl.load(starts + matrix) + chunk).to(tl.int64) * R * R
        tl.store(at + (ranks[:, None] * R + ranks[None, :]), total, mask=(ranks < R)[:, None] & (ranks < R)[None, :])


@triton.jit
def left_factors(
    matrices,
    items,
    coefficients,
    U,
    X,
    sizes,
    decay,
    gain,
    S_TYPE: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
    SWEEPS: tl.constexpr,
):
    """Of G A^T in ``U``: X = keep B + cross G A^T, with zeros behind its rows, and K = decay B + gain G A^T.

    If SWEEPS, K takes the place of G A^T, in units of its largest element, which is in ``sizes``; else X does, and K is
    the next m_B, where the step is enabled.
    """
    R_BLOCKS: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    item = tl.program_id(0) // R_BLOCKS
    matrix = tl.load(items + item * 2).to(tl.int64)
    tile = tl.load(items + item * 2 + 1)
    p = size_of(matrices, matrix, P)
    row = coefficients + matrix * WIDTH
    rows = tile * BLOCK + tl.arange(0, BLOCK)
    ranks = tl.program_id(0) % R_BLOCKS * BLOCK_R + tl.arange(0, BLOCK_R)
    base, column = factor(matrices, matrix, U, p, False, False)
    B_base = base_of(matrices, matrix, B, S_TYPE)
    X_base = place_in(X, matrices, matrix, LEFT, B, False)
    at = rows[:, None] * R + ranks[None, :]
    inside = (ranks < R)[None, :]
    if SWEEPS:
        U_at = base + (ranks[:, None] * column + rows[None, :])
        U_inside = (ranks < R)[:, None] & (rows < column)[None, :]
        x = tl.trans(tl.load(U_at, mask=U_inside, other=0.0))
    else:
        x = tl.load(base + at, mask=(rows < column)[:, None] & inside, other=0.0)
    b = factor_of_rows(B_base, rows, ranks, p, R)
    tl.store(X_base + at, tl.load(row + KEEP) * b + tl.load(row + CROSS) * x, mask=(rows < column)[:, None] & inside)
    k = decay * b + gain * x
    if SWEEPS:
        size = tl.load(sizes + matrix)
        tl.store(U_at, tl.trans(k / tl.where(size > 0, size, 1.0)), mask=U_inside)
    else:
        live = p * (tl.load(row + ON) != 0).to(tl.int32)
        tl.store(B_base + at, nearest(k, S_TYPE), mask=(rows < live)[:, None] & inside)


@triton.jit
def advance_v_row(matrices, items, coefficients, row_sums, beta2, S_TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """v_row one step on, where that is enabled; for steps that do not `finish`."""
    item = tl.program_id(0)
    matrix = tl.load(items + item * 2).to(tl.int64)
    rows = tl.load(items + item * 2 + 1) * BLOCK + tl.arange(0, BLOCK)
    on = (tl.load(coefficients + matrix * WIDTH + ON) != 0).to(tl.int32)
    live = size_of(matrices, matrix, P) * on
    next_v_row(matrices, matrix, row_sums, beta2, rows, live, size_of(matrices, matrix, Q), S_TYPE)


@triton.jit
def next_v_row(matrices, matrix, row_sums, beta2, rows, live, q, S_TYPE: tl.constexpr):
    """v_row one step on, in those of ``rows`` that are below ``live``."""
    base = base_of(matrices, matrix, V_ROW, S_TYPE)
    inside = rows < live
    old = tl.load(base + rows, mask=inside, other=0.0).to(tl.float32)
    now = tl.load(row_sums + field(matrices, matrix, ROWS) + rows, mask=inside, other=0.0) / q
    tl.store(base + rows, nearest(old + (1.0 - beta2) * (now - old), S_TYPE), mask=inside)


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
    INNER: tl.constexpr,
    L_IN_STATE: tl.constexpr,
    V_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The new state, where the step is enabled: m_A from L^T T, m_B = U R^T with R of L's basis, v_row if V_ROWS.

    T is upper triangular, and so the last ranks come first: where L lies in m_A's place, the others do not need them.
    """
    pid = tl.program_id(0)
    left = pid >= right_programs
    item = tl.where(left, left_items + (pid - right_programs) * 2, right_items + pid * 2)
    matrix = tl.load(item).to(tl.int64)
    tile = tl.load(item + 1)
    p = size_of(matrices, matrix, P)
    q = size_of(matrices, matrix, Q)
    on = (tl.load(coefficients + matrix * WIDTH + ON) != 0).to(tl.int32)
    rows = tile * BLOCK + tl.arange(0, BLOCK)
    length = tl.where(left, p, q)
    left_base, left_column = factor(matrices, matrix, U, p, False, False)
    right_base, right_column = factor(matrices, matrix, L, q, True, L_IN_STATE)
    source = tl.where(left, left_base, right_base)
    column = tl.where(left, left_column, right_column)
    target = tl.where(left, base_of(matrices, matrix, B, S_TYPE), base_of(matrices, matrix, A, S_TYPE))
    factor_of = tl.where(left, triangles, T) + matrix * R * R
    in_stride = tl.where(left, 1, R)
    out_stride = tl.where(left, R, 1)
    inside = rows < length * on
    for before in range(0, BLOCK_R, OUT):
        at = BLOCK_R - OUT - before
        out = at + tl.arange(0, OUT)
        total = tl.zeros((BLOCK, OUT), tl.float32)
        # What is on the diagonal or beside it, where zeros are not.
        for inner in range(tl.where(left, at // INNER * INNER, 0), tl.where(left, BLOCK_R, at + OUT), INNER):
            ranks = inner + tl.arange(0, INNER)
            x = tl.load(
                source + (rows[:, None] + ranks[None, :] * column),
                mask=(rows < length)[:, None] & (ranks < R)[None, :],
                other=0.0,
            )
            t = tl.load(
                factor_of + (ranks[:, None] * in_stride + out[None, :] * out_stride),
                mask=(ranks < R)[:, None] & (out < R)[None, :],
                other=0.0,
            )
            total = tl.dot(x, t, total, input_precision=PRECISION)
        tl.debug_barrier()  # all have read what is overwritten
        new = nearest(total, S_TYPE)
        if left:
            tl.store(target + (rows[:, None] * R + out[None, :]), new, mask=inside[:, None] & (out < R)[None, :])
        else:
            tl.store(target + (rows[:, None] + out[None, :] * q), new, mask=inside[:, None] & (out < R)[None, :])
    if V_ROWS:
        next_v_row(matrices, matrix, row_sums, beta2, rows, tl.where(left, p * on, 0), q, S_TYPE)
