"""The element-wise kernels around the two passes: coefficients, factors in and out, the averages of G^2.

``coefficients`` is an (n, 8) float32 table with one row a matrix, columns as in `ON` to `STEP`; ``scalars`` is
(n, 2): the mean of the row means of step t - 1, and eps. Tables hold one address a matrix.
"""

# Triton's decorators and types are untyped where they are not missing (other platforms than Linux).
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

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


@triton.jit
def base_of(table, index, dtype: tl.constexpr):
    return tl.load(table + index).to(tl.pointer_type(dtype))


@triton.jit
def run_of(table, index, at, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """Addresses of the numbers ``at`` of one matrix's state; ALIGNED where each starts at a multiple of 16 bytes."""
    addresses = base_of(table, index, dtype) + at
    if ALIGNED:  # unknown of an address from memory, without it every access is a scalar
        addresses = tl.multiple_of(addresses, 16)
    return addresses


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
def gather(
    B_table,
    A_table,
    B,
    A,
    B_numel,
    A_numel,
    B_blocks,
    A_blocks,
    S_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The factors of all matrices as float32 batches B (n, p, R) and A (n, R, q)."""
    pid = tl.program_id(0)
    matrix = (pid // (B_blocks + A_blocks)).to(tl.int64)
    block = pid % (B_blocks + A_blocks)
    if block < B_blocks:
        at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(run_of(B_table, matrix, at, S_TYPE, ALIGNED), mask=at < B_numel, other=0.0)
        tl.store(B + matrix * B_numel + at, values.to(tl.float32), mask=at < B_numel)
    else:
        at = (block - B_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(run_of(A_table, matrix, at, S_TYPE, ALIGNED), mask=at < A_numel, other=0.0)
        tl.store(A + matrix * A_numel + at, values.to(tl.float32), mask=at < A_numel)


@triton.jit
def combine(
    B,
    GA,
    K,
    X,
    row_table,
    row_sums,
    scalars,
    coefficients,
    p,
    q,
    numel,
    blocks,
    parts,
    decay,
    gain,
    beta2,
    eps,
    S_TYPE: tl.constexpr,
    RELATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """K = decay B + gain GA, from which U comes, and X = keep B + cross GA, (n, p, R) each; then ``scalars``."""
    pid = tl.program_id(0)
    matrix = (pid // (blocks + 1)).to(tl.int64)
    block = pid % (blocks + 1)
    row = coefficients + matrix * WIDTH
    if block < blocks:
        at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < numel
        b = tl.load(B + matrix * numel + at, mask=inside, other=0.0)
        ga = tl.zeros((BLOCK,), tl.float32)
        for part in range(parts):
            ga += tl.load(GA + (matrix * parts + part) * numel + at, mask=inside, other=0.0)
        tl.store(K + matrix * numel + at, decay * b + gain * ga, mask=inside)
        x = tl.load(row + KEEP) * b + tl.load(row + CROSS) * ga
        tl.store(X + matrix * numel + at, x, mask=inside)
    else:
        base = base_of(row_table, matrix, S_TYPE)
        old = tl.zeros((BLOCK,), tl.float32)
        new = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, p, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            old += tl.load(base + rows, mask=rows < p, other=0.0).to(tl.float32)
        for start in range(0, p * parts, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            new += tl.load(row_sums + matrix * parts * p + rows, mask=rows < p * parts, other=0.0)
        mean = tl.sum(old, axis=0) / p
        size = eps
        if RELATIVE:
            # The mean of v_hat: its rank-1 part has the mean of the old row means, whatever the columns are.
            v = beta2 * mean + (1.0 - beta2) * (tl.sum(new, axis=0) / p / q)
            size = eps * tl.sqrt(v * tl.load(row + V_SCALE))
        tl.store(scalars + matrix * 2, mean)
        tl.store(scalars + matrix * 2 + 1, size)


@triton.jit
def commit(
    B_table,
    A_table,
    row_table,
    col_table,
    B,
    A,
    row_sums,
    col_sums,
    coefficients,
    p,
    q,
    B_numel,
    A_numel,
    B_blocks,
    A_blocks,
    row_blocks,
    col_blocks,
    row_parts,
    col_parts,
    beta2,
    S_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The new state of all matrices into their own tensors, where the step is enabled."""
    each = B_blocks + A_blocks + row_blocks + col_blocks
    pid = tl.program_id(0)
    matrix = (pid // each).to(tl.int64)
    block = pid % each
    on = (tl.load(coefficients + matrix * WIDTH + ON) != 0).to(tl.int32)
    if block < B_blocks:
        _copy(B_table, B, matrix, B_numel, block, on, S_TYPE, ALIGNED, BLOCK)
    elif block < B_blocks + A_blocks:
        _copy(A_table, A, matrix, A_numel, block - B_blocks, on, S_TYPE, ALIGNED, BLOCK)
    elif block < B_blocks + A_blocks + row_blocks:
        _average(row_table, row_sums, matrix, p, q, row_parts, block - B_blocks - A_blocks, on, beta2, S_TYPE, BLOCK)
    else:
        block -= B_blocks + A_blocks + row_blocks
        _average(col_table, col_sums, matrix, q, p, col_parts, block, on, beta2, S_TYPE, BLOCK)


@triton.jit
def _copy(table, batch, matrix, numel, block, on, dtype: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(batch + matrix * numel + at, mask=at < numel, other=0.0)
    tl.store(run_of(table, matrix, at, dtype, ALIGNED), nearest(values, dtype), mask=at < numel * on)


@triton.jit
def _average(table, sums, matrix, length, across, parts, block, on, beta2, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """mean <- beta2 mean + (1 - beta2) sum / across, as `torch.lerp` has it."""
    at = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        total += tl.load(sums + (matrix * parts + part) * length + at, mask=at < length, other=0.0)
    base = base_of(table, matrix, dtype)
    old = tl.load(base + at, mask=at < length, other=0.0).to(tl.float32)
    new = old + (1.0 - beta2) * (total / across - old)
    tl.store(base + at, nearest(new, dtype), mask=at < length * on)
