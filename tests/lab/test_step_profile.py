"""``benchmarks/step_profile.py`` on a trace that is written by hand; the profile itself needs a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from step_profile import REST, kernels, main, table

from lorapre.lab.errors import UserError

TRACE = [
    *({"cat": "kernel", "name": "update", "dur": 3_000.0} for _ in range(4)),
    *({"cat": "kernel", "name": "project", "dur": 1_000.0} for _ in range(2)),
    {"cat": "gpu_memset", "name": "Memset", "dur": 10.0},
    {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "dur": 9_000.0},
]


def test_times_are_those_of_a_step_and_what_the_host_does_is_none() -> None:
    rows = kernels(TRACE, 2)
    assert [(row["kernel"], row["launches"], row["ms"]) for row in rows] == [
        ("update", 2.0, 6.0),
        ("project", 1.0, 1.0),
        (REST, 0.5, 0.005),
    ]
    assert sum(row["share"] for row in rows) == pytest.approx(1, abs=1e-3)


def test_the_table_has_each_kernel_and_the_sum() -> None:
    rows = kernels(TRACE, 2)
    lines = table([{"dtype": "float32", "rank": 16, "ms": 7.005, "kernels": rows}]).splitlines()
    assert "| float32 | 16 | `update` | 2 | 6.00 | 86% |" in lines
    assert lines[-1].endswith("**7.00** | |") or lines[-1].endswith("**7.01** | |")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal is for machines without a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No GPU"):
        main(["--out", str(tmp_path)])
