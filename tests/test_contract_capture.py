"""The contract of torch.optim: `capturable`, and steps captured in a CUDA graph."""

from __future__ import annotations

import itertools
import traceback
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from _contract import (
    SHAPES,
    Kind,
    build,
    every_kind,
    params_of,
)
from _support import (
    assert_close,
    assert_replays_have_the_bits_of_launches,
    assert_same_bits,
    make_params,
    random_grads,
    set_grads,
    snapshot,
    train,
)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_capturable_is_the_same_optimizer_to_rounding(kind: Kind, dtype: torch.dtype, device: torch.device) -> None:
    every = {"sweep_interval": 1} if kind.is_adamw else {}  # what None means to a graph
    plain, graphable = (
        build(kind, device, dtype, capturable=capturable, weight_decay=0.1, **every) for capturable in (False, True)
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


@every_kind
@pytest.mark.parametrize("where", [0, 2, 3], ids=["matrix", "stack", "vector"])
def test_a_capturable_step_with_nonfinite_gradients_is_a_no_op(kind: Kind, where: int, device: torch.device) -> None:
    division = {"eps": 0.0} if "exp_avg" in kind.dense_keys else {}  # 0 / 0 on the way
    worst = (torch.nan, {}), (torch.inf, {}), (-torch.inf, {"maximize": True}), (torch.nan, division)
    for trained, (bad, options) in itertools.product((0, 2), worst):
        optimizer = build(kind, device, capturable=True, weight_decay=0.1, **options)
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
    """Counts operators that wait for ``device`` to hand a value to the host."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.found: list[str] = []
        self._device = device.type

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        if reads and args[0].device.type == self._device:
            self.found.append("".join(traceback.format_stack(limit=12)))
        return func(*args, **(kwargs or {}))


@every_kind
@pytest.mark.parametrize("options", [{}, {"damping_mode": "absolute"}, {"damping_mode": "relative"}], ids=str)
def test_a_capturable_step_reads_nothing_back_from_the_device(
    kind: Kind, options: dict[str, Any], device: torch.device
) -> None:
    # what a CUDA graph refuses at capture, found without a GPU
    lr = torch.tensor(1e-2, device=device)
    optimizer = build(kind, device, shapes=(*SHAPES, (3, 12, 20)), capturable=True, lr=lr, weight_decay=0.1, **options)
    set_grads(params_of(optimizer), random_grads(params_of(optimizer), 0))
    with HostReads(device) as reads:
        optimizer.step()
    assert not reads.found, "\n\n".join(reads.found)
    with HostReads(device) as reads:
        torch.ones((), device=device).item()  # the probe sees what it is for
    assert reads.found


@every_kind
def test_a_captured_graph_replays_the_bits_of_eager_launches(kind: Kind, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs CUDA graphs")
    shapes = (*SHAPES, (3, 12, 20), (12, 20))
    lr = torch.tensor(1e-2, device=device)
    eager_run = build(kind, device, shapes=shapes, capturable=True, lr=lr.clone())
    captured = build(kind, device, shapes=shapes, capturable=True, lr=lr.clone())

    def feed(optimizer: Any, step: int) -> None:
        for param, grad in zip(params_of(optimizer), random_grads(params_of(optimizer), step), strict=True):
            param.grad.copy_(grad)
        if step == 7:
            params_of(optimizer)[0].grad[0, 0] = torch.nan
        optimizer.param_groups[0]["lr"].fill_(1e-2 / (1 + step))

    assert_replays_have_the_bits_of_launches(eager_run, captured, feed, steps=10)


@every_kind
def test_a_capture_without_capturable_is_refused_before_anything_changes(
    kind: Kind, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what torch says inside torch.cuda.graph(...)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    params = make_params(SHAPES[:2], torch.float32, device)
    mixed = kind([{"params": params[:1], "capturable": True}, {"params": params[1:]}], rank=3)
    for optimizer in (build(kind, device), mixed):
        set_grads(params_of(optimizer), random_grads(params_of(optimizer), 0))
        before = snapshot(optimizer)
        with pytest.raises(RuntimeError, match=r"captured in a CUDA graph.*Build it with capturable=True"):
            optimizer.step()
        assert_same_bits(snapshot(optimizer), before)
    monkeypatch.undo()
    train(mixed, 1)


@every_kind
def test_a_group_may_be_capturable_beside_one_that_is_not(kind: Kind, device: torch.device) -> None:
    params = make_params(SHAPES[:2], torch.float32, device)
    optimizer = kind([{"params": params[:1], "capturable": True}, {"params": params[1:]}], rank=3)
    train(optimizer, 2)
    before = snapshot(optimizer)
    params[0].grad.fill_(torch.nan)
    optimizer.step()  # the capturable group's default is to skip
    optimizer.settle()
    assert_same_bits(snapshot(optimizer), before)
    params[0].grad.fill_(1.0)
    params[1].grad.fill_(torch.nan)

    def step_and_hear() -> None:
        optimizer.step()
        optimizer.settle()  # where kernels take part it is said here

    with pytest.raises(RuntimeError, match="'1'"):
        step_and_hear()
    assert_same_bits(snapshot(optimizer), before)
