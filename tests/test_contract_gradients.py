"""The contract of torch.optim: gradients that are missing, sparse, zero, not finite."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from _contract import (
    ADAMW,
    DEFAULTS,
    KINDS,
    LION,
    MUON,
    NEWTON,
    SGD,
    SHAPES,
    TANGENT,
    Kind,
    build,
    every_kind,
    params_of,
)
from _formulas import random_matrix, run_beside
from _support import (
    assert_close,
    assert_same_bits,
    gradients,
    make_params,
    random_grads,
    set_grads,
    snapshot,
    train,
)
from lorapre import LoRAPreAdamW, NonFiniteGradientError


@every_kind
def test_a_parameter_without_gradient_keeps_its_value_and_state(kind: Kind, device: torch.device) -> None:
    for capturable in (False, True):
        optimizer = build(kind, device, capturable=capturable, weight_decay=0.5)
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


@every_kind
@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=str)
def test_sparse_gradients_are_refused_before_anything_changes(
    kind: Kind, options: dict[str, Any], device: torch.device
) -> None:
    embedding = nn.Embedding(12, 8, sparse=True, device=device)
    dense = make_params([(12, 20)], torch.float32, device)[0]
    optimizer = kind([("dense", dense), ("table", embedding.weight)], rank=3, **options)
    dense.grad = torch.ones_like(dense)
    embedding(torch.tensor([1, 2], device=device)).sum().backward()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"sparse gradients \(parameter 'table'\).*sparse=False"):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("where", range(4))
@pytest.mark.parametrize("named", [False, True], ids=["indexed", "named"])
def test_nonfinite_gradients_change_nothing(
    kind: Kind, named: bool, where: int, dtype: torch.dtype, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    params = make_params(SHAPES, dtype, device)
    given: Any = [(f"layer.{i}", param) for i, param in enumerate(params)] if named else params
    optimizer = kind(given, rank=3)
    label = f"layer.{where}" if named else str(where)
    train(optimizer, 2)
    before = snapshot(optimizer)
    for bad in (torch.inf, torch.nan):
        params[where].grad.view(-1)[-1] = bad
        optimizer.param_groups[0]["nonfinite"] = "raise"
        with pytest.raises(
            NonFiniteGradientError, match=f"'{label}' holds inf or nan, or its squares do. Nothing was changed"
        ):
            optimizer.step()
        assert_same_bits(snapshot(optimizer), before)
        optimizer.param_groups[0]["nonfinite"] = "skip"
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="lorapre"):
            optimizer.step()
        assert_same_bits(snapshot(optimizer), before)
        assert [record.getMessage() for record in caplog.records] == [
            f"{kind.cls.__name__} skips a step: the gradient of parameter {label!r} holds inf or nan, or its squares do"
        ]


@every_kind
def test_a_gradient_that_is_not_finite_raises_unless_told_otherwise(kind: Kind, device: torch.device) -> None:
    optimizer = build(kind, device)
    set_grads(params_of(optimizer), random_grads(params_of(optimizer), 0))
    params_of(optimizer)[1].grad[2, 3] = torch.nan
    with pytest.raises(NonFiniteGradientError, match="'1' holds inf or nan"):
        optimizer.step()


@pytest.mark.parametrize("capturable", [False, True])
@every_kind
def test_a_gradient_whose_squares_overflow_is_left_out_where_they_are_summed(
    kind: Kind, capturable: bool, device: torch.device
) -> None:
    """Else it would be inf in a matrix's state, and nan in all of its weights two steps later."""
    for where, shape in enumerate(SHAPES):
        optimizer = kind(make_params(SHAPES, torch.float32, device), rank=3, nonfinite="skip", capturable=capturable)
        train(optimizer, 2)
        before = snapshot(optimizer)
        params = params_of(optimizer)
        set_grads(params, random_grads(params, 5))
        params[where].grad.view(-1)[0] = 1e20
        optimizer.step()
        if len(shape) > 1:
            assert_same_bits(snapshot(optimizer), before)
        train(optimizer, 3)
        assert all(W.isfinite().all() for W, _ in snapshot(optimizer))


def test_gradients_far_beyond_usual_ones_are_no_overflow(device: torch.device) -> None:
    optimizer = LoRAPreAdamW(make_params(SHAPES, torch.float32, device), rank=3)
    params = params_of(optimizer)
    for seed in range(3):
        set_grads(params, [1e15 * grad for grad in random_grads(params, seed)])
        before = snapshot(optimizer)
        optimizer.step()
        assert all(not torch.equal(W, old) for (W, _), (old, _) in zip(snapshot(optimizer), before, strict=True))
    assert all(W.isfinite().all() for W, _ in snapshot(optimizer))


