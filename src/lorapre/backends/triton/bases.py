"""Orthonormal bases by Cholesky QR, of the factors of matrices of several shapes at once. Imports triton.

The same as `lorapre.subspace.orthonormalize` with three passes in float32. A factor X is (length, R), its columns one
after the other: the left one, K, in scratch; the right one, the transpose of L (R, q), in scratch or in the place of
m_A. It is taken in chunks of rows; products of two factors come as one (R, R) matrix a chunk, which whoever needs their
sum adds up.
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
    lines_of,
    nearest,
    place_in,
    size_of,
)

#: Shorter columns than this, after the matrix's largest element is 1, are zero.
_TINY = tl.constexpr(2.0**-63)
#: Square of a column of E at most, for which what E^2 adds to the factor of I + E is lost in rounding.
_NEAR = tl.constexpr(2.0**-24)


@triton.jit
def factor(matrices, matrix, scratch, length, RIGHT_SIDE: tl.constexpr, IN_STATE: tl.constexpr):
    """Where a factor begins, the distance of its columns, and the rows that may be read: behind K's are zeros."""
    if RIGHT_SIDE:
        base = place_in(scratch, matrices, matrix, RIGHT, A, IN_STATE)
        column = length
    else:
        base = scratch + field(matrices, matrix, LEFT) // 16 * 16
        column = lines_of(length)
    return base, column


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
    WITH_X: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """X^T X of each chunk, or X^T Y with the update's X (p, R) for Y where WITH_X.

    Where SCALE, of X divided by ``sizes``, which of the left side the parts give.
    """
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
    base, column = factor(matrices, matrix, X, length, RIGHT_SIDE, X_IN_STATE)
    Y_base = place_in(Y, matrices, matrix, LEFT, B, Y_IN_STATE)
    total = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
    first = chunk * CHUNK
    for start in range(first, tl.minimum(first + CHUNK, length), BLOCK):
        rows = start + tl.arange(0, BLOCK)
        x = tl.load(
            base + (i[:, None] * column + rows[None, :]), mask=(i < R)[:, None] & (rows < column)[None, :], other=0.0
        )
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
        total = tl.dot(x * factor_of, y * factor_of, total, input_precision=PRECISION)
    out = products + (tl.load(starts + matrix) + chunk).to(tl.int64) * R * R
    tl.store(out + (i[:, None] * R + j[None, :]), total, mask=(i < R)[:, None] & (j < R)[None, :])


