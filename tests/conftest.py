"""Fixtures of every test. LORAPRE_TEST_DEVICE=cuda runs the same suite on a GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # a process a core: more threads would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ.get("LORAPRE_TEST_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import torch

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers in _*.py, whatever pytest's import mode is


@pytest.fixture
def device() -> torch.device:
    """Where tensors go; tests that only make sense on the CPU do not take this fixture."""
    return torch.device(os.environ.get("LORAPRE_TEST_DEVICE", "cpu"))


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(20260222)
    # Tiny matrices: a second thread costs more than it brings, tenfold where the machine is busy.
    torch.set_num_threads(1)
    # TF32 keeps 10 bits: no comparison with a float64 reference would mean anything.
    torch.set_float32_matmul_precision("highest")
