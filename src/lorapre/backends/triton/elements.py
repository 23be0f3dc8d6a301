"""What the kernels share: where a matrix is, rounding; and the element-wise kernels.

``coefficients`` is an (n, 8) float32 table with one row a matrix, columns as in `ON` to `STEP`; ``matrices`` is the
table of `lorapre.backends.triton.layout`.
"""

# Triton's decorators and types are untyped where they are not missing (other platforms than Linux).
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from lorapre.backends.triton import layout

#: Columns of the coefficients: whether the step is enabled (0 or 1), the weights of B A, of P(G) beyond that of
#: G - P(G), and of G - P(G) itself, 1 / (bias correction of v), lr * scale, 1 - lr * weight decay, step number.
ON = tl.constexpr(0)
KEEP = tl.constexpr(1)
CROSS = tl.constexpr(2)
OUTSIDE = tl.constexpr(3)
V_SCALE = tl.constexpr(4)
RATE = tl.constexpr(5)
DECAY = tl.constexpr(6)
STEP = tl.constexpr(7)
COLUMNS = 8
WIDTH = tl.constexpr(COLUMNS)

W = tl.constexpr(layout.W)
G = tl.constexpr(layout.G)
B = tl.constexpr(layout.B)
A = tl.constexpr(layout.A)
V_ROW = tl.constexpr(layout.V_ROW)
V_COL = tl.constexpr(layout.V_COL)
P = tl.constexpr(layout.P)
Q = tl.constexpr(layout.Q)
W_ROW = tl.constexpr(layout.W_ROW)
W_COL = tl.constexpr(layout.W_COL)
G_ROW = tl.constexpr(layout.G_ROW)
G_COL = tl.constexpr(layout.G_COL)
LEFT = tl.constexpr(layout.LEFT)
RIGHT = tl.constexpr(layout.RIGHT)
ROWS = tl.constexpr(layout.ROWS)
COLS = tl.constexpr(layout.COLS)
NUMBER = tl.constexpr(layout.NUMBER)
STREAM = tl.constexpr(layout.STREAM)
FULL_ROW = tl.constexpr(layout.FULL_ROW)
FULL_COL = tl.constexpr(layout.FULL_COL)
LINES = tl.constexpr(layout.LINES)
_FIELDS = tl.constexpr(layout.COLUMNS)

ROWS_ALIGNED = tl.constexpr(layout.ROWS_ALIGNED)
COLUMNS_ALIGNED = tl.constexpr(layout.COLUMNS_ALIGNED)
IN_ROWS = tl.constexpr(layout.IN_ROWS)
IN_COLUMNS = tl.constexpr(layout.IN_COLUMNS)

#: Smallest normal float32, what `torch.finfo` calls tiny.
TINY = tl.constexpr(2.0**-126)

#: What a program of the first pass leaves of its rows: sum of G^2, sum of G^2 / v_hat, largest |K|.
PART = tl.constexpr(3)


@triton.jit
def field(matrices, matrix, column):
    return tl.load(matrices + matrix * _FIELDS + column)


@triton.jit
def size_of(matrices, matrix, column):
    return field(matrices, matrix, column).to(tl.int32)


@triton.jit
def base_of(matrices, matrix, column, dtype: tl.constexpr, ALIGNED: tl.constexpr = False):
    """ALIGNED: it is a multiple of 16 bytes."""
    base = field(matrices, matrix, column).to(tl.pointer_type(dtype))
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    return base


@triton.jit
def lines_of(p):
    """`layout.lines`: what is as long in scratch begins at a multiple of 16 bytes."""
    return (p + 15) // 16 * 16


@triton.jit
def place_in(
    scratch,
    matrices,
    matrix,
    scratch_column,
    state_column,
    IN_STATE: tl.constexpr,
    ALIGNED: tl.constexpr = False,
):
    """Where a float32 factor of a matrix is: in its state, ALIGNED or not, or in scratch."""
    if IN_STATE:
        base = base_of(matrices, matrix, state_column, tl.float32, ALIGNED)
    else:
        base = scratch + field(matrices, matrix, scratch_column) // 16 * 16
    return base


# Two hints decide how wide the memory is read: which numbers are neighbours, and that masks are uniform over them.
# The compiler forgets a `tl.multiple_of` on an argument of a function when it is inlined, and so lengths are rounded
# down to what they are multiples of anyway.