@triton.jit
def inverse_cholesky(
    products,
    starts,
    sizes,
    T,
    triangles,
    lower,
    shift,
    R: tl.constexpr,
    WIDTH_OF_R: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """T (n, R, R) such that X T has orthonormal columns, from the chunks of X^T X; one matrix a program.

    The columns are scaled to length 1 and ``shift`` is added to the diagonal first. LAST leaves a matrix that has no
    decomposition as it is. ``triangles`` becomes the factor of what the first pass was given: it is Q times this.
    ``lower`` (n, R, R) is scratch. Blocks of BLOCK columns: only what lies on the diagonal is decomposed number by
    number; and where S is the identity but for a few millionths of a part, as it is in the last pass, not even that.
    """
    BLOCKS: tl.constexpr = (R + BLOCK - 1) // BLOCK
    matrix = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    wide = tl.arange(0, WIDTH_OF_R)
    first = tl.load(starts + matrix)
    last = tl.load(starts + matrix + 1)
    chunks = products + first.to(tl.int64) * R * R
    L = lower + matrix * R * R
    T_base = T + matrix * R * R
    length = tl.zeros((WIDTH_OF_R,), tl.float32)
    for chunk in range(0, last - first):
        length += tl.load(chunks + (chunk * R * R + wide * (R + 1)), mask=wide < R, other=0.0)
    length = tl.sqrt(length)
    scale = tl.where(length > _TINY, 1.0 / tl.maximum(length, _TINY), 0.0)

    # S, block row by block row, to L.
    far = 0.0
    for block in range(0, BLOCKS):
        rows = block * BLOCK + i
        at = rows[:, None] * R + wide[None, :]
        inside = (rows < R)[:, None] & (wide < R)[None, :]
        S = tl.zeros((BLOCK, WIDTH_OF_R), tl.float32)
        for chunk in range(0, last - first):
            S += tl.load(chunks + (chunk * R * R + at), mask=inside, other=0.0)
        diagonal = rows[:, None] == wide[None, :]
        own = tl.sum(tl.where(diagonal, scale[None, :], 0.0), axis=1)
        S = S * own[:, None] * scale[None, :] + tl.where(diagonal, shift, 0.0)
        far = tl.maximum(far, tl.max(tl.max(tl.abs(S - tl.where(diagonal & inside, 1.0, 0.0)), axis=1), axis=0))
        tl.store(L + at, S, mask=inside)
    tl.debug_barrier()

    works = 1
    if far * far * R < _NEAR:
        # Of I + E the factor is I + half of E's diagonal + what is below it, up to E^2.
        for block in range(0, BLOCKS):
            rows = block * BLOCK + i
            at = rows[:, None] * R + wide[None, :]
            inside = (rows < R)[:, None] & (wide < R)[None, :]
            E = tl.load(L + at, mask=inside, other=0.0) - tl.where(rows[:, None] == wide[None, :], 1.0, 0.0)
            E = tl.where(rows[:, None] > wide[None, :], E, tl.where(rows[:, None] == wide[None, :], 0.5 * E, 0.0))
            one = tl.where(rows[:, None] == wide[None, :], 1.0, 0.0)
            tl.store(L + at, one + E, mask=inside)
            tl.store(T_base + (wide[None, :] * R + rows[:, None]), (one - E) * scale[None, :], mask=inside)
    else:
        for block in range(0, BLOCKS):
            rows = block * BLOCK + i
            square = rows[:, None] * R + rows[None, :]
            in_square = (rows < R)[:, None] & (rows < R)[None, :]
            at = rows[:, None] * R + wide[None, :]
            inside = (rows < R)[:, None] & (wide < R)[None, :]
            eye = i[:, None] == i[None, :]
            S = tl.load(L + square, mask=in_square, other=0.0)
            # Rows of the inverse: this block's, of which what stands left of the diagonal follows from those above.
            row = tl.zeros((BLOCK, WIDTH_OF_R), tl.float32)
            # What is below this block's diagonal, in its columns.
            panel = tl.load(
                L + (wide[:, None] * R + rows[None, :]),
                mask=(wide < R)[:, None] & (wide >= block * BLOCK + BLOCK)[:, None] & (rows < R)[None, :],
                other=0.0,
            )
            for before in range(0, block):
                inner = before * BLOCK + i
                left = tl.load(
                    L + (rows[:, None] * R + inner[None, :]), mask=(rows < R)[:, None] & (inner < R)[None, :], other=0.0
                )
                done = tl.load(
                    T_base + (wide[None, :] * R + inner[:, None]),
                    mask=(inner < R)[:, None] & (wide < R)[None, :],
                    other=0.0,
                )
                below = tl.load(
                    L + (wide[:, None] * R + inner[None, :]),
                    mask=(wide < R)[:, None] & (wide >= block * BLOCK + BLOCK)[:, None] & (inner < R)[None, :],
                    other=0.0,
                )
                S -= tl.dot(left, tl.trans(left), input_precision=PRECISION)
                row -= tl.dot(left, done, input_precision=PRECISION)
                panel -= tl.dot(below, tl.trans(left), input_precision=PRECISION)
            S += tl.where(eye & (rows >= R)[:, None], 1.0, 0.0)
            # Column by column, and at once what turns it into the identity: its inverse.
            inverse = tl.where(eye, 1.0, 0.0)
            own = tl.zeros((BLOCK, BLOCK), tl.float32)
            for k in range(0, tl.minimum(BLOCK, R - block * BLOCK)):
                here = i == k
                column = tl.sum(tl.where(here[None, :], S, 0.0), axis=1)
                pivot = tl.sum(tl.where(here, column, 0.0), axis=0)
                works = works & (pivot > 0).to(tl.int32)
                root = 1.0 / tl.sqrt(tl.maximum(pivot, _TINY))
                column = tl.where(i >= k, column * root, 0.0)
                line = tl.sum(tl.where(here[:, None], inverse, 0.0), axis=0) * root
                S -= column[:, None] * column[None, :]
                under = tl.where(i > k, column, 0.0)
                own = tl.where(here[None, :], column[:, None], own)
                inverse = tl.where(here[:, None], line[None, :], inverse - under[:, None] * line[None, :])
            row += tl.where(rows[:, None] == wide[None, :], scale[None, :], 0.0)
            row = tl.dot(inverse, row, input_precision=PRECISION)
            panel = tl.dot(panel, tl.trans(inverse), input_precision=PRECISION)
            tl.debug_barrier()
            tl.store(L + (wide[:, None] * R + rows[None, :]), panel, mask=(wide < R)[:, None] & (rows < R)[None, :])
            tl.debug_barrier()
            tl.store(L + square, own, mask=in_square)
            tl.store(T_base + (wide[None, :] * R + rows[:, None]), row, mask=inside)
            tl.debug_barrier()
    keep = works  # what has no decomposition counts only in the last pass
    if not LAST:
        keep = 1
    if keep == 0:
        tl.debug_barrier()
        for block in range(0, BLOCKS):
            rows = block * BLOCK + i
            one = tl.where(rows[:, None] == wide[None, :], 1.0, 0.0)
            tl.store(T_base + (rows[:, None] * R + wide[None, :]), one, mask=(rows < R)[:, None] & (wide < R)[None, :])
    tl.debug_barrier()

    # The triangle L^T D of this pass, times that of the passes before it; row by row, of which later rows read none.
    size = 1.0
    if FIRST:
        size = tl.load(sizes + matrix)
        size = tl.where(size > 0, size, 1.0)  # by which `apply` divides what it is given
    before_base = triangles + matrix * R * R
    length = tl.where(length > _TINY, length, 0.0) * size
    for block in range(0, BLOCKS):
        rows = block * BLOCK + i
        at = rows[:, None] * R + wide[None, :]
        inside = (rows < R)[:, None] & (wide < R)[None, :]
        if FIRST:
            upper = tl.load(L + (wide[None, :] * R + rows[:, None]), mask=inside, other=0.0)
            total = tl.where(rows[:, None] <= wide[None, :], upper * length[None, :], 0.0)
        else:
            total = tl.zeros((BLOCK, WIDTH_OF_R), tl.float32)
            for other in range(block, BLOCKS):
                inner = other * BLOCK + i
                upper = tl.load(
                    L + (inner[None, :] * R + rows[:, None]), mask=(rows < R)[:, None] & (inner < R)[None, :], other=0.0
                )
                upper = tl.where(rows[:, None] <= inner[None, :], upper, 0.0)
                old = tl.load(
                    before_base + (inner[:, None] * R + wide[None, :]),
                    mask=(inner < R)[:, None] & (wide < R)[None, :],
                    other=0.0,
                )
                own = tl.sum(tl.where(inner[:, None] == wide[None, :], length[None, :], 0.0), axis=1)
                total += tl.dot(upper, old * own[:, None], input_precision=PRECISION)
        tl.store(before_base + at, total, mask=inside & (keep != 0))
        tl.debug_barrier()


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
    """X <- X T in place, OUT ranks at once; and of the new X each chunk's X^T X (GRAM) or X^T Y (CARRY), Y (p, R).

    SCALE divides X by ``sizes`` before, without which T might overflow.
    """
    item = tl.program_id(0)
    matrix = tl.load(items + item * 2).to(tl.int64)
    chunk = tl.load(items + item * 2 + 1)
    length = size_of(matrices, matrix, Q if RIGHT_SIDE else P)
    base, column = factor(matrices, matrix, X, length, RIGHT_SIDE, X_IN_STATE)
    live = column
    if X_IN_STATE:  # which stays as it is where the step is not enabled
        live = column * (tl.load(coefficients + matrix * WIDTH + ON) != 0).to(tl.int32)
    scale = 1.0
    if SCALE:
        size = tl.load(sizes + matrix)
        scale = tl.where(size > 0, 1.0 / size, 1.0)
    ranks = tl.arange(0, BLOCK_R)
    Y_base = place_in(Y, matrices, matrix, LEFT, B, Y_IN_STATE)
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
        x = x * scale
        for at in tl.static_range(0, BLOCK_R, OUT):
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
    left_base, left_column = factor(matrices, matrix, U, p, False, False)
    right_base, right_column = factor(matrices, matrix, L, q, True, L_IN_STATE)
    source = tl.where(left, left_base, right_base)
    column = tl.where(left, left_column, right_column)
    target = tl.where(left, base_of(matrices, matrix, B, S_TYPE), base_of(matrices, matrix, A, S_TYPE))
    factor_of = tl.where(left, triangles, T) + matrix * R * R
    in_stride = tl.where(left, 1, R)
    out_stride = tl.where(left, R, 1)
    x = tl.load(
        source + (rows[:, None] + ranks[None, :] * column),
        mask=(rows < length)[:, None] & (ranks < R)[None, :],
        other=0.0,
    )
    inside = rows < length * on
    for at in tl.static_range(0, BLOCK_R, OUT):
        out = at + tl.arange(0, OUT)
        t = tl.load(
            factor_of + (ranks[:, None] * in_stride + out[None, :] * out_stride),
            mask=(ranks < R)[:, None] & (out < R)[None, :],
            other=0.0,
        )
        new = nearest(tl.dot(x, t, input_precision=PRECISION), S_TYPE)
        if left:
            tl.store(target + (rows[:, None] * R + out[None, :]), new, mask=inside[:, None] & (out < R)[None, :])
        else:
            tl.store(target + (rows[:, None] + out[None, :] * q), new, mask=inside[:, None] & (out < R)[None, :])
    base = base_of(matrices, matrix, V_ROW, S_TYPE)
    inside = rows < tl.where(left, p * on, 0)
    old = tl.load(base + rows, mask=inside, other=0.0).to(tl.float32)
    now = tl.load(row_sums + field(matrices, matrix, ROWS) + rows, mask=inside, other=0.0) / q
    tl.store(base + rows, nearest(old + (1.0 - beta2) * (now - old), S_TYPE), mask=inside)
