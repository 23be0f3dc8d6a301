"""Block sizes and precisions of the kernels: one table, by rank and by size of a weight; nothing is tuned at run time.

Everything here may be replaced for a measurement (``table.PRECISION["project"] = "tf32"``); the kernels read it at
every launch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch

#: Largest rank that the kernels take.
MAX_RANK = 512

#: Largest rank whose r x r matrices a program decomposes in its registers.
REGISTER_RANK = 128

#: Precision of float32 products (`tl.dot`) by use: "ieee", "tf32x3" or "tf32".
#: ``project`` is G A^T, ``momentum`` is X A, ``left`` is U^T G.
PRECISION: dict[str, str] = {"project": "ieee", "momentum": "ieee", "left": "ieee"}

#: Whether bfloat16 gradients are multiplied as they are, by factors rounded to bfloat16, instead of as float32.
BF16_DOT = False

#: Rounds of Philox behind stochastic rounding; 7 are the fewest that pass BigCrush (Salmon and others, SC 2011).
PHILOX_ROUNDS = 7

#: Programs that a multiprocessor should have to itself at least; fewer, and a long loop is split.
PROGRAMS_PER_PROCESSOR = 2

#: Numbers that one program of an element-wise kernel takes.
ELEMENTS = 2048


@dataclass(frozen=True)
class Blocks:
    """The tile of one kernel: ``rows`` x ``cols`` of G, ``rank`` columns of a left factor at once."""

    rows: int
    cols: int
    rank: int
    warps: int
    stages: int


# Rows are (largest rank, bytes of a number of G or W, blocks), the first that fits counts. ``rank`` 0 is the whole
# rank, padded to a power of two; where it is cut, G is read once for each part, by neighbours in the grid and hence
# from the L2 cache. Chosen so that float32 spills nothing on Hopper with "ieee" and "tf32", by the compiler's count
# of registers; bfloat16 with "ieee" spills from rank 128 on. "ieee" products are plain FMAs, unrolled: twice the
# tile and ptxas gives up (kilobytes of spills).

#: A program keeps ``rows`` rows of G A^T and walks over the columns of G. Low ranks are bound by memory and take
#: wide tiles (256 bytes a row); at high ranks the tile of A, ``rank`` x ``cols``, has to stay small, since three are
#: in flight. 64 rows are what one wgmma takes.
PROJECT: tuple[tuple[int, int, Blocks], ...] = (
    (32, 2, Blocks(64, 128, 0, 4, 3)),
    (64, 4, Blocks(64, 64, 0, 4, 3)),
    (128, 4, Blocks(64, 32, 0, 4, 3)),
    (MAX_RANK, 4, Blocks(64, 32, 256, 8, 3)),
)

#: A program keeps ``cols`` columns of U^T G and of A and walks over the rows of G and W. Beside the accumulator live
#: four tiles of rows x cols: G, W, X A and the sums of G^2, 32 registers a thread together.
UPDATE: tuple[tuple[int, int, Blocks], ...] = ((MAX_RANK, 4, Blocks(32, 64, 128, 8, 2)),)


def blocks(table: tuple[tuple[int, int, Blocks], ...], rank: int, itemsize: int) -> Blocks:
    """The row of ``PROJECT`` or ``UPDATE`` for a rank and an item size."""
    for largest, size, found in table:
        if rank <= largest and itemsize <= size:
            whole = max(16, 1 << (rank - 1).bit_length())
            return Blocks(found.rows, found.cols, min(found.rank or whole, whole), found.warps, found.stages)
    raise ValueError(f"no block sizes for rank {rank} and numbers of {itemsize} bytes")


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of ``device``; 1 for the CPU, where the interpreter runs one program after the other."""
    if device.type == "cpu":
        return 1
    properties = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", 64))


def splits(programs: int, length: int, block: int, device: torch.device) -> tuple[int, int]:
    """Into how many parts a loop over ``length`` is cut, and the length of a part, a multiple of ``block``.

    Depends on the sizes and the device alone, so that a rerun adds up in the same order.
    """
    steps = math.ceil(length / block)
    wanted = math.ceil(PROGRAMS_PER_PROCESSOR * processors(device) / max(1, programs))
    each = math.ceil(steps / min(wanted, steps))
    return math.ceil(steps / each), each * block
