"""What turns a factor into an orthonormal basis: the inverse Cholesky factor of its Gram matrix. Imports triton."""

# Triton's decorators and types are untyped where they are not missing (other platforms than Linux).
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

#: Shorter columns than this, after the matrix's largest element is 1, are zero.
_TINY = tl.constexpr(2.0**-63)
#: Square of a column of E at most, for which what E^2 adds to the factor of I + E is lost in rounding.
_NEAR = tl.constexpr(2.0**-24)


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
        tl.debug_barrier()  # all have read what is overwritten
        tl.store(before_base + at, total, mask=inside & (keep != 0))
        tl.debug_barrier()
