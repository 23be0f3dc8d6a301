"""Block sizes and precisions of the kernels: one table, by rank and by size of a weight; nothing is tuned at run time.

Everything here may be replaced for a measurement (``table.PRECISION["project"] = "tf32"``); the kernels read it at
every launch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from lorapre import spectral
from lorapre.backends.triton.layout import lines
from lorapre.routing import MatrixView

#: Largest rank that the kernels take.
MAX_RANK = 512

#: Largest rank that is left to the kernels after the first pass; batched products take over above it (`high_rank`).
KERNEL_RANK = 128

#: How the bases of high ranks are made: one pass of Cholesky QR each, at least two, and the precision of its Gram
#: matrix. A first one in float64 leaves the second almost nothing to do up to a condition of 1e6. Three of "ieee" are
#: for GPUs where float64 is slow, which are all but a data centre's. All other products of theirs are "ieee": to form
#: each from three of TF32 takes more launches than the time is worth that tensor cores save.
GRAMS: tuple[str, ...] = ("float64", "ieee")

#: Columns that are decomposed number by number in their Gram matrices, by one program a matrix.
CHOLESKY_COLUMNS = 64

#: Largest rank of which a program that multiplies a factor sums up the products of the result, too. At rank 128 both
#: together leave room for half as many rows, with three times as many instructions each.
FUSED_RANK = 64

#: Precision of float32 products (`tl.dot`) by use: "ieee", "tf32x3" or "tf32".
#: ``project`` is G A^T, ``momentum`` is X A, ``left`` is U^T G, ``bases`` is what orthonormalizes factors.
#: TF32 has 10 bits, which is far less than a gradient's noise; a basis that lost its orthonormality would not be one.
#: Above ``KERNEL_RANK`` ``factors`` is what else of the momentum goes from one step to the next, U^T B and U S. Torch
#: knows "tf32" and "ieee"; what it cuts off to TF32 makes the momentum smaller, by 3e-4 to 4e-4 a factor and step.
PRECISION: dict[str, str] = {
    "project": "tf32",
    "momentum": "tf32",
    "left": "tf32",
    "bases": "tf32x3",
    "factors": "ieee",
}

#: The same where the regression is the paper's: ``newton`` is G, or |G|, times a factor, ``newton_bf16`` the same of
#: gradients in bfloat16, of which "bf16" and "bf16x2" take one or two products in bfloat16 and the factor as a sum of
#: as many numbers of it; ``moments`` is B A, ``squares`` what multiplies by an inverse. With the factors of all
#: products but the last cut to TF32, updates of 120 steps on a drifting signal (192 x 256, r 8 to 64) stay within 0.3 %
#: of float64's, and the momentum as near to the true average; "bf16x2" within 0.005 %, "bf16" within 1.5 %.
NEWTON_PRECISION: dict[str, str] = {"newton": "tf32", "newton_bf16": "bf16x2", "moments": "tf32", "squares": "tf32x3"}

#: Numbers that one program of an element-wise kernel takes.
ELEMENTS = 2048

#: Rows of a factor in a chunk, at low ranks.
CHUNK = 512

#: Scratch of a step as a share of the weights' bytes, and what it may be in any case. What has to wait for its turn is
#: read once more, to see whether it is finite. Llama-1B's matrices in float32 need 4.1 % at rank 64.
SCRATCH_SHARE = 0.045
LEAST_SCRATCH = 2**28

#: The same share at high ranks, where factors themselves are a fifth of the weights and the more matrices are
#: decomposed at once, the better: each of their columns takes as long as one of all of them.
HIGH_RANK_SHARE = 0.25

#: Numbers of factors, and of momenta, that are copied or multiplied at once at high ranks; one matrix in any case.
HIGH_RANK_FACTORS = 5 * 2**22
HIGH_RANK_MOMENTA = 5 * 2**24


@dataclass(frozen=True)
class Blocks:
    """The tile of one kernel: ``rows`` x ``cols`` of G, ``rank`` columns of a left factor at once.

    ``registers`` is the most that a thread may have, so that more programs share a processor; None is the compiler's
    choice.
    """

    rows: int
    cols: int
    rank: int
    warps: int
    stages: int
    registers: int | None = None


# Rows are (largest rank, bytes of a number of G or W, blocks), the first that fits counts. ``rank`` 0 is the whole
# rank, padded to a power of two; where it is cut, G is read once for each part, by neighbours in the grid and hence
# from the L2 cache.

# Most tiles are the fastest of some 3 to 17 each, on an H100 80GB with torch 2.11 and Triton 3.6 (2026-11-28), in steps
# of Llama-1B's 168 matrices; timings of the same tile differ by 2 %. The copies' were not timed.

#: A program keeps ``rows`` rows of G A^T and walks over the columns of G. The tile of A, ``rank`` x ``cols``, has to
#: stay small, since several are in flight. 64 rows are what one wgmma takes; a third program on each processor is worth
#: more than the registers that it takes from the others.
PROJECT: tuple[tuple[int, int, Blocks], ...] = (
    (64, 4, Blocks(64, 32, 0, 4, 3, 168)),
    (128, 4, Blocks(64, 32, 0, 4, 3)),
    (MAX_RANK, 4, Blocks(64, 32, 256, 8, 3)),
)

#: A program keeps ``cols`` columns of U^T G and of A and walks over the rows of G and W. Few rows at once: what counts
#: is how many programs share a processor, three or four up to rank 64. 8 warps with 128 columns are as fast up to 64.
UPDATE: tuple[tuple[int, int, Blocks], ...] = (
    (32, 4, Blocks(16, 64, 0, 4, 3, 128)),
    (64, 2, Blocks(16, 64, 0, 4, 3, 168)),
    (64, 4, Blocks(16, 64, 0, 4, 3, 128)),
    (KERNEL_RANK, 4, Blocks(16, 64, 0, 4, 3, 255)),
)


#: The same two passes where the regression is the paper's, by the larger of both moments' ranks: each has an
#: accumulator of its own.
NEWTON_PROJECT: tuple[tuple[int, int, Blocks], ...] = (
    (32, 4, Blocks(64, 64, 0, 4, 3)),
    (64, 2, Blocks(128, 32, 0, 8, 3)),
    (64, 4, Blocks(64, 32, 0, 4, 3)),
    (MAX_RANK, 4, Blocks(128, 32, 128, 8, 3)),
)
NEWTON_UPDATE: tuple[tuple[int, int, Blocks], ...] = (
    (128, 2, Blocks(32, 64, 128, 8, 3)),
    (64, 4, Blocks(64, 64, 128, 8, 3)),
    (128, 4, Blocks(32, 64, 128, 8, 3)),
    (MAX_RANK, 4, Blocks(32, 64, 128, 8, 2)),
)

#: The sketch of an update: columns of A, or its rows, at once, and ranks.
SKETCH = Blocks(64, 64, 64, 8, 2)

#: Columns of which a program makes the signs, and a part of A S; at high ranks of all of a matrix.
SIGNS = 1024

#: What a program copies of a matrix into a batch, at high ranks.
COPY = Blocks(16, 128, 0, 4, 1)

#: What Muon does around Newton-Schulz: rows (columns) at once whose squares are summed, and numbers of them at once; a
#: tile of the weights.
MUON_LENGTHS = Blocks(32, 128, 0, 4, 3)
MUON_WEIGHTS = Blocks(32, 128, 0, 4, 1)

#: Ranks at once of two products in the second pass: rows of the next right factor, and of a momentum cut into blocks.
NEWTON_PARTS = (16, 32)

#: Gram matrices: their block of ranks at most, numbers of a factor's other side at once.
NEWTON_GRAM = Blocks(32, 0, 64, 4, 3)

#: Inverses: columns that are eliminated at once, columns of a product.
NEWTON_INVERT = Blocks(32, 64, 0, 4, 1)


def blocks(table: tuple[tuple[int, int, Blocks], ...], rank: int, itemsize: int) -> Blocks:
    """The row of ``PROJECT`` or ``UPDATE`` for a rank and an item size."""
    for largest, size, found in table:
        if rank <= largest and itemsize <= size:
            whole = padded(rank)
            return replace(found, rank=min(found.rank or whole, whole))
    raise ValueError(f"no block sizes for rank {rank} and numbers of {itemsize} bytes")


def launch(block: Blocks) -> dict[str, Any]:
    """How a kernel with this tile is launched, in Triton's words."""
    options: dict[str, Any] = {"num_warps": block.warps, "num_stages": block.stages}
    if block.registers is not None and torch.version.hip is None:  # AMD's compiler has no such option
        options["maxnreg"] = block.registers
    return options