@triton.jit
def whole(size, ORDER: tl.constexpr, ALIGNED: tl.constexpr):
    """``size`` as a visible multiple of 8 where ORDER is ALIGNED."""
    if ORDER == ALIGNED:
        size = size // 8 * 8
    return size


@triton.jit
def tile_of(base, rows, cols, row_stride, col_stride, ORDER: tl.constexpr):
    """Addresses of rows x cols."""
    if (ORDER == ROWS_ALIGNED) | (ORDER == IN_ROWS):
        addresses = base + (rows[:, None] * whole(row_stride, ORDER, ROWS_ALIGNED) + cols[None, :])
    elif (ORDER == COLUMNS_ALIGNED) | (ORDER == IN_COLUMNS):
        addresses = base + (rows[:, None] + cols[None, :] * whole(col_stride, ORDER, COLUMNS_ALIGNED))
    else:
        addresses = base + (rows[:, None] * row_stride + cols[None, :] * col_stride)
    return addresses


@triton.jit
def laid_out_as(x, loaded):
    """``x``, what a product leaves, dealt out to the threads as the tile ``loaded`` is.

    Of two operands that are dealt out differently Triton moves one through shared memory, and goes on like the other. A
    product's numbers are so spread that reading G likewise, and moving W there and back, costs more than all else. A
    condition that always holds, which only the last of the compilers sees, has it move the product instead, once. The
    load has to come after the product in the text: of an operation's two layouts the one of the later counts.
    """
    bits: tl.constexpr = tl.int32 if loaded.dtype == tl.float32 else tl.int16
    return tl.where((loaded.to(bits, bitcast=True) | 1) != 0, x, 0.0)


