"""Randomness depends on the seed and the parameter's name alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from _support import assert_same_bits, make_params, relative_difference
from lorapre import LoRAPreAdamW

SRC = Path(__file__).parents[1] / "src"

PROGRAM = """
import hashlib, sys, torch
from torch import nn
from lorapre import LoRAPreAdamW
torch.set_num_threads(1)
torch.manual_seed(int(sys.argv[1]))   # must not matter
generator = torch.Generator().manual_seed(5)
params = [("a.weight", nn.Parameter(torch.ones(12, 20))), ("b.weight", nn.Parameter(torch.ones(2, 9, 8)))]
optimizer = LoRAPreAdamW(params, rank=3, seed=int(sys.argv[2]), second_moment="hadamard")
for _ in range(3):
    for _, param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()
digest = hashlib.sha256()
for _, param in params:
    for tensor in (param, *optimizer.state[param].values()):
        digest.update(tensor.detach().numpy().tobytes())
print(digest.hexdigest())
"""


def test_two_processes_with_one_seed_give_the_same_bits() -> None:
    def start(global_seed: int, seed: int, hash_seed: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(global_seed), str(seed)],
            env={**os.environ, "PYTHONPATH": str(SRC), "PYTHONHASHSEED": hash_seed},
            stdout=subprocess.PIPE,
            text=True,
        )

    processes = [start(1, 7, "1"), start(2, 7, "2")]  # other seeds: the next test
    first, second = (process.communicate(timeout=120)[0].strip() for process in processes)
    assert len(first) == 64
    assert first == second


def right_factors(params: Any, **options: Any) -> dict[str, Tensor]:
    optimizer = LoRAPreAdamW(params, rank=3, second_moment="hadamard", **options)
    return {
        f"{i}.{key}": value
        for i, param in enumerate(optimizer.param_groups[0]["params"])
        for key, value in optimizer.state[param].items()
        if key in ("m_A", "v_A")
    }


@pytest.mark.parametrize(("regression", "size"), [("newton", 0.02), ("subspace", 12**-0.5)])
def test_every_seed_name_and_moment_has_factors_of_its_own(regression: str, size: float, device: torch.device) -> None:
    def fresh() -> nn.Parameter:
        return nn.Parameter(torch.zeros(10, 12, device=device))

    drawn = [
        right_factors(params, regression=regression, seed=seed)
        for params, seed in (
            ([fresh(), fresh()], 0),  # by index
            ([fresh(), fresh()], 1),
            ([("x", fresh()), ("y", fresh())], 0),
        )
    ]
    factors = [factor for by_name in drawn for factor in by_name.values()]
    assert len(factors) == 12
    for i, one in enumerate(factors):
        assert one.square().mean().sqrt().item() == pytest.approx(size, rel=0.4)
        for other in factors[:i]:
            assert relative_difference(one, other) > 0.1


def test_factors_depend_on_the_name_and_not_on_the_position_or_dtype(device: torch.device) -> None:
    def fresh(dtype: torch.dtype = torch.float32) -> nn.Parameter:
        return nn.Parameter(torch.zeros(10, 12, device=device, dtype=dtype))

    one = right_factors([("x", fresh()), ("y", fresh())])
    other = right_factors([("y", fresh()), ("x", fresh())])
    wide = right_factors([("x", fresh(torch.float64))])
    assert_same_bits(one["0.m_A"], other["1.m_A"])
    assert_same_bits(one["1.v_A"], other["0.v_A"])
    assert_same_bits(wide["0.m_A"], one["0.m_A"].double())
    assert_same_bits(one["0.m_A"], right_factors([("x", fresh(torch.bfloat16))])["0.m_A"])


def test_the_global_generators_are_not_advanced(device: torch.device) -> None:
    before = torch.random.get_rng_state()
    device_before = torch.cuda.get_rng_state() if device.type == "cuda" else None
    params = make_params([(10, 12), (7,)], torch.float32, device)
    optimizer = LoRAPreAdamW(params, rank=3)
    for param in params:
        param.grad = torch.full_like(param, 0.5)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(torch.random.get_rng_state(), before)
    if device_before is not None:
        assert torch.equal(torch.cuda.get_rng_state(), device_before)