def padded(rank: int) -> int:
    """The power of two, 16 at least, that a rank is padded to in a program's registers."""
    return max(16, 1 << (rank - 1).bit_length())


def chunk_rows(rank: int) -> int:
    """Rows of a factor of which a program of the bases forms one product: their (r, r) results stay a small share."""
    return CHUNK if rank <= FUSED_RANK else 2 * CHUNK


def product_blocks(rank: int) -> Blocks:
    """Rows at once, and the block of ranks, of a product of two factors."""
    block = min(padded(rank), 64)
    return Blocks(32, 0, block, 4, 3) if block < 64 else Blocks(64, 0, block, 4, 2 if rank <= 64 else 1)


def blocked_cholesky_blocks() -> Blocks:
    """Columns that are decomposed number by number, where products do the rest."""
    return Blocks(CHOLESKY_COLUMNS, 0, 0, 8, 1)


def cholesky_blocks(rank: int) -> Blocks:
    """Columns that are decomposed number by number, of an (r, r) matrix."""
    whole = padded(rank)
    return Blocks(0, 0, min(whole, 32), 4 if whole < 128 else 8 if whole == 128 else 16, 1)


def apply_blocks(rank: int) -> Blocks:
    """Rows at once, and ``cols`` ranks of the result at once, of a factor times an (r, r) matrix."""
    whole = padded(rank)
    if whole <= 64:
        return Blocks(64, whole, whole, 4, 1)
    fused = rank <= FUSED_RANK
    if whole == 128:
        return Blocks(32, whole, whole, 8, 2) if fused else Blocks(64, whole, whole, 8, 1)
    return Blocks(32 if whole < 512 else 16, whole if fused else 32, whole, 8, 1)