@triton.jit
def mean_of(base, length, BLOCK: tl.constexpr):
    """The mean of ``length`` numbers, float32; 1 where it is 0, by which nothing is then divided."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(base + at, mask=at < length, other=0.0).to(tl.float32)
    return tl.sum(total, axis=0) / length


@triton.jit
def sum_of_parts(parts, first, last, column, STRIDE: tl.constexpr):
    total = tl.zeros((128,), tl.float32)
    for start in range(first, last, 128):
        at = start + tl.arange(0, 128)
        total += tl.load(parts + at.to(tl.int64) * STRIDE + column, mask=at < last, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def totals(parts, starts, sums, surprises, sizes, PARTS: tl.constexpr):
    """Of what the first pass left of a matrix, in PARTS blocks of ranks: ``sums`` (n) of G^2, ``surprises`` (n), which
    are those of G^2 / v_hat, and the largest |K| to ``sizes`` (n). One matrix a program.
    """
    sums_of(parts, starts, sums, surprises, sizes, tl.program_id(0), PARTS)


@triton.jit
def sums_of(parts, starts, sums, surprises, sizes, matrix, PARTS: tl.constexpr):
    """`totals` of one matrix."""
    first = tl.load(starts + matrix)
    last = tl.load(starts + matrix + 1)
    tl.store(sums + matrix, sum_of_parts(parts, first, last, 0, PARTS * PART))
    tl.store(surprises + matrix, sum_of_parts(parts, first, last, 1, PARTS * PART))
    largest = tl.zeros((128,), tl.float32)
    for start in range(first * PARTS, last * PARTS, 128):
        at = start + tl.arange(0, 128)
        largest = tl.maximum(largest, tl.load(parts + at.to(tl.int64) * PART + 2, mask=at < last * PARTS, other=0.0))
    tl.store(sizes + matrix, tl.max(largest, axis=0))


@triton.jit
def cut(x, noise):
    """float32 to bfloat16: ``noise``, 16 bits or what rounds to nearest even, is added below the last bit kept."""
    bits = x.to(tl.int32, bitcast=True)
    # The noise may carry into the exponent, as it must, but not out of infinity or nan.
    special = (bits & 0x7F800000) == 0x7F800000
    upper = tl.where(special, bits | (((bits & 0xFFFF) != 0).to(tl.int32) << 16), bits + noise) >> 16
    return upper.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def nearest(x, dtype: tl.constexpr):
    if dtype == tl.bfloat16:  # noqa: SIM108 (compiled: both values of a ternary would have to be of one type)
        # By hand: the interpreter's own conversion cuts.
        rounded = cut(x, 0x7FFF + ((x.to(tl.int32, bitcast=True) >> 16) & 1))
    else:
        rounded = x.to(dtype)
    return rounded


@triton.jit
def rounded(
    w, seed, matrices, matrix, coefficients, rows, cols, q, W_TYPE: tl.constexpr, STOCHASTIC: tl.constexpr,
    ROUNDS: tl.constexpr,
):  # fmt: skip
    """New weights of these rows and columns in their dtype: to nearest, or STOCHASTIC, drawn for each element."""
    if STOCHASTIC:
        element = (rows[:, None] * q + cols[None, :]).to(tl.uint32)
        zero = element * 0
        counter = zero + tl.load(coefficients + matrix * WIDTH + STEP).to(tl.uint32)
        number = zero + field(matrices, matrix, NUMBER).to(tl.uint32)
        stream = zero + field(matrices, matrix, STREAM).to(tl.uint32)
        bits, _, _, _ = tl.philox(seed, element, number, counter, stream, ROUNDS)
        new = cut(w, (bits >> 16).to(tl.int32))
    else:
        new = nearest(w, W_TYPE)
    return new


@triton.jit
def fill(coefficients, enabled, keep, cross, outside, v_scale, rate, decay, step, n, MASKED: tl.constexpr):
    """One row of coefficients for all ``n`` matrices, from the host's numbers; ``enabled`` is one byte if MASKED."""
    row = tl.program_id(0) * 128 + tl.arange(0, 128)
    inside = row < n
    at = coefficients + row * WIDTH
    on = 1.0
    if MASKED:
        on = (tl.load(enabled) != 0).to(tl.float32)
    tl.store(at + ON, tl.zeros((128,), tl.float32) + on, mask=inside)
    tl.store(at + KEEP, tl.zeros((128,), tl.float32) + keep, mask=inside)
    tl.store(at + CROSS, tl.zeros((128,), tl.float32) + cross, mask=inside)
    tl.store(at + OUTSIDE, tl.zeros((128,), tl.float32) + outside, mask=inside)
    tl.store(at + V_SCALE, tl.zeros((128,), tl.float32) + v_scale, mask=inside)
    tl.store(at + RATE, tl.zeros((128,), tl.float32) + rate, mask=inside)
    tl.store(at + DECAY, tl.zeros((128,), tl.float32) + decay, mask=inside)
    tl.store(at + STEP, tl.zeros((128,), tl.float32) + step, mask=inside)


@triton.jit
def sum_of_chunks(products, starts, matrix, at, inside, R: tl.constexpr, BLOCK: tl.constexpr):
    """The numbers ``at`` of the sum (R, R) of the products of a matrix's chunks, in their order."""
    total = tl.zeros((BLOCK,), tl.float32)
    first = tl.load(starts + matrix)
    chunk = products + first.to(tl.int64) * R * R + at
    for _ in range(first, tl.load(starts + matrix + 1)):
        total += tl.load(chunk, mask=inside, other=0.0)
        chunk += R * R
    return total


@triton.jit
def carry(products, starts, triangles, coefficients, C, gain, ahead, R: tl.constexpr, BLOCK: tl.constexpr):
    """C (n, R, R) = U^T (decay B), from U^T X and U^T K.

    X = keep B + cross G A^T takes B's place in the state, and K = decay B + gain G A^T is U times a triangle; of the
    two, gain X - cross K = decay (outside - ahead) B, where ``ahead`` is inside - gain keep / decay: 0, but 1 where
    Nesterov's look ahead counts the gradient once more.
    """
    BLOCKS: tl.constexpr = (R * R + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    matrix = (pid // BLOCKS).to(tl.int64)
    at = (pid % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    inside = at < R * R
    product = sum_of_chunks(products, starts, matrix, at, inside, R, BLOCK)
    triangle = tl.load(triangles + matrix * R * R + at, mask=inside, other=0.0)
    row = coefficients + matrix * WIDTH
    value = (gain * product - tl.load(row + CROSS) * triangle) / (tl.load(row + OUTSIDE) - ahead)
    tl.store(C + matrix * R * R + at, value, mask=inside)
