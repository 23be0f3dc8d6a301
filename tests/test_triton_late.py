"""Gradients that are not finite, where kernels take part: nothing changes, nobody waits, and it is said afterwards."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from _support import assert_close, assert_same_bits, make_params, random_grads, set_grads, snapshot
from _triton import OPTIONS, exact_products, needs_triton, scalars_as_bounds  # noqa: F401
from lorapre import LoRAPreAdamW, NonFiniteGradientError
from lorapre.backends.triton import table
from lorapre.diagnostics import MomentumDiagnostics
from lorapre.optim import gradients as checks

pytestmark = needs_triton
SHAPES = ((9, 13), (2, 8, 10), (7,))
NAMES = ("matrix", "stack", "vector")


def build(device: torch.device, **options: Any) -> LoRAPreAdamW:
    params = make_params(SHAPES, torch.float32, device)
    options = {"rank": 2, **OPTIONS, "weight_decay": 0.1, "update_clipping": True, "backend": "triton", **options}
    return LoRAPreAdamW(list(zip(NAMES, params, strict=True)), **options)


def params_of(optimizer: LoRAPreAdamW) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def step(optimizer: LoRAPreAdamW, seed: int, bad: tuple[int, ...] = (), value: float = float("nan")) -> None:
    params = params_of(optimizer)
    grads = random_grads(params, seed)  # type: ignore[arg-type]
    for index in bad:
        grads[index].view(-1)[3] = value
    set_grads(params, grads)  # type: ignore[arg-type]
    optimizer.step()


@pytest.fixture
def in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch for one parameter at a time: the first pass of all others comes after the decision."""
    monkeypatch.setattr(table, "LEAST_SCRATCH", 1)
    monkeypatch.setattr(table, "SCRATCH_SHARE", 0.0)


