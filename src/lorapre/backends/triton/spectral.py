"""The sketch of the update that says by how much it is divided, equation (15): `lorapre.spectral`. Imports triton.

The update's numerator is outside G + X A, so that its sketch needs no product of its own size: the first pass takes
G S along, A S comes with that pass's sums, and X A S is a product of thin matrices.
"""

# Triton's decorators and types are untyped where they are not missing (other platforms than Linux).
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from lorapre import spectral
from lorapre.backends.triton.elements import (
    LEFT,
    OUTSIDE,
    ROWS,
    V_COL,
    V_ROW,
    V_SCALE,
    WIDTH,
    A,
    B,
    P,
    Q,
    base_of,
    field,
    mean_of,
    place_in,
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
def totals(
    matrices,
    parts,
    starts,
    sums,
    surprises,
    sizes,
    rights,
    S_TYPE: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`lorapre.backends.triton.elements.totals`, and A S to ``rights`` (n, R, 16). One matrix a program."""
    matrix = tl.program_id(0).to(tl.int64)
    sums_of(parts, starts, sums, surprises, sizes, matrix, PARTS)
    q = size_of(matrices, matrix, Q)
    col_base = base_of(matrices, matrix, V_COL, S_TYPE)
    A_base = base_of(matrices, matrix, A, S_TYPE)
    mean = mean_of(col_base, q, 512)
    for first in range(0, R, BLOCK_R):
        ranks = first + tl.arange(0, BLOCK_R)
        total = tl.zeros((BLOCK_R, K), tl.float32)
        for start in range(0, q, BLOCK_Q):
            cols = start + tl.arange(0, BLOCK_Q)
            a = tl.load(
                A_base + (ranks[:, None] * q + cols[None, :]),
                mask=(ranks < R)[:, None] & (cols < q)[None, :],
                other=0.0,
            ).to(tl.float32)
            v_col = tl.load(col_base + cols, mask=cols < q, other=0.0).to(tl.float32)
            total = tl.dot(a, scaled_signs(cols, v_col, mean), total, input_precision=PRECISION)
        there = (matrix * R + ranks[:, None]) * K + tl.arange(0, K)[None, :]
        tl.store(rights + there, total, mask=(ranks < R)[:, None])


@triton.jit
def divide(
    matrices,
    coefficients,
    sketches,
    rights,
    X,
    row_sums,
    surprises,
    beta2,
    clipping,
    S_TYPE: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CLIP: tl.constexpr,
    X_IN_STATE: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What the square root of ``surprises`` over the number of elements has to divide the update by, in its place.

    Until then that was the RMS of G / sqrt(v_hat), if CLIP. ``sketches`` (p, 16) of each matrix are G S, to which
    X A S / outside has been added if WHOLE, and ``clipping`` is the largest singular value allowed, in units of
    sqrt(p) + sqrt(q). One matrix a program.
    """
    matrix = tl.program_id(0).to(tl.int64)
    p = size_of(matrices, matrix, P)
    q = size_of(matrices, matrix, Q)
    row = coefficients + matrix * WIDTH
    outside = tl.load(row + OUTSIDE)
    v_scale = tl.load(row + V_SCALE)
    row_base = base_of(matrices, matrix, V_ROW, S_TYPE)
    X_base = place_in(X, matrices, matrix, LEFT, B, X_IN_STATE)
    first_row = field(matrices, matrix, ROWS)
    k = tl.arange(0, K)
    products = tl.zeros((K, K), tl.float32)
    for start in range(0, p, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        inside = rows < p
        sketch = outside * tl.load(
            sketches + ((first_row + rows)[:, None] * K + k[None, :]), mask=inside[:, None], other=0.0
        )
        if not WHOLE:
            for first in range(0, R, BLOCK_R):
                ranks = first + tl.arange(0, BLOCK_R)
                x = tl.load(
                    X_base + (rows[:, None] * R + ranks[None, :]),
                    mask=inside[:, None] & (ranks < R)[None, :],
                    other=0.0,
                )
                right = tl.load(
                    rights + ((matrix * R + ranks[:, None]) * K + k[None, :]), mask=(ranks < R)[:, None], other=0.0
                )
                sketch = tl.dot(x, right, sketch, input_precision=PRECISION)
        old = tl.load(row_base + rows, mask=inside, other=0.0).to(tl.float32)
        now = tl.load(row_sums + first_row + rows, mask=inside, other=0.0) / q
        mean_square = (old + (1.0 - beta2) * (now - old)) * v_scale
        scale = tl.where(mean_square > 0, tl.rsqrt(tl.where(mean_square > 0, mean_square, 1.0)), 0.0)
        sketch = sketch * scale[:, None]
        products = tl.dot(tl.trans(sketch), sketch, products, input_precision=PRECISION)
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
