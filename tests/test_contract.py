"""The contract of torch.optim: what schedulers, scalers, trainers and checkpoints may rely on."""

from __future__ import annotations

import copy
import inspect
import io
import logging
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau
from torch.utils._python_dispatch import TorchDispatchMode

from _support import (
    ReferenceRun,
    assert_close,
    assert_same_bits,
    clone_params,
    gradients,
    make_params,
    random_grads,
    relative_difference,
    set_grads,
    snapshot,
    train,
)
from lorapre import LoRAPreAdamW, reference
from lorapre.optim import adamw as adamw_module

SHAPES = ((12, 20), (20, 12), (2, 8, 10), (7,), ())  # two matrices, a stack, two dense parameters


def build(device: torch.device, dtype: torch.dtype = torch.float32, shapes: Any = SHAPES, **options: Any) -> Any:
    return LoRAPreAdamW(make_params(shapes, dtype, device), rank=3, **options)


def params_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def model_of(device: torch.device) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8)).to(device)


# Closures, groups, schedulers, scalers.


def test_a_closure_is_evaluated_with_gradients_and_its_value_returned(device: torch.device) -> None:
    model, x = model_of(device), torch.ones(3, 6, device=device)
    optimizer = LoRAPreAdamW(model.parameters(), rank=2)
    seen: list[bool] = []

    def closure() -> Tensor:
        seen.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    before = model(x).square().sum()
    with torch.no_grad():
        returned = optimizer.step(closure)  # type: ignore[arg-type]
    assert seen == [True]
    assert_same_bits(returned.detach(), before.detach())
    assert not torch.equal(model(x).square().sum(), before), "the gradients of the closure are used"
    assert optimizer.step() is None
    model[0].weight.grad.fill_(torch.nan)
    optimizer.param_groups[0]["nonfinite"] = "skip"
    assert optimizer.step(lambda: 3.5) == 3.5, "a skipped step returns the loss too"


def test_an_added_group_has_state_at_once_and_options_of_its_own(device: torch.device) -> None:
    optimizer = build(device, shapes=SHAPES[:1], lr=1e-3)
    late = make_params([(9, 11), (5,)], torch.float32, device)
    optimizer.add_param_group({"params": late, "rank": 2, "lr": 0.5, "second_moment": "full"})
    assert set(optimizer.state[late[0]]) == {"step", "m_B", "m_A", "exp_avg_sq"}
    assert optimizer.state[late[0]]["m_B"].shape == (9, 2)
    assert set(optimizer.state[late[1]]) == {"step", "exp_avg", "exp_avg_sq"}
    assert optimizer.param_groups[1]["eps"] == optimizer.defaults["eps"]
    run = ReferenceRun(optimizer, late[0], optimizer.param_groups[1])
    for grad in gradients((9, 11), 5):
        late[0].grad = grad.to(device, torch.float32)
        run.step(late[0].grad)
        optimizer.step()
    run.check(optimizer, late[0], 1e-5)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda p: {"params": p, "rank": 0}, ValueError, "rank: 0"),
        (lambda p: {"params": p, "damping": 0.0}, ValueError, "damping value: 0.0"),
        (lambda p: {"params": [torch.nn.Parameter(torch.ones(3, dtype=torch.cfloat))]}, TypeError, "complex"),
        (
            lambda p: {"params": [*p, torch.nn.Parameter(torch.ones(3, 3, dtype=torch.cfloat))]},
            TypeError,
            "complex64",
        ),
        (lambda p: [p], TypeError, "dict"),
    ],
)
def test_a_group_that_is_refused_leaves_no_trace(
    make: Callable[[Any], Any], error: type[Exception], match: str, device: torch.device
) -> None:
    optimizer = build(device)
    before, late = snapshot(optimizer), make_params([(9, 11)], torch.float32, device)
    with pytest.raises(error, match=match):
        optimizer.add_param_group(make(late))
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.state) == len(SHAPES)
    assert_same_bits(snapshot(optimizer), before)
    optimizer.add_param_group({"params": late})  # it can still be added


