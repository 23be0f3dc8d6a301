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
    assert_same_bits,
    gradients,
    make_params,
    random_grads,
    relative_difference,
    set_grads,
    snapshot,
)
from _triton import exact_products, needs_triton, scalars_as_bounds, small_blocks  # noqa: F401
from lorapre import LoRAPreMuon, NonFiniteGradientError, estimate_memory
from lorapre.backends import dispatch
from lorapre.backends import triton as backend
from lorapre.backends.triton import table
from test_contract_capture import HostReads
from test_triton_limits import BUILD, Watch, isolated

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
            assert said == ["LoRAPreMuon skips a step: the gradient of parameter 'stack' holds inf or nan"]
        else:
            with pytest.raises(NonFiniteGradientError, match=r"'matrix' holds inf or nan.*the step before, which"):
                optimizer.settle()
    assert_same_bits(snapshot(optimizer), before)


def test_the_step_reads_nothing_back_from_the_device(device: torch.device) -> None:
    optimizer = build(((13, 20),), device, capturable=True, lr=torch.tensor(0.1, device=device))
    train(optimizer, 1)  # which counts the tiles of each shape, on the CPU
    with HostReads() as reads:
        optimizer.step()
    assert reads.found == []


def test_a_captured_graph_replays_the_bits_of_eager_launches(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs CUDA graphs")
    shapes: tuple[Shape, ...] = (*PAIR, (3, 32, 48), (7,))
    launched, captured = (build(shapes, device, capturable=True, ns_dtype=None) for _ in range(2))
    for optimizer in (launched, captured):
        for param in params_of(optimizer):
            param.grad = torch.zeros_like(param)

    def feed(optimizer: Any, number: int) -> None:
        for param, grad in zip(params_of(optimizer), random_grads(params_of(optimizer), number), strict=True):
            param.grad.copy_(grad)
        if number == 4:
            params_of(optimizer)[0].grad[0, 0] = torch.nan

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for number in range(3):
            feed(captured, number)
            captured.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for number in range(6):
        feed(launched, number)
        launched.step()
        if number >= 3:
            feed(captured, number)
            graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(snapshot(captured), snapshot(launched))


# What it costs.


def test_batches_below_the_limit_change_nothing_and_launches_grow_with_shapes_alone(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorapre.backends.triton import elements

    launches: list[str] = []
    kind = type(elements.fill)
    original = kind.run

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        launches.append(self.fn.__name__)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(kind, "run", counted)
    shapes: tuple[Shape, ...] = ((2, 13, 20), (20, 13), (13, 20))
    whole, parts = (build(shapes, device) for _ in range(2))
    train(whole, 1)
    # tall ones and wide ones are different shapes and share what is not a shape's
    assert len(launches) == 18 + 2 * 4
    launches.clear()
    monkeypatch.setattr(table, "LEAST_SCRATCH", 2 * table.orthogonal_bytes(13, 20, torch.float32))
    train(parts, 1)
    assert launches.count("momentum") == 3  # two of the three wide ones, another, and the tall one
    for (W, state), (expected, its_state) in zip(snapshot(parts), snapshot(whole), strict=True):
        assert_close(W, expected, 1e-6)
        for key, value in state.items():
            assert_close(value, its_state[key], 1e-6, key)


def test_of_a_matrix_s_size_there_are_the_iterates_of_newton_schulz_alone(device: torch.device) -> None:
    optimizer = build(((24, 203),), device, ns_dtype=torch.bfloat16)
    train(optimizer, 1)  # the addresses are known from here on
    (param,) = params_of(optimizer)
    numel = 24 * 208  # up to a multiple of 8

    found: list[int] = []

    class Sizes(Watch):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = super().__torch_dispatch__(func, types, args, kwargs)
            if func is torch.ops.aten.empty.memory_format:
                found.append(out.numel() * out.itemsize)
            return out

    with Sizes([param, param.grad]) as watch:  # type: ignore[list-item]
        optimizer.step()
    assert sorted(found)[-2:] == [2 * numel] * 2
    view = optimizer._view(param, optimizer.param_groups[0])
    foreseen = table.scratch_bytes(view, torch.float32) + table.orthogonal_bytes(24, 203, torch.bfloat16)
    assert 0.9 * watch.total <= foreseen + 4096
    assert foreseen <= 1.6 * watch.total


def test_the_estimate_of_memory_follows_the_backend() -> None:
    def scratch(shape: Shape, **options: Any) -> int:
        params = [torch.empty(shape, device="meta")]
        return estimate_memory([{"params": params}], 32, optimizer=LoRAPreMuon, **options).scratch

    shape = (2048, 5461)
    kernels = scratch(shape, backend="triton")
    iterates = 2 * 2 * (2048 * 5464 + 2048**2)  # bfloat16
    assert iterates < kernels < 1.1 * iterates
    assert kernels < 0.5 * scratch(shape, backend="eager")
    # stacks of them take turns
    assert scratch((8, *shape), backend="triton") < 2.5 * kernels


# Who steps.


def test_what_the_kernels_cannot_do_is_refused_in_words_and_left_to_batched_torch(
    device: torch.device, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reason(**options: Any) -> str:
        with pytest.raises(ValueError, match=r"backend='triton' cannot step .*\(13, 20\)") as raised:
            train(build(((13, 20),), device, **options), 1)
        return str(raised.value)

    assert "regression='newton'" in reason(regression="newton")
    assert "regression='tangent'" in reason(regression="tangent")
    assert "ns_dtype=torch.float64" in reason(ns_dtype=torch.float64)
    assert "residual_gain=0.1, with which the residual weighs 1;" in reason(residual_gain=0.1)
    assert "residual_gain=0.0" in reason(residual_gain=0.0, nesterov=False)
    assert "residual_gain=None" in reason(residual_gain=None, momentum=0.0)
    assert "float64" in reason(state_dtype=torch.float64)
    monkeypatch.setattr(dispatch, "MEASURED", {"adamw": {}, "muon": {device.type: 512}})
    monkeypatch.setattr(dispatch, "_said", set())
    with caplog.at_level(logging.INFO, logger="lorapre"):
        train(build(((13, 20),), device, backend="auto", regression="newton"), 2)
    (record,) = caplog.records
    assert "plain torch: regression='newton'; the kernels step Muon with 'subspace' only" in record.getMessage()


def test_auto_takes_the_kernels_where_muon_itself_was_measured(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = backend.open_step
    monkeypatch.setattr(backend, "open_step", lambda *args: calls.append(1) or original(*args))
    for measured, expected in (({}, 0), ({"muon": {device.type: 3}}, 0), ({"muon": {device.type: 4}}, 1)):
        calls.clear()
        monkeypatch.setattr(dispatch, "MEASURED", {"adamw": {device.type: 512}, "muon": {}, **measured})
        train(build(((13, 20),), device, backend="auto"), 1)
        assert len(calls) == expected


COMPILE = """
from lorapre.backends.triton import muon_pass

for target, rank, kind, out, precision in (
    (GPUTarget("cuda", 90, 32), 160, tl.bfloat16, tl.bfloat16, "tf32"),
    (GPUTarget("hip", "gfx942", 64), 20, tl.float32, tl.float32, "ieee"),
):
    narrow = kind == tl.bfloat16
    block = table.blocks(table.UPDATE, rank, 2 if narrow else 4)
    made = build(muon_pass.momentum, target, block, G_TYPE=kind, S_TYPE=tl.float32, M_TYPE=out, R=rank,
                 BLOCK_R=block.rank, BLOCK_P=block.rows, BLOCK_Q=block.cols, NEGATE=narrow, X_IN_STATE=True,
                 L_IN_STATE=not narrow, ORDER=1, BF16=narrow, MOMENTUM_PRECISION=precision, LEFT_PRECISION=precision)
    build(muon_pass.normalize, target, M_TYPE=out, BLOCK=table.ELEMENTS)
    block = table.MUON_LENGTHS
    build(muon_pass.lengths, target, block, S_TYPE=kind, BLOCK=block.rows, OTHER=block.cols, BY_ROW=narrow)
    block = table.MUON_WEIGHTS
    build(muon_pass.turn, target, block, W_TYPE=kind, BLOCK_P=block.rows, BLOCK_Q=block.cols, NORMALIZED=True,
          BY_ROW=narrow, STOCHASTIC=narrow, ROUNDS=7, ORDER=2 if narrow else 1)
    print(*sorted(made.asm.keys() & {"cubin", "hsaco"}), made.metadata.shared <= 227 * 1024)
"""


def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path: Any) -> None:
    # The interpreter takes what the compiler does not.
    pytest.importorskip("triton.backends.nvidia")
    assert isolated(BUILD + COMPILE, TRITON_CACHE_DIR=str(tmp_path)) == "cubin True\nhsaco True"
