"""``benchmarks/kernel_code.py`` on a listing that is written by hand, and on one kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kernel_code.py"
sys.path.append(str(SCRIPT.parent))

from kernel_code import instructions, longest_loop  # noqa: E402  (only where its compiler is)

LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                 /* 0x00000a0000017a02 */
        /*0010*/                   LDG.E R2, [R4] ;                       /* 0x0000000404027981 */
        /*0020*/               @P0 BRA 0x10 ;                             /* 0xfffffff000000947 */
        /*0030*/              @!P1 LDS.128 R4, [R8] ;                     /* 0x0000000008047984 */
        /*0040*/              @!PT LDS RZ, [RZ] ;                         /* 0x00000000fffff984 */
        /*0050*/                   FFMA R2, R4, R4, R2 ;                  /* 0x0000000404027223 */
        /*0060*/                   FFMA R2, R5, R5, R2 ;                  /* 0x0000000505027223 */
        /*0070*/              @!P0 BRA 0x30 ;                             /* 0xffffffb000008947 */
        /*0080*/                   EXIT ;                                 /* 0x000000000000794d */
"""


def test_the_longest_loop_is_counted_without_what_never_runs() -> None:
    assert dict(longest_loop(LISTING)) == {"LDS": 1, "FFMA": 2, "BRA": 1}
    assert len(instructions(LISTING)) == 8
    assert longest_loop("") == {}


def test_the_table_has_a_line_for_each_kernel(tmp_path: Path) -> None:
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--ranks", "16", "--dtypes", "float32"]
    environment = {**kept, "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.stdout.splitlines()]
    header, _, *lines = cells
    assert [line[2] for line in lines] == ["`update`", "`update, no sweep`", "`project`", "`product`", "`apply`"]
    for line in lines:
        found = dict(zip(header, line, strict=True))
        assert int(found["a turn"]) > int(found["LDS"]) + int(found["BAR"])
        assert found["LDL"] == found["STL"] == "0", "a loop that spills"
