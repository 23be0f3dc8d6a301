"""The Triton step of Muon against the formulas in float64 and the eager step: interpreted, or on a GPU."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from _formulas import MomentumRun
from _support import (
    Shape,
    assert_close,
    assert_replays_have_the_bits_of_launches,
    assert_same_bits,
    gradients,
    make_params,
    random_grads,
    relative_difference,
    set_grads,
    snapshot,
)
from _triton import exact_products, needs_triton, scalars_as_bounds, small_blocks  # noqa: F401
from lorapre import LoRAPreMuon, NonFiniteGradientError
from lorapre.backends.triton import table
from test_contract_capture import HostReads

pytestmark = needs_triton

#: A large rate, so that a weight is what the updates made of it; nothing can be said of bfloat16's iterates at 1e-5.
OPTIONS: dict[str, Any] = {"lr": 0.1, "rank": 4, "ns_dtype": torch.float32, "weight_decay": 0.0}
PAIR: tuple[Shape, ...] = ((20, 13), (13, 20))


def build(shapes: tuple[Shape, ...], device: torch.device, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    return LoRAPreMuon(make_params(shapes, dtype, device), **{**OPTIONS, "backend": "triton", **more})


def params_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def train(optimizer: torch.optim.Optimizer, steps: int, seed: int = 0, size: float = 1.0) -> None:
    params = params_of(optimizer)
    streams = [gradients(tuple(param.shape), steps, seed=seed + i) for i, param in enumerate(params)]
    for grads in zip(*streams, strict=True):
        set_grads(params, [size * grad for grad in grads])
        optimizer.step()


def transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT


@dataclass(frozen=True)
class Case:
    name: str
    shapes: tuple[Shape, ...]
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 2
    transposed_weights: bool = False
    transposed_grads: bool = False
    missing: frozenset[tuple[int, int]] = frozenset()
    tensor_lr: bool = False

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


CASES = [
    Case("tall, wide and square", (*PAIR, (16, 16))),
    Case("stacks beside a matrix of their shape", ((2, 13, 20), (13, 20)), options={"rank": 3}),
    Case("2-d convolution", ((10, 3, 2, 2),)),
    Case("1-d convolution flattened", ((12, 5, 3),), options={"view_3d": "flatten"}),
    Case("rank one", ((13, 20),), options={"rank": 1}),
    Case("rank close to the smaller side", ((20, 13),), options={"rank": 12}),
    Case("transposed", ((20, 13), (32, 16)), transposed_weights=True, transposed_grads=True),
    Case("transposed gradients", ((16, 32),), transposed_grads=True),
    Case("even rows, as torch scales them", PAIR, options={"normalization": "rows", "adjust_lr_fn": "original"}),
    Case("no averages", ((13, 20),), options={"normalization": "none"}),
    Case("a slow average, maximize", ((20, 13),), options={"betas": (0.9, 0.5), "maximize": True, "weight_decay": 0.5}),
    Case("no look ahead", ((13, 20),), options={"nesterov": False, "scale": 0.5, "weight_decay": 0.5}),
    Case("the paper's residual", ((13, 20),), options={"residual_gain": None}),
    Case("the paper's residual, no look ahead", ((13, 20),), options={"residual_gain": None, "nesterov": False}),
    Case("no residual", ((13, 20),), options={"residual_gain": 0.0}),
    Case("no memory", ((13, 20),), options={"momentum": 0.0}),
    Case("an even number of iterations", ((20, 13),), options={"ns_steps": 2}),
    Case(
        "gradients missing, counted on the device",
        ((13, 20), (13, 20)),
        options={"capturable": True, "weight_decay": 0.5},
        steps=3,
        missing=frozenset({(0, 0), (1, 2)}),
        tensor_lr=True,
    ),
]


def run_beside_the_formulas(case: Case, device: torch.device) -> None:
    options = {**OPTIONS, "backend": "triton", **case.options}
    params = make_params(case.shapes, torch.float32, device)
    if case.transposed_weights:
        params = [nn.Parameter(transposed(param.detach())) for param in params]
    if case.tensor_lr:
        options["lr"] = torch.tensor(options["lr"], device=device)
    optimizer = LoRAPreMuon(params, **options)
    runs = [MomentumRun(optimizer, param, optimizer.param_groups[0]) for param in params]
    streams = [gradients(shape, case.steps, seed=i) for i, shape in enumerate(case.shapes)]
    for step in range(case.steps):
        for i, (param, run, stream) in enumerate(zip(params, runs, streams, strict=True)):
            grad = next(stream).to(device, torch.float32)
            if (i, step) in case.missing:
                param.grad = None
                continue
            param.grad = transposed(grad) if case.transposed_grads else grad
            run.step(grad)
        optimizer.step()
    for param, run in zip(params, runs, strict=True):
        run.check(optimizer, param, 1e-5)
        for key in ("u_row", "u_col"):
            if key in optimizer.state[param]:
                average, size = optimizer.state[param][key], run._size(run.W[0])  # the formulas' come after the scale
                assert_close(average, torch.stack(run.u).reshape(average.shape) / size**2, 1e-5, key)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_step_is_that_of_the_formulas(case: Case, device: torch.device) -> None:
    run_beside_the_formulas(case, device)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    "case",
    [
        Case("tall", ((70, 40),), {"rank": 20}, steps=1),
        Case("wide", ((40, 70),), {"rank": 20, "normalization": "rows"}, transposed_weights=True, steps=1),
    ],
    ids=str,
)
def test_the_cuts_into_blocks_and_tiles_change_nothing(
    case: Case, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "MUON_LENGTHS", table.Blocks(16, 32, 0, 4, 1))
    monkeypatch.setattr(table, "MUON_WEIGHTS", table.Blocks(16, 32, 0, 4, 1))
    run_beside_the_formulas(case, device)


@pytest.mark.parametrize(("exponent", "steps"), [(-24, 1), (15, 2)])
def test_the_scale_of_the_gradients_means_nothing(exponent: int, steps: int, device: torch.device) -> None:
    # 1e-24 squared is nothing in float32: the bases, as in batched torch, stay what they are then
    usual, scaled = (build(((13, 20),), device) for _ in range(2))
    train(usual, steps)
    train(scaled, steps, size=10.0**exponent)
    assert_close(params_of(scaled)[0], params_of(usual)[0], 1e-5)


def test_zero_gradients_leave_a_fresh_matrix_where_it_is(device: torch.device) -> None:
    optimizer = build(((13, 20),), device)
    (param,) = params_of(optimizer)
    before = param.detach().clone()
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert_same_bits(param.detach(), before)
    assert all(value.isfinite().all() for value in optimizer.state[param].values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_newton_schulz_iterates_in_the_dtype_it_is_given(dtype: torch.dtype, device: torch.device) -> None:
    moved = {}
    for ns_dtype, name in ((dtype, "triton"), (dtype, "eager"), (torch.float32, "eager")):
        optimizer = build(((20, 13),), device, ns_dtype=ns_dtype, backend=name, residual_gain=None)
        start = params_of(optimizer)[0].detach().clone()
        train(optimizer, 1)
        moved[ns_dtype, name] = params_of(optimizer)[0].detach() - start
    exact = moved[torch.float32, "eager"]
    ours, theirs = (relative_difference(moved[dtype, name], exact) for name in ("triton", "eager"))
    assert 1e-5 < ours < 2 * theirs < 0.1


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16], ids=str)
def test_narrow_weights_are_rounded_to_nearest(state_dtype: torch.dtype | None, device: torch.device) -> None:
    shapes: tuple[Shape, ...] = ((20, 13), (24, 32))
    ours, theirs = (
        build(shapes, device, torch.bfloat16, state_dtype=state_dtype, weight_decay=0.5, backend=name)
        for name in ("triton", "eager")
    )
    for optimizer in (ours, theirs):
        train(optimizer, 1)
    for (W, state), (expected, its_state) in zip(snapshot(ours), snapshot(theirs), strict=True):
        # float32 puts a handful of numbers on the other side of the middle between two
        assert (expected != W).float().mean() < 0.02
        assert_close(W, expected, 1e-3)
        for key, value in state.items():
            assert value.dtype == its_state[key].dtype
            assert_close(value, its_state[key], 1e-4 if state_dtype is None else 1e-2, key)


@pytest.mark.parametrize("capturable", [False, True])
def test_for_one_update_both_backends_round_to_the_same_bits_by_chance(capturable: bool, device: torch.device) -> None:
    results = []
    for name in ("eager", "triton"):
        params = make_params(((12, 18), (2, 11, 7), (40,)), torch.bfloat16, device)
        params[0].data = transposed(params[0].data)
        optimizer = LoRAPreMuon(
            params, lr=0.1, rank=2, weight_decay=1.0, stochastic_rounding=True, backend=name, capturable=capturable
        )
        set_grads(params, [torch.zeros_like(param) for param in params])
        optimizer.step()  # the weights decay, and nothing else
        results.append([param.detach().clone() for param in params])
    assert_same_bits(*results)


# What is late.

NAMES = ("matrix", "stack", "vector")
THREE: tuple[Shape, ...] = ((9, 13), (2, 8, 6), (7,))


def named(device: torch.device, **more: Any) -> Any:
    params = make_params(THREE, torch.float32, device)
    options = {**OPTIONS, "rank": 2, "weight_decay": 0.1, "backend": "triton", **more}
    return LoRAPreMuon(list(zip(NAMES, params, strict=True)), **options)


def step(optimizer: Any, seed: int, bad: int | None = None) -> None:
    grads = random_grads(params_of(optimizer), seed)
    if bad is not None:
        grads[bad].view(-1)[3] = float("nan")
    set_grads(params_of(optimizer), grads)
    optimizer.step()


@pytest.mark.parametrize(
    ("bad", "turns", "nonfinite"), [(0, False, "raise"), (1, True, "skip")], ids=["at once", "in turns"]
)
def test_a_bad_step_changes_nothing_and_the_next_call_says_which_gradient_it_was(
    bad: int,
    turns: bool,
    nonfinite: str,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if turns:
        monkeypatch.setattr(table, "scratch_limit", lambda _: 1)
    optimizer = named(device, nonfinite=nonfinite)
    step(optimizer, 0)
    optimizer.settle()
    before = snapshot(optimizer)
    with caplog.at_level(logging.WARNING, logger="lorapre"):
        step(optimizer, 1, bad)
        assert not caplog.records
        if nonfinite == "skip":
            optimizer.settle()
            said = [record.getMessage() for record in caplog.records]
            assert said == [
                "LoRAPreMuon skips a step: the gradient of parameter 'stack' holds inf or nan, or its squares do"
            ]
        else:
            with pytest.raises(NonFiniteGradientError, match=r"'matrix' holds inf or nan.*the step before, which"):
                optimizer.settle()
    assert_same_bits(snapshot(optimizer), before)


def test_the_step_reads_nothing_back_from_the_device(device: torch.device) -> None:
    optimizer = build(((13, 20),), device, capturable=True, lr=torch.tensor(0.1, device=device))
    train(optimizer, 1)  # which counts the tiles of each shape, on the CPU
    with HostReads(device) as reads:
        optimizer.step()
    assert reads.found == []


def test_a_captured_graph_replays_the_bits_of_eager_launches(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs CUDA graphs")
    shapes: tuple[Shape, ...] = (*PAIR, (3, 32, 48), (7,))
    launched, captured = (build(shapes, device, capturable=True, ns_dtype=None) for _ in range(2))

    def feed(optimizer: Any, number: int) -> None:
        for param, grad in zip(params_of(optimizer), random_grads(params_of(optimizer), number), strict=True):
            param.grad.copy_(grad)
        if number == 4:
            params_of(optimizer)[0].grad[0, 0] = torch.nan

    assert_replays_have_the_bits_of_launches(launched, captured, feed, steps=6)