def finish_blocks(rank: int) -> Blocks:
    """The same of the last one, whose programs take one tile each and ``rank`` numbers of a sum at once."""
    whole = padded(rank)
    if whole < 128:
        return Blocks(128, whole, whole, 8 if whole > 32 else 4, 1)
    return Blocks(64, 64, 64, 4, 1)


def left_blocks(rank: int) -> Blocks:
    """Rows and ranks at once of what the first pass leaves of a left factor: few, as all is held twice, transposed."""
    block = min(padded(rank), 64)
    return Blocks(32, 0, block, 8 if block == 64 else 4, 1)


def scratch_bytes(view: MatrixView, state_dtype: torch.dtype, *, sketched: bool = False, sweeps: bool = True) -> int:
    """Scratch of one parameter's matrices: K, twice more factors where the state is narrow or split, and r x r.

    With ``sketched`` also what spectral clipping takes. Without ``sweeps`` G A^T, and then X, is all that is kept. At
    high ranks there is `high_rank_bytes` besides.
    """
    p, q, r = view.p, view.q, view.rank
    left, right = (r * lines(side) for side in (p, q))
    rest = p + sketched * _sketch(view)
    if not sweeps:
        return 4 * view.batch * (left + rest)
    if r > KERNEL_RANK:  # L takes the place of X where it can
        return 4 * view.batch * (2 * left + (right if right > left else 0) + 6 * r * r + rest)
    factors = p * r
    if state_dtype != torch.float32:
        factors += (p + q) * r
    chunk = chunk_rows(r)
    squares = 4 + max(1, math.ceil(max(p, q) / chunk))
    return 4 * view.batch * (factors + squares * r * r + rest)