@every_kind
def test_a_float64_gradient_beyond_float32s_range_is_finite(kind: Kind, device: torch.device) -> None:
    optimizer = build(kind, device, torch.float64)
    set_grads(params_of(optimizer), random_grads(params_of(optimizer), 0))
    params_of(optimizer)[0].grad.mul_(1e60)
    optimizer.step()
    assert all(W.isfinite().all() for W, _ in snapshot(optimizer))
    assert optimizer.state[params_of(optimizer)[0]]["step"].item() == 1


@every_kind
@pytest.mark.parametrize("mode", ["relative", "absolute"])
def test_zero_gradients_on_a_fresh_state_only_decay_the_weights(kind: Kind, mode: str, device: torch.device) -> None:
    # what torch.distributed.checkpoint does to an optimizer whose state is empty, with lr 0
    optimizer = build(kind, device, torch.float64, lr=0.1, weight_decay=0.5, damping_mode=mode)
    params, start = params_of(optimizer), [W for W, _ in snapshot(optimizer)]
    for _ in range(3):
        set_grads(params, [torch.zeros(param.shape) for param in params])
        optimizer.step()
    for param, old in zip(params, start, strict=True):
        assert_close(param, old * 0.95**3, 1e-12)
        assert all(value.isfinite().all() for value in optimizer.state[param].values())
    if kind is TANGENT:
        return
    run = run_beside(optimizer, params[0], optimizer.param_groups[0])
    for grad in gradients((12, 20), 10):  # training then goes on as the algorithm does from this state
        params[0].grad = grad.to(device)
        run.step(grad)
        optimizer.step()
    run.check(optimizer, params[0], 1e-10)


# The largest element of an update at lr 1. AdamW divides by at least sqrt(1 - beta2) |G|, and after a pause by no more:
# its second moment has vanished. A momentum proportional to the gradient then moves by at most 1 / sqrt(1 - beta2).
# With a residual gain it is not proportional (P(G) and the rest have different weights), so that it is large wherever
# |G| happens to be small. Peaks above 1,000 are also what Algorithm 1 starts with (algorithm.md, section 5.2).
SAFE_NEWTON = Kind("adamw-newton", LoRAPreAdamW, {**NEWTON, "second_moment": "hadamard", "damping_mode": "relative"})
NO_GAIN = Kind("adamw-no-gain", LoRAPreAdamW, {"residual_gain": None, "second_moment": "rank1"})
BOUNDED = [
    (NO_GAIN, 20**0.5, 1000),
    (ADAMW, 1e4, 1000),
    (SAFE_NEWTON, 1e4, 1000),
    (TANGENT, 1e4, 200),
    (MUON, 0.2 * 48**0.5 * 1.3, 200),
    (LION, 1.0, 200),
]


@pytest.mark.parametrize(("kind", "bound", "idle_steps"), BOUNDED, ids=str)
def test_weights_stay_bounded_when_gradients_return_after_a_pause(
    kind: Kind, bound: float, idle_steps: int, device: torch.device
) -> None:
    optimizer = build(kind, device, torch.float32, ((32, 48),), lr=1e-3, weight_decay=0.0)
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
    assert largest < bound + 1e-2  # what the rounding of the weights adds


def test_after_many_zero_gradients_newtons_factors_follow_new_ones(device: torch.device) -> None:
    # an expert that no token reaches: both factors shrink by sqrt(beta) a step, to where float32 ends
    u, v = torch.randn(10, 1, device=device), torch.randn(1, 14, device=device)
    idle, fresh = (build(SAFE_NEWTON, device, shapes=((10, 14),), betas=(0.7, 0.7)) for _ in range(2))
    idle_for(idle, 1200)
    for optimizer in (idle, fresh):
        state = follow(optimizer, u @ v)
        assert_close(state["m_B"] @ state["m_A"], u @ v, 0.05, "m follows the gradient")
        assert_close(state["v_B"] @ state["v_A"], (u @ v).abs(), 0.3, "sqrt(v) follows its size")
        assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize("kind", [*DEFAULTS, TANGENT], ids=str)
def test_after_many_zero_gradients_a_momentum_follows_new_ones_exactly(kind: Kind, device: torch.device) -> None:
    decay = 0.8
    options: dict[str, Any] = {"momentum": decay} if kind in (MUON, SGD) else {"betas": (decay, decay)}
    if kind is not TANGENT:
        options["regression"] = "subspace"
    if kind.is_adamw:
        options["sweep_interval"] = 1  # each sweep leaves less of the old basis in the new one
    G = (torch.randn(10, 1) @ torch.randn(1, 14)).to(device)
    optimizer = build(kind, device, shapes=((10, 14),), **options)
    idle_for(optimizer, 600)
    # 0.8^600 is 1e-58: what is left are the last bits of float32, which no product with 0.8 rounds away
    assert optimizer.state[params_of(optimizer)[0]]["m_B"].abs().max() < 1e-44
    state = follow(optimizer, G)
    total = (1 - decay**60) / (1 - decay if kind in (MUON, SGD) else 1)  # Muon and SGD sum
    assert_close(state["m_B"] @ state["m_A"], total * G, 1e-5)
    A = state["m_A"].double().cpu()
    assert_close(A @ A.T, torch.eye(3), 1e-6, "the rows of the basis")


