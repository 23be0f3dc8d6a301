"""The contract of torch.optim: saving, loading, copying, hooks."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from _contract import (
    ADAMW,
    DEFAULTS,
    SHAPES,
    Kind,
    build,
    each_class,
    every_kind,
    model_of,
    params_of,
)
from _support import (
    assert_same_bits,
    clone_params,
    make_params,
    snapshot,
    train,
)
from lorapre import LoRAPreAdamW


def save_and_load(state: Any, tmp_path: Path) -> Any:
    torch.save(state, tmp_path / "checkpoint.pt")
    return torch.load(tmp_path / "checkpoint.pt", weights_only=True)


RESUMED: list[tuple[torch.dtype, dict[str, Any]]] = [
    *((dtype, {}) for dtype in (torch.float32, torch.bfloat16, torch.float64)),
    (torch.float32, {"capturable": True}),
    (torch.bfloat16, {"capturable": True}),
    (torch.float32, {"state_dtype": torch.bfloat16}),
    (torch.float64, {"state_dtype": torch.bfloat16}),
    (torch.float32, {"lr": torch.tensor(1e-2)}),
    (torch.bfloat16, {"residual_gain": 0.5, "damping_mode": "absolute", "rank": 0.5}),
]


@every_kind
@pytest.mark.parametrize(("dtype", "options"), RESUMED, ids=str)
def test_resuming_from_a_file_is_exact(
    kind: Kind, options: dict[str, Any], dtype: torch.dtype, device: torch.device, tmp_path: Path
) -> None:
    if "lr" in options:
        options = {**options, "lr": options["lr"].clone()}
    options = {"rank": 3, **options}
    original = kind(make_params(SHAPES, dtype, device), **options)
    train(original, 3)
    saved = {"optimizer": original.state_dict(), "weights": [W for W, _ in snapshot(original)]}
    loaded = save_and_load(saved, tmp_path)
    train(original, 4, seed=9)

    resumed = kind(make_params(SHAPES, dtype, device, seed=5), **{**options, "seed": 77})
    with torch.no_grad():
        for param, weight in zip(params_of(resumed), loaded["weights"], strict=True):
            param.copy_(weight)
    resumed.load_state_dict(loaded["optimizer"])
    train(resumed, 4, seed=9)
    assert_same_bits(snapshot(resumed), snapshot(original))
    assert resumed.param_groups[0]["seed"] == 0


def test_resuming_between_two_sweeps_is_exact(device: torch.device) -> None:
    def built(seed: int) -> LoRAPreAdamW:
        return LoRAPreAdamW(make_params(SHAPES, torch.float32, device, seed=seed), rank=3, sweep_interval=4)

    original, resumed = built(0), built(5)
    train(original, 2)
    with torch.no_grad():
        for param, weight in zip(params_of(resumed), params_of(original), strict=True):
            param.copy_(weight)
    resumed.load_state_dict(copy.deepcopy(original.state_dict()))
    bases = [state["m_A"].clone() for state in original.state.values() if "m_A" in state]
    for steps, moved in ((2, False), (1, True)):  # the first, the fifth and the ninth step sweep
        for optimizer in (original, resumed):
            train(optimizer, steps, seed=9)
        assert_same_bits(snapshot(resumed), snapshot(original))
        now = [state["m_A"] for state in resumed.state.values() if "m_A" in state]
        assert all(torch.equal(one, other) != moved for one, other in zip(now, bases, strict=True))


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_state_keeps_its_dtype_through_training_and_loading(
    kind: Kind, dtype: torch.dtype, state_dtype: torch.dtype | None, device: torch.device
) -> None:
    expected = state_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
    optimizer = build(kind, device, dtype, state_dtype=state_dtype)

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


@every_kind
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=str)
def test_a_copied_optimizer_trains_identically(
    kind: Kind, how: str, options: dict[str, Any], device: torch.device
) -> None:
    original = build(kind, device, **options)
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


def adamw_state(kind: Kind, optimizer: Any) -> Any:
    other = torch.optim.AdamW(clone_params(params_of(optimizer)))
    train(other, 1)
    return other.state_dict()


def transposed(kind: Kind, optimizer: Any) -> Any:
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["m_B"] = state["state"][0]["m_B"].T
    return state


def wrong_dense(kind: Kind, optimizer: Any) -> Any:
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][3][first_dense_key(kind)] = torch.zeros(8)
    return state


def first_dense_key(kind: Kind) -> str:
    return min(kind.dense_keys)  # exp_avg or momentum_buffer


def without(key: str) -> Callable[[Kind, Any], Any]:
    def remove(kind: Kind, optimizer: Any) -> Any:
        state = copy.deepcopy(optimizer.state_dict())
        del state["state"][1][key]
        return state

    return remove


def empty_state(kind: Kind, optimizer: Any) -> Any:
    return {**optimizer.state_dict(), "state": {}}


def other_model(kind: Kind, optimizer: Any) -> Any:
    return build(kind, torch.device("cpu"), shapes=((12, 20), (20, 14), *SHAPES[2:])).state_dict()


# Message and the parameter that it names, by kind where they differ.
FOREIGN: dict[str, tuple[Callable[[Kind, Any], Any], int, str]] = {
    "AdamW": (adamw_state, 0, r"lacks .*m_A, m_B.* \(it holds exp_avg, exp_avg_sq, step\)"),
    "transposed": (
        transposed,
        0,
        r"m_B .* has shape \(3, 12\); a weight of shape \(12, 20\) at rank 3 needs \(12, 3\)",
    ),
    "dense": (wrong_dense, 3, r"(exp_avg|momentum_buffer) .* has shape \(8,\)"),
    "no step": (without("step"), 1, "lacks step"),
    "no m_A": (without("m_A"), 1, "lacks m_A"),
    "empty": (empty_state, 0, "it holds nothing"),
    "other model": (other_model, 1, r"has shape \(3, 14\)"),
}


@every_kind
@pytest.mark.parametrize("named", [False, True], ids=["indexed", "named"])
@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_foreign_checkpoint_is_refused_by_parameter_and_leaves_everything_unchanged(
    kind: Kind, foreign: str, named: bool, device: torch.device
) -> None:
    make, where, message = FOREIGN[foreign]
    params = make_params(SHAPES, torch.float32, device)
    given: Any = [(f"layer.{i}", param) for i, param in enumerate(params)] if named else params
    optimizer = kind(given, rank=3, lr=0.125)
    train(optimizer, 2)
    assert_refused(optimizer, make(kind, optimizer), message, f"layer.{where}" if named else f"number {where}")
    train(optimizer, 1)


def assert_refused(optimizer: Any, state: Any, message: str, label: str) -> None:
    before, groups = snapshot(optimizer), [{**group, "params": None} for group in optimizer.param_groups]
    with pytest.raises(ValueError, match=message) as caught:
        optimizer.load_state_dict(state)
    assert f"parameter {label}" in str(caught.value)
    assert_same_bits(snapshot(optimizer), before)
    assert [{**group, "params": None} for group in optimizer.param_groups] == groups


SECOND_MOMENTS = {
    "rank1": {"v_row", "v_col"},
    "hadamard": {"v_A", "v_B"},
    "full": {"exp_avg_sq"},
}


@pytest.mark.parametrize("theirs", SECOND_MOMENTS)
@pytest.mark.parametrize("ours", SECOND_MOMENTS)
def test_a_checkpoint_of_another_second_moment_is_refused_by_what_it_lacks(
    ours: str, theirs: str, device: torch.device
) -> None:
    optimizer, other = (build(ADAMW, device, second_moment=kind) for kind in (ours, theirs))
    train(optimizer, 2)
    if ours == theirs:
        optimizer.load_state_dict(other.state_dict())
        return
    # the groups of a checkpoint are adopted with its state: only groups of today's options ask for today's state
    state = {"state": other.state_dict()["state"], "param_groups": optimizer.state_dict()["param_groups"]}
    assert_refused(optimizer, state, f"lacks {', '.join(sorted(SECOND_MOMENTS[ours]))} ", "number 0")


@pytest.mark.parametrize("cls", DEFAULTS, ids=str)
@pytest.mark.parametrize("kind", DEFAULTS, ids=str)
def test_a_checkpoint_of_another_class_is_refused_where_its_state_does_not_fit(
    kind: Kind, cls: Kind, device: torch.device
) -> None:
    optimizer, other = build(kind, device), build(cls, device)
    needs, holds = ({key for state in x.state.values() for key in state} for x in (optimizer, other))
    if needs <= holds:
        optimizer.load_state_dict(other.state_dict())
        return
    with pytest.raises(ValueError, match=r"lacks .* It was saved by another optimizer"):
        optimizer.load_state_dict(other.state_dict())


@each_class
def test_loading_adopts_the_options_of_the_checkpoint_as_torch_does(kind: Kind, device: torch.device) -> None:
    other = {"second_moment": "full"} if kind is ADAMW else {"residual_gain": 0.25}
    options = {"lr": 0.5, "weight_decay": 0.25, **other}
    saved = build(kind, device, **options)
    train(saved, 1)
    optimizer = kind(clone_params(params_of(saved)), rank=2)
    optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    group = optimizer.param_groups[0]
    assert group["rank"] == 3
    assert {key: group[key] for key in options} == options
    train(saved, 2, seed=3)
    train(optimizer, 2, seed=3)
    assert_same_bits(snapshot(optimizer), snapshot(saved))


@every_kind
def test_unknown_entries_of_a_loaded_state_survive(kind: Kind, device: torch.device) -> None:
    optimizer = build(kind, device)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0] |= {"note": 5, "extra": torch.ones(2)}
    optimizer.load_state_dict(state)
    train(optimizer, 1)
    held = optimizer.state[params_of(optimizer)[0]]
    assert held["note"] == 5
    assert_same_bits(held["extra"].cpu(), torch.ones(2))


@every_kind
def test_hooks_run_in_order_and_may_change_what_passes(kind: Kind, device: torch.device) -> None:
    optimizer = build(kind, device)
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


@every_kind
def test_zero_grad_clears_or_zeroes(kind: Kind, device: torch.device) -> None:
    optimizer = build(kind, device)
    train(optimizer, 1)
    optimizer.zero_grad(set_to_none=False)
    assert all((param.grad == 0).all() for param in params_of(optimizer))
    optimizer.zero_grad()
    assert all(param.grad is None for param in params_of(optimizer))


@every_kind
def test_named_parameters_keep_their_names_through_a_checkpoint(kind: Kind, device: torch.device) -> None:
    model = model_of(device)
    optimizer = kind(model.named_parameters(), rank=2)
    names = [name for name, _ in model.named_parameters()]
    assert optimizer.param_groups[0]["param_names"] == names
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