def _sketch(view: MatrixView) -> int:
    """Numbers that the sketch of a matrix takes: S, A S in parts, products of tiles or, at high ranks, all of it."""
    p, q, r = view.p, view.q, view.rank
    if r > KERNEL_RANK:
        return spectral.COLUMNS * (lines(q) + r + p)
    tiles = math.ceil(p / blocks(PROJECT, r, 4).rows)
    return spectral.COLUMNS * (lines(q) + r * math.ceil(q / SIGNS) + spectral.COLUMNS * tiles)


def high_rank_batch(view: MatrixView) -> int:
    """Matrices of which a step at a high rank copies or multiplies factors, and forms the momentum, at once."""
    p, q = lines(view.p), lines(view.q)
    return max(1, min(HIGH_RANK_FACTORS // (max(p, q) * view.rank), HIGH_RANK_MOMENTA // (p * q)))


def high_rank_bytes(view: MatrixView) -> int:
    """What a step at a high rank holds of so many at a time: factors in float64, or the momentum and m_A."""
    p, q = lines(view.p), lines(view.q)
    return 4 * high_rank_batch(view) * max(2 * max(p, q) * view.rank, q * (p + view.rank))


def eights(length: int) -> int:
    """``length`` up to a multiple of 8, what tensor cores and 16 bytes of bfloat16 ask for."""
    return -(-length // 8) * 8


def orthogonal_bytes(p: int, q: int, dtype: torch.dtype) -> int:
    """What the Newton-Schulz of one matrix holds: two iterates, and two of its small matrices."""
    rows, cols = eights(p), eights(q)
    return dtype.itemsize * 2 * (rows * cols + min(rows, cols) ** 2)


def muon_scratch_bytes(view: MatrixView, dtype: torch.dtype, weight_bytes: int, count: int) -> int:
    """The same of ``count`` parameters in turns: as much as `scratch_limit` allows, or one matrix."""
    each = orthogonal_bytes(view.p, view.q, dtype)
    return each * max(1, min(count * view.batch, scratch_limit(weight_bytes) // each))


def asynchronous(rank: int, weight_itemsize: int, *, aligned: bool) -> bool:
    """Whether the second pass reads the weights through shared memory, of rows that may be read 16 bytes at a time.

    Up to rank 64 float32 is as fast one turn ahead in registers, and rows that are not aligned are slower (H100).
    """
    return aligned and (weight_itemsize == 2 or rank > 64)


def given_blocks() -> Blocks:
    """The second pass where the momentum is given."""
    return Blocks(32, 64, 16, 4, 3)


def square_blocks(rank: int) -> Blocks:
    """Rows of a factor at once that are multiplied by an (r, r) inverse, of which ``cols`` rows at once."""
    whole = padded(rank)
    return Blocks(max(16, min(64, 4096 // whole)), max(16, min(whole, 2048 // whole)), whole, 8 if whole > 32 else 4, 1)


def newton_scratch_bytes(view: MatrixView, second_rank: int) -> int:
    """The same where the regression is the paper's: H A^T, of ranks in parts B^T H, and float64 Gram matrices."""
    ranks = view.rank + second_rank
    split = max(view.rank, second_rank) > max(blocks.rank for _, _, blocks in NEWTON_UPDATE)
    factors = (view.p + (view.q if split else 0)) * ranks
    return view.batch * (4 * factors + 16 * (view.rank**2 + second_rank**2) + 4 * view.p // 16)


def scratch_limit(weight_bytes: int) -> int:
    """Bytes of scratch of a step: a share of the weights, or what hardly any GPU misses."""
    return max(LEAST_SCRATCH, int(SCRATCH_SHARE * weight_bytes))


def high_rank_limit(weight_bytes: int) -> int:
    """The same at high ranks."""
    return max(LEAST_SCRATCH, int(HIGH_RANK_SHARE * weight_bytes))