def displacement(optimizer: Any, steps: int, after: Callable[[int], None]) -> list[list[Tensor]]:
    """What each step moved every parameter by."""
    moved, params = [], params_of(optimizer)
    for step in range(steps):
        before = clone_params(params)
        set_grads(params, random_grads(params, step))
        optimizer.step()
        moved.append([(new - old).detach() for new, old in zip(params, before, strict=True)])
        after(step)
    return moved


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: LambdaLR(optimizer, lambda step: 1.0 / (1 + step)),
        lambda optimizer: OneCycleLR(optimizer, max_lr=0.1, total_steps=8, cycle_momentum=False),
        lambda optimizer: ReduceLROnPlateau(optimizer, factor=0.5, patience=0),
    ],
    ids=["LambdaLR", "OneCycleLR", "ReduceLROnPlateau"],
)
def test_schedulers_change_the_size_of_the_step(schedule: Any, tensor_lr: bool, device: torch.device) -> None:
    lr: Any = torch.tensor(0.1, dtype=torch.float64) if tensor_lr else 0.1
    # no decay: the direction then depends on the gradients alone, and each step is lr times one of a plain run
    options = {"dtype": torch.float64, "weight_decay": 0.0, "shapes": SHAPES}
    scheduled, plain = build(device, lr=lr, **options), build(device, lr=1.0, **options)
    scheduler = schedule(scheduled)
    rates: list[float] = []

    def after(step: int) -> None:
        scheduler.step(*([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
        rates.append(float(scheduled.param_groups[0]["lr"]))

    rates.append(float(scheduled.param_groups[0]["lr"]))
    moved = displacement(scheduled, 5, after)
    directions = displacement(plain, 5, lambda step: None)
    assert len(set(rates)) >= 3
    for rate, steps, units in zip(rates, moved, directions, strict=False):
        for step, unit in zip(steps, units, strict=True):
            assert_close(step, rate * unit, 1e-9)


def test_one_cycle_momentum_changes_beta1_of_the_next_step(device: torch.device) -> None:
    optimizer = build(device)
    scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=8, base_momentum=0.5, max_momentum=0.8)
    param = params_of(optimizer)[0]
    run = ReferenceRun(optimizer, param, optimizer.param_groups[0])
    for grad in gradients((12, 20), 6):
        assert optimizer.param_groups[0]["betas"][0] <= 0.8
        param.grad = grad.to(device, torch.float32)
        run.step(param.grad)
        optimizer.step()
        scheduler.step()
    run.check(optimizer, param, 1e-5)


def test_a_grad_scaler_trains_like_no_scaler_and_leaves_out_overflowing_steps(device: torch.device) -> None:
    x = torch.randn(5, 6, device=device)
    plain_model, scaled_model = model_of(device), model_of(device)
    plain, scaled = (LoRAPreAdamW(model.parameters(), rank=2) for model in (plain_model, scaled_model))
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=100)
    for step in range(6):
        overflow = step == 2
        scaled.zero_grad()
        scaler.scale(scaled_model(x).square().sum()).backward()
        if overflow:
            scaled_model[0].weight.grad[0, 0] = torch.inf
        before = snapshot(scaled)
        scaler.step(scaled)
        scaler.update()
        if overflow:
            assert_same_bits(snapshot(scaled), before)
            assert scaler.get_scale() == 2.0**9
            continue
        plain.zero_grad()
        plain_model(x).square().sum().backward()
        plain.step()
    # scales are powers of two: nothing is rounded
    assert_same_bits(snapshot(scaled), snapshot(plain))


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_tensor_lr_means_its_value(
    dtype: torch.dtype, shape: tuple[int, ...], capturable: bool, device: torch.device
) -> None:
    by_value = build(device, lr=0.03, capturable=capturable)
    by_tensor = build(device, lr=torch.full(shape, 0.03, dtype=dtype, device=device), capturable=capturable)
    train(by_value, 2)
    train(by_tensor, 2)
    for optimizer in (by_value, by_tensor):
        group = optimizer.param_groups[0]
        group["lr"] = group["lr"].fill_(0.5) if isinstance(group["lr"], Tensor) else 0.5
        train(optimizer, 2, seed=1)
    for a, b in zip(params_of(by_tensor), params_of(by_value), strict=True):
        assert_close(a, b, 1e-5)


def test_zero_lr_changes_no_weight_but_advances_the_state(device: torch.device) -> None:
    optimizer = build(device, lr=0.0)
    before = snapshot(optimizer)
    train(optimizer, 1)
    for (new, state), (old, _) in zip(snapshot(optimizer), before, strict=True):
        assert_same_bits(new, old)
        assert state["step"].item() == 1
    assert params_of(optimizer)[0] in optimizer.state


@pytest.mark.parametrize("capturable", [False, True])
def test_maximize_ascends_where_minimising_the_negated_gradient_descends(
    capturable: bool, device: torch.device
) -> None:
    up = build(device, maximize=True, weight_decay=0.1, capturable=capturable)
    down = build(device, weight_decay=0.1, capturable=capturable)
    for step in range(4):
        grads = random_grads(params_of(up), step)
        set_grads(params_of(up), grads)
        set_grads(params_of(down), [-grad for grad in grads])
        up.step()
        down.step()
    assert_same_bits(snapshot(up), snapshot(down))


@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"capturable": True}, {"second_moment": "full"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_never_written_to(options: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    optimizer = build(device, dtype, **options)
    set_grads(params_of(optimizer), random_grads(params_of(optimizer), 1))
    before = [param.grad.clone() for param in params_of(optimizer)]
    optimizer.step()
    assert_same_bits([param.grad for param in params_of(optimizer)], before)


# Capturable.


@pytest.mark.parametrize("second_moment", ["hadamard", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_capturable_is_the_same_optimizer_to_rounding(
    dtype: torch.dtype, second_moment: str, device: torch.device
) -> None:
    plain, graphable = (
        build(device, dtype, capturable=capturable, second_moment=second_moment, weight_decay=0.1)
        for capturable in (False, True)
    )
    for step in range(10):
        for optimizer in (plain, graphable):
            params = params_of(optimizer)
            set_grads(params, random_grads(params, step))
            params[step % 4].grad = None
            optimizer.step()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for (W, state), (expected, other) in zip(snapshot(graphable), snapshot(plain), strict=True):
        # torch's dense path keeps float32 bias corrections on the device
        assert_close(W, expected, tolerance if W.ndim >= 2 else 1e-6, f"W {tuple(W.shape)}")
        for key, value in state.items():
            assert_close(value, other[key], tolerance, key)
    assert all(graphable.state[param]["step"].device == param.device for param in params_of(graphable))


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("where", [0, 2, 3], ids=["matrix", "stack", "vector"])
@pytest.mark.parametrize("options", [{}, {"second_moment": "full"}, {"eps": 0.0}, {"maximize": True}], ids=str)
def test_a_capturable_step_with_nonfinite_gradients_is_a_no_op(
    options: dict[str, Any], where: int, bad: float, device: torch.device
) -> None:
    for trained in (0, 2):
        optimizer = build(device, capturable=True, weight_decay=0.1, **options)
        train(optimizer, trained)
        before = snapshot(optimizer)
        params = params_of(optimizer)
        set_grads(params, random_grads(params, 50))
        params[where].grad.view(-1)[1] = bad
        optimizer.step()
        assert_same_bits(snapshot(optimizer), before)
        train(optimizer, 1, seed=1)  # and the next one works
        for (W, state), (old, _) in zip(snapshot(optimizer), before, strict=True):
            assert W.isfinite().all()
            assert not torch.equal(W, old)
            assert state["step"].item() == trained + 1


class HostReads(TorchDispatchMode):
    """Counts operators that wait for the device to hand a value to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"second_moment": "full"}, {"damping_mode": "absolute"}], ids=str)
def test_a_capturable_step_reads_nothing_back_from_the_device(options: dict[str, Any], device: torch.device) -> None:
    # what a CUDA graph refuses at capture, found without a GPU
    lr = torch.tensor(1e-2, device=device)
    optimizer = build(device, shapes=(*SHAPES, (3, 12, 20)), capturable=True, lr=lr, weight_decay=0.1, **options)
    set_grads(params_of(optimizer), random_grads(params_of(optimizer), 0))
    with HostReads() as reads:
        optimizer.step()
    assert reads.found == []
    with HostReads() as reads:
        torch._foreach_add_([torch.zeros(())], torch.ones(()))  # the probe sees what it is for
    assert reads.found


def test_a_captured_graph_replays_the_bits_of_eager_launches(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs CUDA graphs")
    shapes = (*SHAPES, (3, 12, 20), (12, 20))
    lr = torch.tensor(1e-2, device=device)
    eager_run = build(device, shapes=shapes, capturable=True, lr=lr.clone())
    captured = build(device, shapes=shapes, capturable=True, lr=lr.clone())
    for optimizer in (eager_run, captured):
        for param in params_of(optimizer):
            param.grad = torch.zeros_like(param)

    def feed(optimizer: Any, step: int) -> None:
        for param, grad in zip(params_of(optimizer), random_grads(params_of(optimizer), step), strict=True):
            param.grad.copy_(grad)
        if step == 7:
            params_of(optimizer)[0].grad[0, 0] = torch.nan
        optimizer.param_groups[0]["lr"].fill_(1e-2 / (1 + step))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in range(3):
            feed(captured, step)
            captured.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for step in range(10):
        feed(eager_run, step)
        eager_run.step()
        if step >= 3:
            feed(captured, step)
            graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(snapshot(captured), snapshot(eager_run))


def test_a_capture_without_capturable_is_refused_before_anything_changes(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what torch says inside torch.cuda.graph(...)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    params = make_params(SHAPES[:2], torch.float32, device)
    mixed = LoRAPreAdamW([{"params": params[:1], "capturable": True}, {"params": params[1:]}], rank=3)
    for optimizer in (build(device), mixed):
        set_grads(params_of(optimizer), random_grads(params_of(optimizer), 0))
        before = snapshot(optimizer)
        with pytest.raises(RuntimeError, match=r"captured in a CUDA graph.*Build it with capturable=True"):
            optimizer.step()
        assert_same_bits(snapshot(optimizer), before)
    monkeypatch.undo()
    train(mixed, 1)


def test_a_group_may_be_capturable_beside_one_that_is_not(device: torch.device) -> None:
    params = make_params(SHAPES[:2], torch.float32, device)
    optimizer = LoRAPreAdamW([{"params": params[:1], "capturable": True}, {"params": params[1:]}], rank=3)
    train(optimizer, 2)
    before = snapshot(optimizer)
    params[0].grad.fill_(torch.nan)
    optimizer.step()  # the capturable group's default is to skip
    assert_same_bits(snapshot(optimizer), before)
    params[0].grad.fill_(1.0)
    params[1].grad.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="'1'"):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)


# Gradients that are missing, sparse, zero, not finite.


def test_a_parameter_without_gradient_keeps_its_value_and_state(device: torch.device) -> None:
    for capturable in (False, True):
        optimizer = build(device, capturable=capturable, weight_decay=0.5)
        train(optimizer, 2)
        before = snapshot(optimizer)
        set_grads(params_of(optimizer), [None] * len(SHAPES))
        optimizer.step()
        assert_same_bits(snapshot(optimizer), before)
        params_of(optimizer)[1].grad = torch.ones(20, 12, device=device)
        optimizer.step()
        for i, (new, old) in enumerate(zip(snapshot(optimizer), before, strict=True)):
            assert new[1]["step"].item() == (3 if i == 1 else 2)
            if i != 1:
                assert_same_bits(new, old)


@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=str)
def test_sparse_gradients_are_refused_before_anything_changes(options: dict[str, Any], device: torch.device) -> None:
    embedding = nn.Embedding(12, 8, sparse=True, device=device)
    dense = make_params([(12, 20)], torch.float32, device)[0]
    optimizer = LoRAPreAdamW([("dense", dense), ("table", embedding.weight)], rank=3, **options)
    dense.grad = torch.ones_like(dense)
    embedding(torch.tensor([1, 2], device=device)).sum().backward()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"sparse gradients \(parameter 'table'\).*sparse=False"):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("where", range(4))
@pytest.mark.parametrize("named", [False, True], ids=["indexed", "named"])
def test_nonfinite_gradients_change_nothing(
    named: bool, where: int, bad: float, dtype: torch.dtype, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    params = make_params(SHAPES, dtype, device)
    given: Any = [(f"layer.{i}", param) for i, param in enumerate(params)] if named else params
    optimizer = LoRAPreAdamW(given, rank=3)
    label = f"layer.{where}" if named else str(where)
    train(optimizer, 2)
    before = snapshot(optimizer)
    params[where].grad.view(-1)[-1] = bad
    with pytest.raises(RuntimeError, match=f"'{label}' holds inf or nan. Nothing was changed"):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)
    optimizer.param_groups[0]["nonfinite"] = "skip"
    with caplog.at_level(logging.WARNING, logger="lorapre"):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)
    assert [record.getMessage() for record in caplog.records] == [
        f"LoRAPreAdamW skips a step: the gradient of parameter {label!r} holds inf or nan"
    ]


def test_a_float64_gradient_beyond_float32s_range_is_finite(device: torch.device) -> None:
    optimizer = build(device, torch.float64)
    set_grads(params_of(optimizer), random_grads(params_of(optimizer), 0))
    params_of(optimizer)[0].grad.mul_(1e60)
    optimizer.step()
    assert all(W.isfinite().all() for W, _ in snapshot(optimizer))
    assert optimizer.state[params_of(optimizer)[0]]["step"].item() == 1


@pytest.mark.parametrize("mode", ["relative", "absolute"])
def test_zero_gradients_on_a_fresh_state_only_decay_the_weights(mode: str, device: torch.device) -> None:
    # what torch.distributed.checkpoint does to an optimizer whose state is empty, with lr 0
    optimizer = build(device, torch.float64, lr=0.1, weight_decay=0.5, damping_mode=mode)
    params, start = params_of(optimizer), [W for W, _ in snapshot(optimizer)]
    for _ in range(3):
        set_grads(params, [torch.zeros(param.shape) for param in params])
        optimizer.step()
    for param, old in zip(params, start, strict=True):
        assert_close(param, old * 0.95**3, 1e-12)
        assert all(value.isfinite().all() for value in optimizer.state[param].values())
    run = ReferenceRun(optimizer, params[0], optimizer.param_groups[0])
    for grad in gradients((12, 20), 10):  # training then goes on as the algorithm does from this state
        params[0].grad = grad.to(device)
        run.step(grad)
        optimizer.step()
    run.check(optimizer, params[0], 1e-10)


@pytest.mark.parametrize("idle_steps", [200, 1000])
def test_weights_stay_bounded_when_gradients_return_after_a_pause(idle_steps: int, device: torch.device) -> None:
    optimizer = build(device, shapes=[(32, 48)], lr=1e-3, weight_decay=0.0)
    param = params_of(optimizer)[0]
    stream = gradients((32, 48), 60)
    largest = 0.0
    for step, grad in enumerate(stream):
        if step == 30:
            param.grad = torch.zeros_like(param)
            for _ in range(idle_steps):
                optimizer.step()
        before = param.detach().clone()
        param.grad = grad.to(device, torch.float32)
        optimizer.step()
        assert all(value.isfinite().all() for value in optimizer.state[param].values())
        if step >= 30:
            largest = max(largest, (param.detach() - before).abs().max().item() / 1e-3)
    # algorithm.md, section 5.2: peaks above 1,000 belong to Algorithm 1 at its start
    assert largest < 1e4


def test_after_thousands_of_zero_gradients_momentum_follows_new_ones(device: torch.device) -> None:
    # an expert that no token reaches: both factors shrink by sqrt(beta) a step, to where float32 ends
    u, v = torch.randn(10, 1, device=device), torch.randn(1, 14, device=device)
    idle, fresh = (build(device, shapes=[(10, 14)]) for _ in range(2))
    train(idle, 3)
    param = params_of(idle)[0]
    param.grad = torch.zeros_like(param)
    for _ in range(3000):
        idle.step()
    for optimizer in (idle, fresh):
        params_of(optimizer)[0].grad = u @ v
        for _ in range(60):
            optimizer.step()
        state = optimizer.state[params_of(optimizer)[0]]
        assert_close(state["m_B"] @ state["m_A"], u @ v, 0.05, "m follows the gradient")
        assert_close(state["v_B"] @ state["v_A"], (u @ v).abs(), 0.3, "sqrt(v) follows its size")
        assert all(value.isfinite().all() for value in state.values())


# Saving, loading, copying.


def save_and_load(state: Any, tmp_path: Path) -> Any:
    torch.save(state, tmp_path / "checkpoint.pt")
    return torch.load(tmp_path / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"second_moment": "full"},
        {"capturable": True},
        {"state_dtype": torch.bfloat16},
        {"lr": torch.tensor(1e-2)},
        {"damping_mode": "absolute", "bias_correction": "paper", "rank": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_resuming_from_a_file_is_exact(
    options: dict[str, Any], dtype: torch.dtype, device: torch.device, tmp_path: Path
) -> None:
    if "lr" in options:
        options = {**options, "lr": options["lr"].clone()}
    options = {"rank": 3, **options}
    original = LoRAPreAdamW(make_params(SHAPES, dtype, device), **options)
    train(original, 3)
    saved = {"optimizer": original.state_dict(), "weights": [W for W, _ in snapshot(original)]}
    loaded = save_and_load(saved, tmp_path)
    train(original, 4, seed=9)

    resumed = LoRAPreAdamW(make_params(SHAPES, dtype, device, seed=5), **{**options, "seed": 77})
    with torch.no_grad():
        for param, weight in zip(params_of(resumed), loaded["weights"], strict=True):
            param.copy_(weight)
    resumed.load_state_dict(loaded["optimizer"])
    train(resumed, 4, seed=9)
    assert_same_bits(snapshot(resumed), snapshot(original))
    assert resumed.param_groups[0]["seed"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_state_keeps_its_dtype_through_training_and_loading(
    dtype: torch.dtype, state_dtype: torch.dtype | None, device: torch.device
) -> None:
    expected = state_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
    optimizer = build(device, dtype, state_dtype=state_dtype)

    def check() -> None:
        for param in params_of(optimizer):
            assert param.dtype == dtype
            for key, value in optimizer.state[param].items():
                assert value.dtype == (torch.float32 if key == "step" else expected), key
                assert value.isfinite().all()

    check()
    train(optimizer, 2)
    check()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    check()
    assert_same_bits([state for _, state in snapshot(optimizer)], list(saved["state"].values()))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"second_moment": "full"}], ids=str)
def test_a_copied_optimizer_trains_identically(how: str, options: dict[str, Any], device: torch.device) -> None:
    original = build(device, **options)
    original.add_param_group({"params": make_params([(6, 9)], torch.float32, device), "compress": False})
    train(original, 3)
    if how == "deepcopy":
        twin = copy.deepcopy(original)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(original))
    else:
        buffer = io.BytesIO()
        torch.save(original, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert all(a is not b for a, b in zip(params_of(original), params_of(twin), strict=True))
    for optimizer in (original, twin):
        train(optimizer, 3, seed=4)
    assert_same_bits(snapshot(twin), snapshot(original))
    assert twin.param_groups[1]["compress"] is False
    twin.load_state_dict(copy.deepcopy(original.state_dict()))
    assert str(twin.summary()) == str(original.summary())


def adamw_state(optimizer: Any) -> Any:
    other = torch.optim.AdamW(clone_params(params_of(optimizer)))
    train(other, 1)
    return other.state_dict()


def transposed(optimizer: Any) -> Any:
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["m_B"] = state["state"][0]["m_B"].T
    return state


def wrong_dense(optimizer: Any) -> Any:
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][3]["exp_avg"] = torch.zeros(8)
    return state


def without(key: str) -> Callable[[Any], Any]:
    def remove(optimizer: Any) -> Any:
        state = copy.deepcopy(optimizer.state_dict())
        del state["state"][1][key]
        return state

    return remove


def empty_state(optimizer: Any) -> Any:
    return {**optimizer.state_dict(), "state": {}}


def other_model(optimizer: Any) -> Any:
    shapes = ((12, 20), (20, 14), *SHAPES[2:])
    return build(torch.device("cpu"), shapes=shapes).state_dict()


@pytest.mark.parametrize("named", [False, True], ids=["indexed", "named"])
@pytest.mark.parametrize(
    ("foreign", "where", "message"),
    [
        (adamw_state, 0, r"lacks m_A, m_B, v_A, v_B \(it holds exp_avg, exp_avg_sq, step\)"),
        (transposed, 0, r"m_B .* has shape \(3, 12\); a weight of shape \(12, 20\) at rank 3 needs \(12, 3\)"),
        (wrong_dense, 3, r"exp_avg .* has shape \(8,\)"),
        (without("step"), 1, "lacks step"),
        (without("v_A"), 1, "lacks v_A"),
        (empty_state, 0, "it holds nothing"),
        (other_model, 1, r"has shape \(3, 14\)"),
    ],
    ids=["AdamW", "transposed", "dense", "no step", "no v_A", "empty", "other model"],
)
def test_a_foreign_checkpoint_is_refused_by_parameter_and_leaves_everything_unchanged(
    foreign: Callable[[Any], Any], where: int, message: str, named: bool, device: torch.device
) -> None:
    params = make_params(SHAPES, torch.float32, device)
    given: Any = [(f"layer.{i}", param) for i, param in enumerate(params)] if named else params
    optimizer = LoRAPreAdamW(given, rank=3, lr=0.125)
    train(optimizer, 2)
    state = foreign(optimizer)
    before, groups = snapshot(optimizer), [{**group, "params": None} for group in optimizer.param_groups]
    with pytest.raises(ValueError, match=message) as caught:
        optimizer.load_state_dict(state)
    assert f"parameter {f'layer.{where}' if named else f'number {where}'}" in str(caught.value)
    assert_same_bits(snapshot(optimizer), before)
    assert [{**group, "params": None} for group in optimizer.param_groups] == groups
    train(optimizer, 1)


def test_loading_adopts_the_options_of_the_checkpoint_as_torch_does(device: torch.device) -> None:
    saved = build(device, lr=0.5, second_moment="full", weight_decay=0.25)
    train(saved, 1)
    optimizer = LoRAPreAdamW(clone_params(params_of(saved)), rank=2)
    optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    group = optimizer.param_groups[0]
    assert (group["rank"], group["lr"], group["second_moment"], group["weight_decay"]) == (3, 0.5, "full", 0.25)
    train(saved, 2, seed=3)
    train(optimizer, 2, seed=3)
    assert_same_bits(snapshot(optimizer), snapshot(saved))


def test_unknown_entries_of_a_loaded_state_survive(device: torch.device) -> None:
    optimizer = build(device)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0] |= {"note": 5, "extra": torch.ones(2)}
    optimizer.load_state_dict(state)
    train(optimizer, 1)
    held = optimizer.state[params_of(optimizer)[0]]
    assert held["note"] == 5
    assert_same_bits(held["extra"].cpu(), torch.ones(2))


def test_hooks_run_in_order_and_may_change_what_passes(device: torch.device) -> None:
    optimizer = build(device)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.step(lambda: calls.append("closure"))
    assert calls == ["pre", "closure", "post"]

    def stamp(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "stamp": 1}

    def halve(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        state = copy.deepcopy(state)
        state["state"][0]["m_A"] *= 0.5
        return state

    optimizer.register_state_dict_pre_hook(lambda _: calls.append("before saving"))
    optimizer.register_state_dict_post_hook(stamp)
    saved = optimizer.state_dict()
    assert saved["stamp"] == 1
    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("loaded"))
    m_A = optimizer.state[params_of(optimizer)[0]]["m_A"].clone()
    optimizer.load_state_dict(saved)
    assert calls[3:] == ["before saving", "loaded"]
    assert_same_bits(optimizer.state[params_of(optimizer)[0]]["m_A"], 0.5 * m_A)
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1, "our own pre-hook is removed again"


def test_zero_grad_clears_or_zeroes(device: torch.device) -> None:
    optimizer = build(device)
    train(optimizer, 1)
    optimizer.zero_grad(set_to_none=False)
    assert all((param.grad == 0).all() for param in params_of(optimizer))
    optimizer.zero_grad()
    assert all(param.grad is None for param in params_of(optimizer))


def test_named_parameters_keep_their_names_through_a_checkpoint(device: torch.device) -> None:
    model = model_of(device)
    optimizer = LoRAPreAdamW(model.named_parameters(), rank=2)
    names = [name for name, _ in model.named_parameters()]
    assert optimizer.param_groups[0]["param_names"] == names
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names


# State.


def test_state_exists_before_the_first_step_and_keeps_its_keys(device: torch.device) -> None:
    expected = {
        "hadamard": {"step", "m_B", "m_A", "v_B", "v_A"},
        "full": {"step", "m_B", "m_A", "exp_avg_sq"},
    }
    for second_moment, keys in expected.items():
        optimizer = build(device, second_moment=second_moment)
        for steps in (0, 1, 2):
            for param in params_of(optimizer):
                wanted = keys if param.ndim >= 2 else {"step", "exp_avg", "exp_avg_sq"}
                held = optimizer.state[param]
                assert set(held) == wanted
                assert all(type(value) is Tensor and not value.requires_grad for value in held.values())
                assert held["step"].shape == ()
                assert held["step"].dtype == torch.float32
                assert held["step"].device.type == "cpu"
                assert held["step"].item() == steps
            train(optimizer, 1)


def test_initial_factors_are_zero_on_the_left_and_small_on_the_right(device: torch.device) -> None:
    optimizer = build(device, shapes=[(30, 50), (2, 30, 50)], view_3d="stack")
    for param, shapes in zip(params_of(optimizer), [((30, 3), (3, 50)), ((2, 30, 3), (2, 3, 50))], strict=True):
        state = optimizer.state[param]
        for moment in "mv":
            assert state[f"{moment}_B"].shape == shapes[0]
            assert not state[f"{moment}_B"].any()
            assert state[f"{moment}_A"].shape == shapes[1]
            assert state[f"{moment}_A"].std().item() == pytest.approx(0.02, rel=0.15)
            assert abs(state[f"{moment}_A"].mean().item()) < 0.006


# Dense parameters.


@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 0.1, "maximize": True}, {"betas": (0.8, 0.99), "eps": 1e-3}, {"capturable": True}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dense_parameters_take_torchs_adamw_bit_for_bit(
    options: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> None:
    shapes = ((7,), (), (9, 11), (3, 3))
    ours = LoRAPreAdamW(
        [
            {"params": make_params(shapes[:2], dtype, device)},
            {"params": make_params(shapes[2:], dtype, device), "compress": False},
            {"params": make_params([(12, 20)], dtype, device, seed=4)},  # and nothing compressed disturbs them
        ],
        **{"betas": (0.9, 0.95), "rank": 3, **options},
    )
    fused = {"capturable": True, "fused": True} if options.get("capturable") else {}
    copies = clone_params(params_of(ours)[:4])
    theirs = torch.optim.AdamW(
        [{"params": copies[:2]}, {"params": copies[2:]}],
        **{"betas": (0.9, 0.95), "weight_decay": 1e-2, **{**options, **fused}},
    )
    for step in range(5):
        grads = random_grads(params_of(ours), step)
        set_grads(params_of(ours), grads)
        set_grads(copies, grads[:4])
        ours.step()
        theirs.step()
    assert_same_bits(snapshot(ours)[:4], snapshot(theirs))


@pytest.mark.parametrize("keys", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_injected_foreach_and_fused_choose_torchs_implementation(keys: dict[str, bool], device: torch.device) -> None:
    called: list[tuple[Any, Any]] = []
    original = adamw_module.adamw

    def spy(*args: Any, **kwargs: Any) -> None:
        called.append((kwargs["foreach"], kwargs["fused"]))
        original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adamw_module, "adamw", spy)
        ours = build(device)
        for group in ours.param_groups:
            group.update(keys, param_names=[f"p{i}" for i in range(len(SHAPES))], something_else=object())
        copies = clone_params(params_of(ours)[3:])
        theirs = torch.optim.AdamW(copies, betas=(0.9, 0.95), **keys)
        train(ours, 1)
        set_grads(copies, [param.grad for param in params_of(ours)[3:]])
        theirs.step()
    assert called == [(keys.get("foreach"), keys.get("fused"))]
    for (weight, state), (their_weight, their_state) in zip(snapshot(ours)[3:], snapshot(theirs), strict=True):
        assert_same_bits(weight, their_weight)
        for key, value in their_state.items():  # torch counts on the device when fused, we on the CPU
            assert_same_bits(state[key], value.to(state[key].device))


def test_a_tensor_lr_overrules_an_injected_foreach_that_torch_would_refuse(device: torch.device) -> None:
    plain, injected = (build(device, lr=torch.tensor(0.1)) for _ in range(2))
    injected.param_groups[0]["foreach"] = True
    train(plain, 2)
    train(injected, 2)
    assert_same_bits(snapshot(injected), snapshot(plain))


# Narrow weights.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"second_moment": "full"}, {"capturable": True}], ids=str)
def test_narrow_weights_are_rounded_once_a_step(
    dtype: torch.dtype, options: dict[str, Any], device: torch.device
) -> None:
    shapes = (*SHAPES, (9, 2, 2, 3))
    narrow = build(device, dtype, shapes=shapes, weight_decay=0.1, lr=1e-2, **options)
    wide = LoRAPreAdamW(
        [nn.Parameter(param.detach().float()) for param in params_of(narrow)],
        rank=3,
        weight_decay=0.1,
        lr=1e-2,
        **options,
    )
    for step in range(6):
        for ours, theirs in zip(params_of(narrow), params_of(wide), strict=True):
            theirs.data.copy_(ours)  # the float32 computation, from the same weights
        set_grads(params_of(narrow), random_grads(params_of(narrow), step))
        set_grads(params_of(wide), [param.grad for param in params_of(narrow)])
        narrow.step()
        wide.step()
        for ours, theirs in zip(params_of(narrow), params_of(wide), strict=True):
            if ours.ndim < 2:
                # decay and update, exact to float32: one rounding
                assert_same_bits(ours.detach(), theirs.detach().to(dtype))
            else:
                # here float32 adds once for weights of its own dtype and once for others: up to a last bit of
                # float32, which moves a narrow number only if it lies at the middle between two
                apart = ours.detach() != theirs.detach().to(dtype)
                assert apart.float().mean() <= 0.005
            assert_same_bits(narrow.state[ours], wide.state[theirs])


def test_a_bfloat16_state_is_the_float32_computation_rounded_each_step(device: torch.device) -> None:
    optimizer = build(device, state_dtype=torch.bfloat16, shapes=[(12, 20)])
    param = params_of(optimizer)[0]
    for grad in gradients((12, 20), 5):
        run = ReferenceRun(optimizer, param, optimizer.param_groups[0])  # from the rounded state, every step
        param.grad = grad.to(device, torch.float32)
        run.step(param.grad)
        optimizer.step()
        assert_close(param, run.weight(), 1e-6, "W")
        for key in ("m_B", "m_A", "v_B", "v_A"):
            exact = getattr(run.states[0], key)
            stored = optimizer.state[param][key]
            gap = (stored.cpu().double() - exact).abs()
            assert (gap <= exact.abs() * 2**-8 + 1e-12).all(), key  # half a unit in the last of 8 bits


# Layouts and devices.


def test_noncontiguous_parameters_and_gradients_are_updated_like_contiguous_ones(device: torch.device) -> None:
    for options in ({}, {"second_moment": "full"}, {"capturable": True}):
        plain = build(device, shapes=((12, 20), (12, 20), (7,), (2, 8, 10)), **options)
        strided = [nn.Parameter(plain_param.detach().clone()) for plain_param in params_of(plain)]
        strided[0] = nn.Parameter(params_of(plain)[0].detach().T.contiguous().T)
        strided[1] = nn.Parameter(torch.stack([params_of(plain)[1].detach()] * 2, -1)[..., 0])
        strided[2] = nn.Parameter(torch.stack([params_of(plain)[2].detach()] * 2, -1)[..., 0])
        strided[3] = nn.Parameter(params_of(plain)[3].detach().permute(2, 0, 1).contiguous().permute(1, 2, 0))
        optimizer = LoRAPreAdamW(strided, rank=3, **options)
        assert not any(param.is_contiguous() for param in strided)
        for step in range(4):
            grads = random_grads(params_of(plain), step)
            set_grads(params_of(plain), grads)
            for param, grad in zip(strided, grads, strict=True):
                param.grad = torch.empty_strided(param.shape, param.stride(), device=device).copy_(grad)
            plain.step()
            optimizer.step()
        for ours, expected in zip(strided, params_of(plain), strict=True):
            assert_close(ours, expected, 1e-6)


def test_channels_last_convolutions_are_the_same_matrices(device: torch.device) -> None:
    plain = build(device, shapes=[(12, 4, 3, 3)])
    last = nn.Parameter(params_of(plain)[0].detach().clone(memory_format=torch.channels_last))
    for options in ({}, {"second_moment": "full"}):
        plain = build(device, shapes=[(12, 4, 3, 3)], **options)
        last = nn.Parameter(params_of(plain)[0].detach().clone(memory_format=torch.channels_last))
        optimizer = LoRAPreAdamW([last], rank=3, **options)
        for step in range(3):
            grads = random_grads([last], step)
            set_grads(params_of(plain), grads)
            last.grad = grads[0].to(device).contiguous(memory_format=torch.channels_last)
            plain.step()
            optimizer.step()
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert_close(last, params_of(plain)[0], 1e-6)


@pytest.mark.parametrize("capturable", [False, True])
def test_empty_parameters_are_carried_along(capturable: bool, device: torch.device) -> None:
    optimizer = build(device, shapes=((0, 5), (12, 20), (0,), (2, 0, 4)), capturable=capturable)
    alone = build(device, shapes=((0, 5), (12, 20)), capturable=capturable)
    train(optimizer, 2)
    set_grads(params_of(alone), [None, None])
    for step in range(2):
        set_grads(params_of(alone), random_grads(params_of(optimizer), step)[:2])
        alone.step()
    assert_same_bits(snapshot(optimizer)[1], snapshot(alone)[1])
    set_grads(params_of(optimizer), [torch.zeros(0, 5), None, None, None])
    optimizer.step()  # nothing but an empty gradient
    assert optimizer.state[params_of(optimizer)[0]]["step"].item() == 3


def test_parameters_on_meta_have_their_state_there() -> None:
    for capturable in (False, True):
        optimizer = LoRAPreAdamW(
            [nn.Parameter(torch.empty(4096, 2048, device="meta")), nn.Parameter(torch.empty(9, device="meta"))],
            rank=256,
            capturable=capturable,
        )
        for param in params_of(optimizer):
            for key, value in optimizer.state[param].items():
                assert value.device.type == ("cpu" if key == "step" and not capturable else "meta")
        assert optimizer.state[params_of(optimizer)[0]]["m_A"].shape == (256, 2048)
        optimizer.load_state_dict(optimizer.state_dict())


# What is refused.


class FlatParameter(nn.Parameter):
    """As torch.distributed.fsdp names its own."""


class DTensor(nn.Parameter):
    """As torch.distributed.tensor names its own."""


def with_ds_id() -> nn.Parameter:
    param = nn.Parameter(torch.ones(4, 4))
    param.ds_id = 3  # type: ignore[attr-defined]
    return param


@pytest.mark.parametrize(
    ("param", "match"),
    [
        (FlatParameter(torch.ones(16)), "'w' of LoRAPreAdamW is an FSDP1 FlatParameter.*DDP"),
        (DTensor(torch.ones(4, 4)), "'w' of LoRAPreAdamW is a DTensor.*DDP"),
        (with_ds_id(), "'w' of LoRAPreAdamW is partitioned by DeepSpeed ZeRO-3.*DDP"),
        (nn.Parameter(torch.ones(4, 4, dtype=torch.complex64)), "'w' of LoRAPreAdamW is complex.*view_as_real"),
        (nn.Parameter(torch.ones(4, 4, dtype=torch.int32), requires_grad=False), "dtype torch.int32"),
    ],
    ids=["FSDP1", "DTensor", "DeepSpeed", "complex", "integer"],
)
def test_parameters_that_would_be_trained_wrongly_are_refused_with_the_remedy(param: nn.Parameter, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        LoRAPreAdamW([("w", param)])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lr": -1.0}, "learning rate: -1.0"),
        ({"lr": float("nan")}, "learning rate: nan"),
        ({"lr": torch.tensor(-1.0)}, "learning rate: -1.0"),
        ({"lr": torch.tensor([0.1, 0.2])}, r"lr must be 1-element.*\(2,\)"),
        ({"lr": torch.tensor([0.1, 0.2]), "capturable": True}, "lr must be 1-element"),
        ({"rank": 0}, "rank: 0"),
        ({"rank": -3}, "rank: -3"),
        ({"rank": 1.0}, "rank: 1.0"),
        ({"rank": 0.0}, "rank: 0.0"),
        ({"rank": 2.5}, "rank: 2.5"),
        ({"rank": float("nan")}, "rank: nan"),
        ({"rank": True}, "rank: True"),
        ({"rank": "8"}, "rank: '8'"),
        ({"rank": None}, "rank: None"),
        ({"betas": (1.0, 0.9)}, "beta parameter at index 0: 1.0"),
        ({"betas": (-0.1, 0.9)}, "beta parameter at index 0: -0.1"),
        ({"betas": (0.9, 1.5)}, "beta parameter at index 1: 1.5"),
        ({"betas": (0.9, float("nan"))}, "beta parameter at index 1: nan"),
        ({"betas": (0.9,)}, r"betas: \(0.9,\)"),
        ({"betas": (0.9, 0.9, 0.9)}, r"betas: \(0.9, 0.9, 0.9\)"),
        ({"betas": 0.9}, "betas: 0.9"),
        ({"eps": -1e-8}, "eps value: -1e-08"),
        ({"eps": float("nan")}, "eps value: nan"),
        ({"weight_decay": -0.1}, "weight_decay value: -0.1"),
        ({"scale": -1.0}, "scale value: -1.0"),
        ({"scale": float("nan")}, "scale value: nan"),
        ({"damping": 0.0}, "damping value: 0.0"),
        ({"damping": -1e-6}, "damping value: -1e-06"),
        ({"damping": float("nan")}, "damping value: nan"),
        ({"damping_mode": "both"}, "damping_mode: 'both'.*'absolute', 'relative'"),
        ({"bias_correction": True}, "bias_correction: True.*'paper', 'exact'"),
        ({"second_moment": "rank1"}, "second_moment: 'rank1'.*'hadamard', 'full'"),
        ({"view_3d": "conv"}, "view_3d: 'conv'.*'stack', 'flatten'"),
        ({"state_dtype": torch.int32}, "state_dtype: torch.int32"),
        ({"state_dtype": torch.complex64}, "state_dtype: torch.complex64"),
        ({"state_dtype": torch.float8_e4m3fn}, "state_dtype: torch.float8_e4m3fn"),
        ({"state_dtype": "float32"}, "state_dtype: 'float32'"),
        ({"seed": 1.5}, "seed value: 1.5"),
        ({"seed": True}, "seed value: True"),
        ({"nonfinite": "ignore"}, "nonfinite: 'ignore'.*'raise', 'skip'"),
        ({"nonfinite": ""}, "nonfinite: ''"),
        ({"nonfinite": "raise", "capturable": True}, "nonfinite='raise' cannot work with capturable=True"),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_named_with_its_value(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        LoRAPreAdamW([nn.Parameter(torch.ones(6, 6))], **{"rank": 2, **options})
    if "rank" not in options:  # the same in a group
        with pytest.raises(ValueError, match=match):
            LoRAPreAdamW([{"params": [nn.Parameter(torch.ones(6, 6))], **options}], rank=2)


# The signature.


def test_shared_keywords_mean_what_they_mean_in_torchs_adamw() -> None:
    ours, theirs = (inspect.signature(cls.__init__).parameters for cls in (LoRAPreAdamW, torch.optim.AdamW))
    shared = [name for name in ours if name in theirs and name != "self"]
    assert set(shared) == {"params", "lr", "betas", "eps", "weight_decay", "maximize", "capturable"}
    for name in ("lr", "eps", "weight_decay", "maximize", "capturable"):
        assert ours[name].default == theirs[name].default, name
    for name in shared:
        assert ours[name].kind == theirs[name].kind, name
    own = set(ours) - set(theirs)
    assert {ours[name].kind for name in own - {"rank"}} == {inspect.Parameter.KEYWORD_ONLY}
    assert set(LoRAPreAdamW([nn.Parameter(torch.ones(8, 8))]).param_groups[0]) == (
        set(ours) - {"self", "params"} | {"params", "compress"}
    ), "every option is a key of the groups"
    assert issubclass(LoRAPreAdamW, torch.optim.Optimizer)
    step = inspect.signature(LoRAPreAdamW.step).parameters
    assert list(step) == list(inspect.signature(torch.optim.AdamW.step).parameters)


def test_every_option_may_be_set_in_a_group() -> None:
    values: dict[str, Any] = {
        "lr": 0.5,
        "rank": 2,
        "betas": (0.1, 0.2),
        "eps": 0.5,
        "weight_decay": 0.5,
        "damping": 0.5,
        "damping_mode": "absolute",
        "bias_correction": "paper",
        "second_moment": "full",
        "scale": 0.5,
        "view_3d": "flatten",
        "state_dtype": torch.float64,
        "seed": 5,
        "maximize": True,
        "capturable": True,
        "nonfinite": "skip",
        "compress": True,
    }
    optimizer = LoRAPreAdamW([{"params": [nn.Parameter(torch.ones(6, 8, 2))], **values}], rank=1)
    assert {key: optimizer.param_groups[0][key] for key in values} == values
    assert set(values) == set(optimizer.defaults)
    by_options = LoRAPreAdamW(
        [nn.Parameter(torch.ones(6, 8, 2))], **{key: value for key, value in values.items() if key != "compress"}
    )
    train(optimizer, 3)
    train(by_options, 3)
    assert_same_bits(snapshot(optimizer), snapshot(by_options))


def test_the_paper_preset_is_the_reference_with_the_papers_settings(device: torch.device) -> None:
    params = make_params([(12, 20)], torch.float64, device)
    optimizer = LoRAPreAdamW.paper(params, 1e-2, 3)
    group = optimizer.param_groups[0]
    # written out here, not read from the optimizer: these are the paper's
    settings: dict[str, Any] = {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.0, "scale": 0.25, "damping": 1e-6}
    state = ReferenceRun(optimizer, params[0], group).states[0]
    W = params[0].detach().cpu().double()
    for grad in gradients((12, 20), 30):
        params[0].grad = grad.to(device)
        W = reference.lorapre_adam_step(
            W,
            grad,
            state,
            lr=1e-2,
            bias_correction="paper",
            **settings,
        )
        optimizer.step()
    assert_close(params[0], W, 1e-12)
    assert LoRAPreAdamW.paper([nn.Parameter(torch.ones(200, 200))]).param_groups[0]["rank"] == 128
    assert LoRAPreAdamW.paper(params, rank=2, scale=1.0).param_groups[0]["scale"] == 1.0


def test_the_default_preset_differs_from_the_paper(device: torch.device) -> None:
    default, paper = (
        make(make_params([(12, 20)], torch.float64, device), 1e-2, 3) for make in (LoRAPreAdamW, LoRAPreAdamW.paper)
    )
    train(default, 5)
    train(paper, 5)
    assert relative_difference(params_of(default)[0], params_of(paper)[0]) > 1e-3


def test_the_warning_names_the_ranks_and_blames_the_caller() -> None:
    for make in (LoRAPreAdamW, LoRAPreAdamW.paper):
        with pytest.warns(UserWarning, match=r"none of its 2 parameters .* exceeds the rank \(9\)") as caught:
            make([nn.Parameter(torch.ones(9, 9)), nn.Parameter(torch.ones(3))], rank=9)
        assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(UserWarning, match="no group is to be compressed"):
        LoRAPreAdamW([{"params": [nn.Parameter(torch.ones(9, 9))], "compress": False}], rank=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoRAPreAdamW([nn.Parameter(torch.ones(9, 9)), nn.Parameter(torch.ones(3))], rank=3)
