"""The contract of torch.optim: closures, groups, schedulers, scalers, learning rates, maximize."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau

from _contract import (
    ADAMW,
    LION,
    MUON,
    PAPER,
    SGD,
    SHAPES,
    Kind,
    build,
    each_class,
    every_kind,
    model_of,
    params_of,
)
from _formulas import run_beside
from _support import (
    assert_close,
    assert_same_bits,
    clone_params,
    gradients,
    make_params,
    random_grads,
    set_grads,
    snapshot,
    train,
)

# Closures, groups, schedulers, scalers.


@every_kind
def test_a_closure_is_evaluated_with_gradients_and_its_value_returned(kind: Kind, device: torch.device) -> None:
    model, x = model_of(device), torch.ones(3, 6, device=device)
    optimizer = kind(model.parameters(), rank=2)
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


@each_class
def test_an_added_group_has_state_at_once_and_options_of_its_own(kind: Kind, device: torch.device) -> None:
    optimizer = build(kind, device, torch.float64, shapes=SHAPES[:1], lr=1e-3)
    late = make_params([(9, 11), (5,)], torch.float64, device)
    own = {"second_moment": "full"} if kind is ADAMW else {}
    optimizer.add_param_group({"params": late, "rank": 2, "lr": 0.5, "residual_gain": 0.25, **own})
    more = {ADAMW: {"exp_avg_sq"}, MUON: {"u_col"}}.get(kind, set())
    assert set(optimizer.state[late[0]]) == {"step", "m_B", "m_A", *more}
    assert optimizer.state[late[0]]["m_B"].shape == (9, 2)
    assert set(optimizer.state[late[1]]) == kind.dense_keys
    assert optimizer.param_groups[1]["weight_decay"] == optimizer.defaults["weight_decay"]
    run = run_beside(optimizer, late[0], optimizer.param_groups[1])
    for grad in gradients((9, 11), 5):
        late[0].grad = grad.to(device)
        run.step(grad)
        optimizer.step()
    run.check(optimizer, late[0], 1e-11)


@every_kind
@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda p: {"params": p, "rank": 0}, ValueError, "rank: 0"),
        (lambda p: {"params": p, "damping": 0.0}, ValueError, "damping value: 0.0"),
        (lambda p: {"params": p, "residual_gain": -1.0}, ValueError, "residual_gain: -1.0"),
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
    kind: Kind, make: Callable[[Any], Any], error: type[Exception], match: str, device: torch.device
) -> None:
    optimizer = build(kind, device)
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


@every_kind
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
def test_schedulers_change_the_size_of_the_step(
    kind: Kind, schedule: Any, tensor_lr: bool, device: torch.device
) -> None:
    lr: Any = torch.tensor(0.1, dtype=torch.float64) if tensor_lr else 0.1
    # no decay: the direction then depends on the gradients alone, and each step is lr times one of a plain run
    options = {"dtype": torch.float64, "weight_decay": 0.0, "shapes": SHAPES}
    scheduled, plain = build(kind, device, lr=lr, **options), build(kind, device, lr=1.0, **options)
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


# Not Muon: the scheduler looks for betas first, and finds those of its AdamW.
@pytest.mark.parametrize("kind", [ADAMW, PAPER, SGD, LION], ids=str)
def test_one_cycle_changes_the_momentums_decay_of_the_next_step(kind: Kind, device: torch.device) -> None:
    optimizer = build(kind, device, torch.float64)
    scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=8, base_momentum=0.5, max_momentum=0.8)
    param, group = params_of(optimizer)[0], optimizer.param_groups[0]
    run, seen = run_beside(optimizer, param, group), set()
    for grad in gradients((12, 20), 6):
        decay = group["momentum"] if kind is SGD else group["betas"][0]
        seen.add(decay)
        assert decay <= 0.8
        param.grad = grad.to(device)
        run.step(grad)
        optimizer.step()
        scheduler.step()
    assert len(seen) >= 3
    run.check(optimizer, param, 1e-10)


@every_kind
def test_a_grad_scaler_trains_like_no_scaler_and_leaves_out_overflowing_steps(kind: Kind, device: torch.device) -> None:
    x = torch.randn(5, 6, device=device)
    plain_model, scaled_model = model_of(device), model_of(device)
    plain, scaled = (kind(model.parameters(), rank=2) for model in (plain_model, scaled_model))
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


@each_class
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_tensor_lr_means_its_value(
    kind: Kind, dtype: torch.dtype, shape: tuple[int, ...], capturable: bool, device: torch.device
) -> None:
    by_value = build(kind, device, lr=0.03, capturable=capturable)
    by_tensor = build(kind, device, lr=torch.full(shape, 0.03, dtype=dtype, device=device), capturable=capturable)
    train(by_value, 2)
    train(by_tensor, 2)
    for optimizer in (by_value, by_tensor):
        group = optimizer.param_groups[0]
        group["lr"] = group["lr"].fill_(0.5) if isinstance(group["lr"], Tensor) else 0.5
        train(optimizer, 2, seed=1)
    for a, b in zip(params_of(by_tensor), params_of(by_value), strict=True):
        assert_close(a, b, 1e-5)


@every_kind
def test_zero_lr_changes_no_weight_but_advances_the_state(kind: Kind, device: torch.device) -> None:
    optimizer = build(kind, device, lr=0.0)
    before = snapshot(optimizer)
    train(optimizer, 1)
    for (new, state), (old, _) in zip(snapshot(optimizer), before, strict=True):
        assert_same_bits(new, old)
        assert state["step"].item() == 1
    assert params_of(optimizer)[0] in optimizer.state


@every_kind
@pytest.mark.parametrize("capturable", [False, True])
def test_maximize_ascends_where_minimising_the_negated_gradient_descends(
    kind: Kind, capturable: bool, device: torch.device
) -> None:
    up = build(kind, device, maximize=True, weight_decay=0.1, capturable=capturable)
    down = build(kind, device, weight_decay=0.1, capturable=capturable)
    for step in range(4):
        grads = random_grads(params_of(up), step)
        set_grads(params_of(up), grads)
        set_grads(params_of(down), [-grad for grad in grads])
        up.step()
        down.step()
    assert_same_bits(snapshot(up), snapshot(down))


@every_kind
@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"capturable": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_never_written_to(
    kind: Kind, options: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> None:
    optimizer = build(kind, device, dtype, **options)
    set_grads(params_of(optimizer), random_grads(params_of(optimizer), 1))
    before = [param.grad.clone() for param in params_of(optimizer)]
    optimizer.step()
    assert_same_bits([param.grad for param in params_of(optimizer)], before)
