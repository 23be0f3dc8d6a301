"""The sketch of the update that says by how much it is divided, equation (15): `lorapre.spectral`. Imports triton.

The update's numerator is outside G + X A, so that its sketch needs no product of its own size: S and A S are made
before the first pass, which takes G S along and has X A S at its end, a product of thin matrices.
"""

# Triton's decorators and types are untyped where they are not missing (other platforms than Linux).
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from lorapre import spectral
from lorapre.backends.triton.elements import (
    LINES,
    OUTSIDE,
    ROWS,
    V_COL,
    V_ROW,
    V_SCALE,
    WIDTH,
    A,
    P,
    Q,
    base_of,
    field,
    lines_of,
    mean_of,
    size_of,
    sums_of,
)

K = tl.constexpr(spectral.COLUMNS)
_LEAST = tl.constexpr(spectral.LEAST_COLUMN)
_FIRST = tl.constexpr(spectral.FIRST_MULTIPLIER)
_SECOND = tl.constexpr(spectral.SECOND_MULTIPLIER)


@triton.jit
def scaled_signs(cols, v_col, mean):
    """S in these rows, (cols, 16): random signs over the root of the columns' mean squares in units of their mean."""
    x = cols.to(tl.uint32)
    x = (x ^ (x >> 16)) * _FIRST
    x = (x ^ (x >> 13)) * _SECOND
    x = x ^ (x >> 16)
    sign = x[:, None] << (31 - tl.arange(0, K)[None, :]).to(tl.uint32) & 0x80000000
    # Once for all columns: v_col / mean, and 1 where that is 0.
    inverse = tl.where(mean > 0, 1.0 / tl.where(mean > 0, mean, 1.0), 0.0)
    none = (mean <= 0).to(tl.float32)
    size = tl.rsqrt(tl.maximum(v_col * inverse + none, _LEAST)).to(tl.uint32, bitcast=True)
    return (size[:, None] ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def signs(
    matrices,
    items,
    S,
    rights,
    size,
    S_TYPE: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`scaled_signs` of ``size`` columns to ``S``, (16, q up to `lines_of`) of each matrix, with zeros behind q; and of
    these columns A S to ``rights``, (R, 16) of each chunk. The rank block is the fastest index of the grid.
    """
    R_BLOCKS: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    item = tl.program_id(0) // R_BLOCKS
    r_block = tl.program_id(0) % R_BLOCKS
    matrix = tl.load(items + item * 2).to(tl.int64)
    chunk = tl.load(items + item * 2 + 1)
    q = size_of(matrices, matrix, Q)
    col_base = base_of(matrices, matrix, V_COL, S_TYPE)
    A_base = base_of(matrices, matrix, A, S_TYPE)
    mean = mean_of(col_base, q, 512)
    ranks = r_block * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, K)
    line = lines_of(q)
    S_base = S + field(matrices, matrix, LINES) // 16 * 16 * K
    stored = line * (r_block == 0).to(tl.int32)
    total = tl.zeros((BLOCK_R, K), tl.float32)
    first = chunk * size
    for start in range(first, tl.minimum(first + size, line), BLOCK_Q):
        cols = start + tl.arange(0, BLOCK_Q)
        a = tl.load(
            A_base + (ranks[:, None] * q + cols[None, :]), mask=(ranks < R)[:, None] & (cols < q)[None, :], other=0.0
        ).to(tl.float32)
        v_col = tl.load(col_base + cols, mask=cols < q, other=0.0).to(tl.float32)
        sign = tl.where((cols < q)[:, None], scaled_signs(cols, v_col, mean), 0.0)
        tl.store(S_base + (k[None, :] * line + cols[:, None]), sign, mask=(cols < stored)[:, None])
        total = tl.dot(a, sign, total, input_precision=PRECISION)
    place = rights + (item * R + ranks[:, None]) * K + k[None, :]
    tl.store(place, total, mask=(ranks < R)[:, None])


@triton.jit
def by_rows(sketch, v_row, rows, p, mean_squares, beta2, v_scale):
    """``sketch`` of these rows over the roots of their new mean squares in v, of G^2 ``mean_squares``."""
    old = tl.load(v_row + rows, mask=rows < p, other=0.0).to(tl.float32)
    new = (old + (1.0 - beta2) * (mean_squares - old)) * v_scale
    scale = tl.where(new > 0, tl.rsqrt(tl.where(new > 0, new, 1.0)), 0.0)
    return sketch * scale[:, None]


@triton.jit
def judge(matrices, surprises, matrix, products, clipping, CLIP: tl.constexpr):
    """To ``surprises`` the square of what has to divide the update, times its number of elements, from Y^T Y: see
    `spectral.norm`. CLIP: where it is larger than what is there.
    """
    p = size_of(matrices, matrix, P)
    q = size_of(matrices, matrix, Q)
    k = tl.arange(0, K)
    own = k[:, None] == k[None, :]
    squares = tl.sum(tl.sum(tl.where(own, products, 0.0), axis=1), axis=0) / K
    off = tl.sum(tl.sum(tl.where(own, 0.0, products * products), axis=1), axis=0) / (K * (K - 1))
    height, width = p.to(tl.float32), q.to(tl.float32)
    fourth = tl.maximum(off - squares * squares * ((height + width) / (height * width)), 0.0)
    limit = clipping * (tl.sqrt(height) + tl.sqrt(width))
    needed = height * width * tl.sqrt(fourth) / (limit * limit)
    if CLIP:
        needed = tl.maximum(needed, tl.load(surprises + matrix))
    tl.store(surprises + matrix, needed)


@triton.jit
def totals(
    matrices, parts, starts, sums, surprises, sizes, sketches, clipping, PARTS: tl.constexpr, CLIP: tl.constexpr
):
    """`lorapre.backends.triton.elements.totals`, and then `judge`.

    ``sketches`` are Y^T Y of the first pass's tiles, and ``clipping`` is the largest singular value allowed, in units
    of sqrt(p) + sqrt(q). One matrix a program.
    """
    matrix = tl.program_id(0).to(tl.int64)
    sums_of(parts, starts, sums, surprises, sizes, matrix, PARTS)
    k = tl.arange(0, K)
    products = tl.zeros((K, K), tl.float32)
    first = tl.load(starts + matrix)
    place = sketches + first.to(tl.int64) * (K * K) + (k[:, None] * K + k[None, :])
    for _ in range(first, tl.load(starts + matrix + 1)):
        products += tl.load(place)
        place += K * K
    judge(matrices, surprises, matrix, products, clipping, CLIP)


@triton.jit
def divide(
    matrices,
    coefficients,
    sketches,
    row_sums,
    surprises,
    beta2,
    clipping,
    S_TYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CLIP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`judge` from sketches of whole updates over outside, (p, 16) of each matrix, one a program."""
    matrix = tl.program_id(0).to(tl.int64)
    p = size_of(matrices, matrix, P)
    q = size_of(matrices, matrix, Q)
    row = coefficients + matrix * WIDTH
    outside = tl.load(row + OUTSIDE)
    v_scale = tl.load(row + V_SCALE)
    row_base = base_of(matrices, matrix, V_ROW, S_TYPE)
    first_row = field(matrices, matrix, ROWS)
    k = tl.arange(0, K)
    products = tl.zeros((K, K), tl.float32)
    for start in range(0, p, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        inside = rows < p
        sketch = tl.load(sketches + ((first_row + rows)[:, None] * K + k[None, :]), mask=inside[:, None], other=0.0)
        now = tl.load(row_sums + first_row + rows, mask=inside, other=0.0) / q
        y = by_rows(outside * sketch, row_base, rows, p, now, beta2, v_scale)
        products = tl.dot(tl.trans(y), y, products, input_precision=PRECISION)
    judge(matrices, surprises, matrix, products, clipping, CLIP)