def asked(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors that the check reads for itself."""
    seen: list[Tensor] = []
    original = checks.largest

    def watched(tensors: Sequence[Tensor]) -> Tensor:
        seen.extend(tensors)
        return original(tensors)

    monkeypatch.setattr(checks, "largest", watched)
    return seen


@pytest.mark.parametrize(
    ("where", "turns"),
    [(0, False), (1, False), (2, False), (1, True)],
    ids=["a matrix", "a stack", "a dense parameter", "a matrix of a later turn"],
)
def test_a_bad_step_changes_nothing_and_the_next_call_says_which_gradient_it_was(
    where: int, turns: bool, device: torch.device, request: pytest.FixtureRequest
) -> None:
    if turns:
        request.getfixturevalue("in_turns")
    optimizer = build(device)
    step(optimizer, 0)
    optimizer.settle()
    before = snapshot(optimizer)
    step(optimizer, 1, bad=(where,))
    changed = [(W, {key: value for key, value in state.items() if key != "step"}) for W, state in snapshot(optimizer)]
    kept = [(W, {key: value for key, value in state.items() if key != "step"}) for W, state in before]
    assert_same_bits(changed, kept)
    with pytest.raises(NonFiniteGradientError, match=rf"'{NAMES[where]}' holds inf or nan.*the step before, which"):
        step(optimizer, 2)
    assert_same_bits(snapshot(optimizer), before)  # the counters too; and the call that raised did nothing
    step(optimizer, 3)
    optimizer.settle()
    assert_same_bits(snapshot(optimizer), two_good_steps(device))


@pytest.mark.parametrize("turns", [False, True], ids=["at once", "in turns"])
def test_a_bad_gradient_leaves_a_second_moment_in_full_as_it_was(
    turns: bool, device: torch.device, request: pytest.FixtureRequest
) -> None:
    def seconds(optimizer: LoRAPreAdamW) -> list[Tensor]:
        found = [optimizer.state[param]["exp_avg_sq"].clone() for param in params_of(optimizer)]
        assert all(v.count_nonzero() > 0 for v in found)
        return found

    if turns:
        request.getfixturevalue("in_turns")
    optimizer = build(device, second_moment="full", nonfinite="skip")
    step(optimizer, 0)
    before = seconds(optimizer)
    step(optimizer, 1, bad=(1,))
    assert_same_bits(seconds(optimizer), before)
    step(optimizer, 3)
    optimizer.settle()
    assert_same_bits(snapshot(optimizer), two_good_steps(device, second_moment="full"))


@cache
def two_good_steps(device: torch.device, second_moment: str = "rank1") -> list[Any]:
    optimizer = build(device, second_moment=second_moment)
    for seed in (0, 3):
        step(optimizer, seed)
    return snapshot(optimizer)


@pytest.mark.parametrize("value", [-float("inf"), 1e25])
def test_infinities_and_squares_beyond_float32_count_as_bad(value: float, device: torch.device) -> None:
    optimizer = build(device)
    before = snapshot(optimizer)
    step(optimizer, 0, bad=(1,), value=value)
    with pytest.raises(NonFiniteGradientError, match="'stack'"):
        optimizer.settle()
    assert_same_bits(snapshot(optimizer), before)
    optimizer.settle()  # says it once


def test_all_bad_gradients_are_counted(device: torch.device) -> None:
    optimizer = build(device)
    step(optimizer, 0, bad=(0, 1, 2))
    with pytest.raises(NonFiniteGradientError, match=r"'matrix' \(and those of 2 more\)"):
        optimizer.settle()


def test_skipping_leaves_the_step_out_with_a_warning(device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    optimizer = build(device, nonfinite="skip")
    step(optimizer, 0)
    with caplog.at_level(logging.WARNING, logger="lorapre"):
        step(optimizer, 1, bad=(0,))
        assert not caplog.records
        step(optimizer, 3)
    assert [record.getMessage() for record in caplog.records] == [
        "LoRAPreAdamW skips a step: the gradient of parameter 'matrix' holds inf or nan, or its squares do"
    ]
    assert_same_bits(snapshot(optimizer), two_good_steps(device))


def test_what_is_saved_or_copied_after_a_bad_step_is_the_state_before_it(device: torch.device) -> None:
    optimizer = build(device, nonfinite="skip")
    step(optimizer, 0)
    before = copy.deepcopy(optimizer.state_dict())
    for saved in (
        lambda: optimizer.state_dict(),
        lambda: copy.deepcopy(optimizer).state_dict(),
        lambda: pickle.loads(pickle.dumps(optimizer)).state_dict(),
    ):
        step(optimizer, 1, bad=(2,))
        found = saved()
        assert_same_bits(found["state"], before["state"])
    step(optimizer, 1, bad=(2,))
    optimizer.load_state_dict(before)  # whose counters nobody takes back
    step(optimizer, 2)
    assert all(state["step"].item() == 2 for state in optimizer.state_dict()["state"].values())


@pytest.mark.parametrize("call", ["state_dict", "load_state_dict", "deepcopy"])
def test_whoever_comes_next_hears_of_it_once_and_does_nothing(call: str, device: torch.device) -> None:
    optimizer = build(device)
    state = build(device, seed=5).state_dict()
    before = snapshot(optimizer)
    calls = {
        "state_dict": optimizer.state_dict,
        "load_state_dict": lambda: optimizer.load_state_dict(state),
        "deepcopy": lambda: copy.deepcopy(optimizer),
    }
    step(optimizer, 0, bad=(0,))
    with pytest.raises(NonFiniteGradientError, match="'matrix'"):
        calls[call]()
    assert_same_bits(snapshot(optimizer), before)
    calls[call]()


def test_a_closure_is_not_asked_by_a_call_that_raises(device: torch.device) -> None:
    optimizer = build(device)
    step(optimizer, 0, bad=(0,))
    with pytest.raises(NonFiniteGradientError):
        optimizer.step(lambda: pytest.fail("asked"))


def test_gradients_that_the_kernels_read_are_not_read_for_the_check(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = asked(monkeypatch)
    for capturable in (False, True):
        optimizer = build(device, capturable=capturable)
        seen.clear()
        step(optimizer, 0)
        assert [tensor.shape for tensor in seen] == [SHAPES[2]]


@pytest.mark.usefixtures("in_turns")
def test_those_that_have_to_wait_for_their_turn_are(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = asked(monkeypatch)
    step(build(device), 0)
    assert [tensor.shape for tensor in seen] == list(SHAPES[1:])


def test_several_ranks_and_groups_are_read_once_for_the_check_too(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def grouped() -> LoRAPreAdamW:
        params = make_params(SHAPES, torch.float32, device)
        groups = [{"params": params[:1], "rank": 3}, {"params": params[1:], "lr": 0.2}]
        return LoRAPreAdamW(groups, **{**OPTIONS, "rank": 2, "backend": "triton"})

    seen = asked(monkeypatch)
    optimizer, clean = grouped(), grouped()
    for each in (optimizer, clean):
        step(each, 0)
    assert [tensor.shape for tensor in seen] == [SHAPES[2]] * 2
    for where in range(3):
        step(optimizer, 1, bad=(where,))
        with pytest.raises(NonFiniteGradientError, match=f"'{where}'"):
            optimizer.settle()
    for each in (optimizer, clean):
        step(each, 2)
    assert_same_bits(snapshot(optimizer), snapshot(clean))


def test_the_step_reads_nothing_back_from_the_device(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_contract_capture import HostReads

    optimizer = build(device)
    counters = {optimizer.state[param]["step"].data_ptr() for param in params_of(optimizer)}

    class Reads(HostReads):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if args and isinstance(args[0], Tensor) and args[0].data_ptr() in counters:  # on the CPU
                return func(*args, **(kwargs or {}))
            return super().__torch_dispatch__(func, types, args, kwargs)

    params = params_of(optimizer)
    for seed in range(2):  # each kind of step counts the tiles of each shape, on the CPU
        step(optimizer, seed)
    optimizer.settle()
    with Reads(device) as reads:
        optimizer.step()
    assert reads.found == []
    waiting = build(device, backend="eager")
    set_grads(params_of(waiting), random_grads(params, 0))  # type: ignore[arg-type]
    with Reads(device) as reads:
        waiting.step()
    assert reads.found


def test_without_kernels_a_bad_gradient_raises_at_once(device: torch.device) -> None:
    optimizer = build(device, backend="eager")
    before = snapshot(optimizer)
    with pytest.raises(
        NonFiniteGradientError, match=r"'matrix' holds inf or nan, or its squares do\. Nothing was changed"
    ):
        step(optimizer, 0, bad=(0,))
    assert_same_bits(snapshot(optimizer), before)


def test_gradients_on_two_types_of_device_are_decided_on_at_once(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as if the vector lived elsewhere
    optimizer = build(device)
    vector = params_of(optimizer)[2]
    original = checks.device_types
    monkeypatch.setattr(checks, "device_types", lambda items: original(items) | {"another"})
    before = snapshot(optimizer)
    with pytest.raises(
        NonFiniteGradientError, match=r"'vector' holds inf or nan, or its squares do\. Nothing was changed"
    ):
        step(optimizer, 0, bad=(2,))
    assert_same_bits(snapshot(optimizer), before)
    step(optimizer, 1)
    optimizer.settle()
    assert optimizer.state[vector]["step"].item() == 1


def test_the_paper_s_regression_is_decided_on_late_too(device: torch.device) -> None:
    options = {"regression": "newton", "second_moment": "hadamard", "update_clipping": False}
    optimizer, clean = build(device, **options), build(device, **options)
    for where in (0, 2):
        step(optimizer, 0, bad=(where,))
        with pytest.raises(NonFiniteGradientError, match=f"'{NAMES[where]}'.*step before"):
            optimizer.settle()
    for each in (optimizer, clean):
        step(each, 1)
    assert_same_bits(snapshot(optimizer), snapshot(clean))


@pytest.mark.parametrize("both", [False, True], ids=["one group", "all"])
def test_a_group_that_is_capturable_masks_its_counters_itself(both: bool, device: torch.device) -> None:
    params = make_params(SHAPES, torch.float32, device)
    groups = [{"params": params[:1], "capturable": True}, {"params": params[1:], "capturable": both}]
    optimizer = LoRAPreAdamW(groups, **{**OPTIONS, "rank": 2, "backend": "triton", "nonfinite": "skip"})
    step(optimizer, 0)
    optimizer.settle()
    before = snapshot(optimizer)
    for where in range(3):
        step(optimizer, 1, bad=(where,))
        if not both:  # or there is nothing to hear of
            optimizer.settle()
        assert_same_bits(snapshot(optimizer), before)


def test_the_diagnostics_leave_out_what_the_step_left_out(device: torch.device) -> None:
    optimizer = build(device, nonfinite="skip")
    step(optimizer, 0, bad=(0,))
    with MomentumDiagnostics(optimizer) as diagnostics:
        for seed in range(3):
            step(optimizer, seed, bad=(2,) if seed == 1 else ())
    assert sorted({record.step for record in diagnostics.records}) == [1, 3]


@pytest.mark.parametrize(
    ("beta1", "state_dtype"),
    [(0.0, torch.float32), (0.999, torch.float32), (0.99999, torch.float32), (0.999, torch.bfloat16)],
)
def test_however_slow_the_average_is_the_update_is_that_of_batched_torch(
    beta1: float, state_dtype: torch.dtype, device: torch.device
) -> None:
    # what the first pass leaves is G A^T: from K = beta1 B + (1 - beta1) G A^T the update would be 1e5 roundings off
    steps = []
    for backend in ("triton", "eager"):
        optimizer = build(device, backend=backend, betas=(beta1, 0.95), state_dtype=state_dtype)
        step(optimizer, 0)
        for param in params_of(optimizer)[:2]:  # as large as it is after 1 / (1 - beta1) steps
            optimizer.state[param]["m_B"].div_(1.0 - beta1)
        step(optimizer, 1)
        steps.append([W for W, _ in snapshot(optimizer)][:2])
    for mine, other in zip(*steps, strict=True):
        assert_close(mine, other, 1e-5 if state_dtype == torch.float32 else 1e-2)