def idle_for(optimizer: Any, steps: int) -> None:
    train(optimizer, 3)
    param = params_of(optimizer)[0]
    param.grad = torch.zeros_like(param)
    for _ in range(steps):
        optimizer.step()


def follow(optimizer: Any, grad: Tensor) -> dict[str, Tensor]:
    param = params_of(optimizer)[0]
    param.grad = grad
    for _ in range(60):
        optimizer.step()
    state: dict[str, Tensor] = optimizer.state[param]
    return state


@pytest.mark.parametrize("second_moment", ["rank1", "hadamard", "full"])
def test_with_clipping_an_odd_gradient_moves_the_weights_no_further_than_others(
    second_moment: str, device: torch.device
) -> None:
    furthest = {}
    for clipping in (False, True):
        optimizer = build(
            ADAMW, device, shapes=((24, 30),), lr=1.0, second_moment=second_moment, update_clipping=clipping
        )
        param = params_of(optimizer)[0]
        moved = []
        for step, grad in enumerate(gradients((24, 30), 60)):
            before = param.detach().clone()
            noise = random_matrix(24, 30, seed=step)
            param.grad = ((grad + noise) * (10 if step == 50 else 1)).to(device, torch.float32)
            optimizer.step()
            moved.append(float((param.detach() - before * (1 - 1e-2)).norm()))
        furthest[clipping] = moved[50] / max(moved[20:50])
    assert furthest[False] > 1.8
    assert furthest[True] < 1.1


SPARSE_GRADIENTS = {
    "one unit awake": lambda G: G * torch.eye(len(G))[:, :1],
    "two units awake": lambda G: G * torch.eye(len(G))[:, :2].sum(1, keepdim=True),
    "one input awake": lambda G: G * torch.eye(G.shape[1])[:1],
    "all ones": torch.ones_like,
    "rank one": lambda G: G[:, :1] * G[:1],
}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not TANGENT], ids=str)
@pytest.mark.parametrize("name", SPARSE_GRADIENTS)
def test_gradients_of_a_rank_below_the_factors_leave_everything_bounded(
    kind: Kind, name: str, device: torch.device
) -> None:
    optimizer = build(kind, device, shapes=((24, 30),), rank=12, lr=1.0, weight_decay=0.0)
    param = params_of(optimizer)[0]
    grads_so_far = 0.0
    for grad in gradients((24, 30), 25):
        before = param.detach().clone()
        param.grad = SPARSE_GRADIENTS[name](grad).to(device, torch.float32)
        grads_so_far = max(grads_so_far, param.grad.abs().max().item())
        optimizer.step()
        assert all(value.isfinite().all() for value in optimizer.state[param].values())
        moved = (param.detach() - before).abs().max()
        if kind is SGD:  # ten gradients inside the subspace and outside, where the parts may have opposite signs
            assert moved <= 20 * grads_so_far
        else:  # Newton's regression has no bound of its own: see the one above for peaks
            assert moved < (1e4 if kind.options.get("regression") == "newton" else 30.0)


DEAD_INPUTS = [
    Kind("residual gain", LoRAPreAdamW, {"regression": "subspace", "second_moment": "rank1", "residual_gain": 1.0}),
    Kind("no gain", LoRAPreAdamW, {"regression": "subspace", "second_moment": "rank1", "residual_gain": None}),
    Kind("tangent", LoRAPreAdamW, {"regression": "tangent", "second_moment": "rank1", "residual_gain": None}),
    Kind("full", LoRAPreAdamW, {"regression": "subspace", "second_moment": "full", "residual_gain": 1.0}),
]


@pytest.mark.parametrize("kind", DEAD_INPUTS, ids=str)
def test_columns_without_gradient_do_not_move(kind: Kind, device: torch.device) -> None:
    # The inputs of a layer behind a ReLU of which some are never awake, or features that are always zero. P(G) and
    # m_B m_A reach them, and v is 0 there.
    optimizer = build(kind, device, shapes=((32, 48),), rank=12, lr=1.0, weight_decay=0.0)
    param, generator = params_of(optimizer)[0], torch.Generator().manual_seed(0)
    for _ in range(10):
        G = torch.randn(32, 8, generator=generator) @ torch.randn(8, 48, generator=generator)
        G[:, 16:] = 0.0
        before = param.detach().clone()
        param.grad = G.to(device)
        optimizer.step()
        assert torch.equal(param.detach()[:, 16:], before[:, 16:])
        assert (param.detach() - before).abs().max() <= 20**0.5 + 1e-4  # beta2 is 0.95
