"""Properties that hold for any input: equivariance, scale invariance, and randomness that depends on the seed only."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from _support import assert_close, assert_same_bits, gradients, make_params, snapshot
from lorapre import LoRAPreAdamW

SRC = Path(__file__).parents[1] / "src"

quick = settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    p, q = draw(st.integers(2, 14)), draw(st.integers(2, 14))
    return {
        "shape": (p, q),
        "rank": draw(st.integers(1, min(p, q) - 1)),
        "seed": draw(st.integers(0, 10**6)),
        "options": {
            "lr": 1e-2,
            "weight_decay": draw(st.sampled_from([0.0, 0.1])),
            "second_moment": draw(st.sampled_from(["hadamard", "full"])),
            "bias_correction": draw(st.sampled_from(["exact", "paper"])),
            "maximize": draw(st.booleans()),
        },
    }


def build(problem: dict[str, Any], dtype: torch.dtype, device: torch.device, **more: Any) -> LoRAPreAdamW:
    params = make_params([problem["shape"]], dtype, device, seed=problem["seed"])
    return LoRAPreAdamW(params, rank=problem["rank"], **{**problem["options"], **more})


def only_param(optimizer: LoRAPreAdamW) -> nn.Parameter:
    param: nn.Parameter = optimizer.param_groups[0]["params"][0]
    return param


@quick
@given(problem=problems(), side=st.sampled_from(["rows", "columns"]), mode=st.sampled_from(["relative", "absolute"]))
def test_permuting_rows_or_columns_commutes_with_the_step(
    problem: dict[str, Any], side: str, mode: str, device: torch.device
) -> None:
    dim = 0 if side == "rows" else 1
    order = torch.randperm(problem["shape"][dim], generator=torch.Generator().manual_seed(problem["seed"]))

    def permuted(tensor: Tensor) -> Tensor:
        return tensor.index_select(dim, order.to(tensor.device))

    # a permutation of rows permutes the left factors' rows, one of columns the right factors' columns
    moved = {"m_B", "v_B", "exp_avg_sq"} if side == "rows" else {"m_A", "v_A", "exp_avg_sq"}
    options = {"damping_mode": mode, "damping": 1e-3}
    plain, mixed = (build(problem, torch.float64, device, **options) for _ in range(2))
    with torch.no_grad():
        only_param(mixed).copy_(permuted(only_param(plain)))
        for key, value in mixed.state[only_param(mixed)].items():
            if key in moved:
                value.copy_(permuted(value))
    for grad in gradients(problem["shape"], 5, seed=problem["seed"]):
        grad = grad.to(device)
        only_param(plain).grad = grad
        only_param(mixed).grad = permuted(grad)
        plain.step()
        mixed.step()
    assert_close(only_param(mixed), permuted(only_param(plain)), 1e-9, "W")
    for key, value in plain.state[only_param(plain)].items():
        expected = permuted(value) if key in moved else value
        assert_close(mixed.state[only_param(mixed)][key], expected, 1e-8, key)


def final_update(problem: dict[str, Any], dtype: torch.dtype, device: torch.device, factor: float) -> Tensor:
    """Displacement after six steps in which every gradient, and eps with it, is ``factor`` times as large."""
    optimizer = build(problem, dtype, device, eps=1e-8 * factor)
    start = only_param(optimizer).detach().clone()
    for grad in gradients(problem["shape"], 6, seed=problem["seed"]):
        only_param(optimizer).grad = grad.to(device, dtype) * factor
        optimizer.step()
    return only_param(optimizer).detach() - start


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@quick
@given(problem=problems(), exponent=st.floats(-6, 6))
def test_scaling_all_gradients_changes_no_update(
    problem: dict[str, Any], dtype: torch.dtype, exponent: float, device: torch.device
) -> None:
    plain = final_update(problem, dtype, device, 1.0)
    scaled = final_update(problem, dtype, device, 10.0**exponent)
    assert_close(scaled, plain, 1e-4, f"gradients times 1e{exponent:.2f}")


@quick
@given(problem=problems(), exponent=st.integers(-20, 20))
def test_scaling_all_gradients_by_a_power_of_two_changes_no_bit_of_the_update(
    problem: dict[str, Any], exponent: int, device: torch.device
) -> None:
    plain = final_update(problem, torch.float32, device, 1.0)
    scaled = final_update(problem, torch.float32, device, math.ldexp(1.0, exponent))
    # float64's square root and division are correctly rounded: nothing but exponents changes on the way.
    assert_close(scaled, plain, 0.0 if device.type == "cpu" else 1e-5)


def test_absolute_damping_is_not_scale_free(device: torch.device) -> None:
    problem = {"shape": (8, 10), "rank": 3, "seed": 1, "options": {"damping_mode": "absolute", "damping": 1e-6}}
    plain, scaled = (final_update(problem, torch.float64, device, factor) for factor in (1.0, 1e-4))
    assert (scaled - plain).norm() > 1e-2 * plain.norm()


@quick
@given(problem=problems())
def test_ascending_is_descending_along_the_negated_gradient(problem: dict[str, Any], device: torch.device) -> None:
    up, down = (build(problem, torch.float32, device, maximize=maximize) for maximize in (True, False))
    for grad in gradients(problem["shape"], 5, seed=problem["seed"]):
        only_param(up).grad = grad.to(device, torch.float32)
        only_param(down).grad = -grad.to(device, torch.float32)
        up.step()
        down.step()
    assert_same_bits(snapshot(up), snapshot(down))


@quick
@given(problem=problems(), count=st.integers(2, 4))
def test_matrices_do_not_notice_what_they_are_batched_with(
    problem: dict[str, Any], count: int, device: torch.device
) -> None:
    params = make_params([problem["shape"]] * count, torch.float64, device, seed=problem["seed"])
    names = [f"layer{i}" for i in range(count)]
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    together = LoRAPreAdamW(list(zip(names, params, strict=True)), rank=problem["rank"], **problem["options"])
    alone = [
        LoRAPreAdamW([pair], rank=problem["rank"], **problem["options"]) for pair in zip(names, copies, strict=True)
    ]
    streams = [gradients(problem["shape"], 4, seed=problem["seed"] + i) for i in range(count)]
    for grads in zip(*streams, strict=True):
        for param, copy, grad in zip(params, copies, grads, strict=True):
            param.grad = copy.grad = grad.to(device)
        together.step()
        for optimizer in alone:
            optimizer.step()
    for param, copy in zip(params, copies, strict=True):
        assert_close(param, copy, 1e-10)


PROGRAM = """
import hashlib, sys, torch
from torch import nn
from lorapre import LoRAPreAdamW
torch.set_num_threads(1)
torch.manual_seed(int(sys.argv[1]))   # must not matter
generator = torch.Generator().manual_seed(5)
params = [("a.weight", nn.Parameter(torch.ones(12, 20))), ("b.weight", nn.Parameter(torch.ones(2, 9, 8)))]
optimizer = LoRAPreAdamW(params, rank=3, seed=int(sys.argv[2]))
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
    optimizer = LoRAPreAdamW(params, rank=3, **options)
    return {
        f"{i}.{key}": value
        for i, param in enumerate(optimizer.param_groups[0]["params"])
        for key, value in optimizer.state[param].items()
        if key in ("m_A", "v_A")
    }


