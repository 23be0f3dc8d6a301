"""What the compiler makes of the kernels' loops for an H100, on a machine without one.

    python benchmarks/kernel_code.py                          # a table on the screen
    python benchmarks/kernel_code.py --ranks 16,64,128 --dtypes float32,bfloat16

Of the longest loop of each kernel, in a step of aligned matrices with the default options: instructions of one warp a
turn, and what of them waits or goes through shared memory. It says what a change does to the code, not to the time:
that takes a GPU (``step_time``, ``step_profile.py``). Not under TRITON_INTERPRET, which replaces the compiler.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lorapre.backends.triton import bases, first_pass, layout, second_pass, table

HOPPER = GPUTarget("cuda", 90, 32)
TYPES = {"float32": (tl.float32, 4), "bfloat16": (tl.bfloat16, 2)}
#: Arguments of the library's kernels that are no addresses of float32.
NUMBERS = "decay gain ahead beta2 eps keep cross outside v_scale rate rate_m rate_v step limit shift weight factor"
NUMBERS += " clipping sign floor damping"
INTEGERS = "n seed size right_programs first first_given tiles row_tiles col_tiles numel start R rows columns height"
INTEGERS += " width offset left_offset right_shift"
LISTS = "items starts sign_starts right_items left_items works"
OF_NAME = {
    **dict.fromkeys(NUMBERS.split(), "fp32"),
    **dict.fromkeys(INTEGERS.split(), "i32"),
    **dict.fromkeys(LISTS.split(), "*i32"),
    "matrices": "*i64",
    "enabled": "*u8",
}
#: In the table: barriers; shared memory read, written; memory read at once, ahead; registers read back, spilled.
SHOWN = ("BAR", "LDS", "STS", "LDG", "LDGSTS", "LDL", "STL", "HGMMA", "MUFU")


def build(
    kernel: Any,
    target: GPUTarget,
    blocks: table.Blocks | None = None,
    doubles: Collection[str] = (),
    **constants: Any,
) -> Any:
    """``kernel`` for ``target``, its addresses aligned as torch's are; ``doubles`` are those of float64."""
    types = {name: OF_NAME.get(name, "*fp32") for name in kernel.arg_names}
    types |= dict.fromkeys(types.keys() & set(doubles), "*fp64") | dict.fromkeys(constants, "constexpr")
    place = kernel.arg_names.index
    aligned = {(place(name),): [["tt.divisibility", 16]] for name, kind in types.items() if kind.startswith("*")}
    source = ASTSource(kernel, types, {(place(name),): value for name, value in constants.items()}, aligned)
    return triton.compile(source, target=target, options=table.launch(blocks) if blocks else {})


def kernels(rank: int, dtype: str) -> Mapping[str, Any]:
    """The kernels of a step, compiled, by what they are called in the table."""
    kind, size = TYPES[dtype]
    rows = layout.ROWS_ALIGNED
    block = table.blocks(table.UPDATE, rank, size)
    found = {
        name: build(
            second_pass.update, HOPPER, block, W_TYPE=kind, G_TYPE=kind, S_TYPE=tl.float32, R=rank, BLOCK_R=block.rank,
            BLOCK_P=block.rows, BLOCK_Q=block.cols, RELATIVE=True, BOUNDED=True, CLIP=True, FULL=False, GIVEN=False,
            LEAVE_G=False, SWEEPS=sweeps, ASYNC=table.asynchronous(rank, size, aligned=True), STOCHASTIC=False,
            ROUNDS=7, X_IN_STATE=True, X_ALIGNED=True, L_IN_STATE=True, W_ORDER=rows, G_ORDER=rows, V_ORDER=0,
            MOMENTUM_PRECISION=table.PRECISION["momentum"], LEFT_PRECISION=table.PRECISION["left"],
        )
        for name, sweeps in (("update", True), ("update, no sweep", False))
    }  # fmt: skip
    block = table.blocks(table.PROJECT, rank, size)
    found["project"] = build(
        first_pass.project, HOPPER, block, G_TYPE=kind, S_TYPE=tl.float32, R=rank, BLOCK_R=block.rank,
        BLOCK_P=block.rows, BLOCK_Q=block.cols, NEGATE=False, CLIP=True, SPECTRAL=True, WHOLE=True, FULL=False,
        SWEEPS=True, ORDER=rows, V_ORDER=0, PRECISION=table.PRECISION["project"],
    )  # fmt: skip
    shared = {
        "S_TYPE": tl.float32, "R": rank, "CHUNK": table.chunk_rows(rank), "RIGHT_SIDE": True, "ALIGNED": True,
        "X_IN_STATE": True, "Y_IN_STATE": True, "SCALE": False, "FORM": False, "PRECISION": table.PRECISION["bases"],
    }  # fmt: skip
    block = table.product_blocks(rank)
    found["product"] = build(bases.product, HOPPER, block, BLOCK_R=block.rank, BLOCK=block.rows, WITH_X=False, **shared)
    block = table.apply_blocks(rank)
    found["apply"] = build(
        bases.apply, HOPPER, block, BLOCK_R=table.padded(rank), BLOCK=block.rows, OUT=block.cols,
        GRAM=rank <= table.FUSED_RANK, CARRY=False, **shared,
    )  # fmt: skip
    return found


def instructions(listing: str) -> list[tuple[int, str]]:
    """Addresses and instructions, without their predicates, of a listing by cuobjdump; none that never runs (@!PT)."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/(?!\s+@!PT)\s+(?:@!?U?P\w+\s+)?([^;]+);", listing, re.MULTILINE)
    return [(int(address, 16), text.strip()) for address, text in lines]


def longest_loop(listing: str) -> Counter[str]:
    """How often each kind of instruction stands in the loop that has most of them."""
    code = instructions(listing)
    loops = [
        (int(to[1], 16), address)
        for address, text in code
        if (to := re.match(r"BRA\b.*?0x([0-9a-f]+)", text)) and int(to[1], 16) < address
    ]
    bodies = [[text for address, text in code if first <= address <= last] for first, last in loops]
    body = max(bodies, key=len, default=[])
    return Counter(text.split()[0].split(".")[0] for text in body)


def line(rank: int, dtype: str, name: str, made: Any) -> str:
    """One of the table."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        listing, usage = (
            subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout
            for option in ("-sass", "-res-usage")
        )
    found = longest_loop(listing)
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[-1]
    cells = (rank, dtype, f"`{name}`", registers, stack, made.metadata.shared, found.total())
    return "| " + " | ".join(map(str, (*cells, *(found[kind] for kind in SHOWN)))) + " |"


def main() -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="16,64,128", help=f"up to {table.KERNEL_RANK}")
    parser.add_argument("--dtypes", default=",".join(TYPES), help="of weights and gradients")
    given = parser.parse_args()
    ranks = [int(rank) if rank.isdecimal() else 0 for rank in given.ranks.split(",")]
    if not all(1 <= rank <= table.KERNEL_RANK for rank in ranks):
        parser.error(f"--ranks {given.ranks}: give integers from 1 to {table.KERNEL_RANK}, such as 16,64")
    if not set(given.dtypes.split(",")) <= TYPES.keys():
        parser.error(f"--dtypes {given.dtypes}: give some of {','.join(TYPES)}")
    columns = ("r", "dtype", "kernel", "registers", "stack", "shared", "a turn", *SHOWN)
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for rank in ranks:
        for dtype in given.dtypes.split(","):
            for name, made in kernels(rank, dtype).items():
                print(line(rank, dtype, name, made), flush=True)


if __name__ == "__main__":
    main()