def test_every_seed_name_and_moment_has_factors_of_its_own(device: torch.device) -> None:
    def fresh() -> nn.Parameter:
        return nn.Parameter(torch.zeros(10, 12, device=device))

    drawn = [
        right_factors([fresh(), fresh()]),  # by index
        right_factors([fresh(), fresh()], seed=1),
        right_factors([("x", fresh()), ("y", fresh())]),
    ]
    factors = [factor for by_name in drawn for factor in by_name.values()]
    assert len(factors) == 12
    for i, one in enumerate(factors):
        assert one.std().item() == pytest.approx(0.02, rel=0.4)
        for other in factors[:i]:
            assert not torch.equal(one, other)


def test_factors_depend_on_the_name_and_not_on_the_position_or_dtype(device: torch.device) -> None:
    def fresh(dtype: torch.dtype = torch.float32) -> nn.Parameter:
        return nn.Parameter(torch.zeros(10, 12, device=device, dtype=dtype))

    one = right_factors([("x", fresh()), ("y", fresh())])
    other = right_factors([("y", fresh()), ("x", fresh())])
    wide = right_factors([("x", fresh(torch.float64))])
    assert_same_bits(one["0.m_A"], other["1.m_A"])
    assert_same_bits(one["1.v_A"], other["0.v_A"])
    assert_same_bits(wide["0.m_A"], one["0.m_A"].double())


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
