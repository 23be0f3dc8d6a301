"""What may change between two steps by the kernels; whatever is kept from one step to the next has to notice."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from _support import assert_same_bits, make_params, random_grads, set_grads, snapshot
from _triton import DEVICE, OPTIONS, exact_products, needs_triton, scalars_as_bounds  # noqa: F401
from lorapre import LoRAPreAdamW, LoRAPreSGD

pytestmark = needs_triton
SHAPES = ((12, 12), (12, 12), (9, 14), (2, 8, 10), (7,))
Change = Callable[[LoRAPreAdamW], None]


def build(shapes: tuple[tuple[int, ...], ...] = SHAPES, **options: Any) -> LoRAPreAdamW:
    params = make_params(shapes, torch.float32, torch.device(DEVICE))
    options = {"rank": 2, **OPTIONS, "weight_decay": 0.1, "update_clipping": True, "backend": "triton", **options}
    return LoRAPreAdamW(params, **options)


def params_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def step(optimizer: LoRAPreAdamW, seed: int, without: tuple[int, ...] = ()) -> None:
    """Gradients stay where they are if they can: whatever is told by their addresses is not told by these."""
    params = params_of(optimizer)
    for place, (param, grad) in enumerate(zip(params, random_grads(params, seed), strict=True)):
        if place in without:
            param.grad = None
        elif param.grad is None:
            param.grad = grad.to(param.device, param.dtype)
        else:
            param.grad.copy_(grad)
    optimizer.step()


def swap_weight(optimizer: LoRAPreAdamW) -> None:
    """Other memory; what lay there before is no weight any more."""
    param = params_of(optimizer)[1]
    old, param.data = param.data, param.data.clone()
    old.fill_(float("nan"))


def transpose_weights(optimizer: LoRAPreAdamW) -> None:
    """The same memory, tensors and shapes: only the strides tell."""
    for param in params_of(optimizer)[:2]:
        param.data = param.data.t()


def lay_weights_in_columns(optimizer: LoRAPreAdamW) -> None:
    param = params_of(optimizer)[2]
    param.data = param.data.t().contiguous().t()


def transpose_one_weight(optimizer: LoRAPreAdamW) -> None:
    param = params_of(optimizer)[1]
    param.data = param.data.t()


def narrow_weights(optimizer: LoRAPreAdamW) -> None:
    for param in params_of(optimizer):
        param.grad = None
        param.data = param.data.bfloat16()


def narrow_where_it_lies(optimizer: LoRAPreAdamW) -> None:
    """All weights and gradients where they were, with the same strides: only the dtypes tell how far stacks reach."""

    def narrowed(wide: Tensor) -> Tensor:
        values = wide.bfloat16()
        place = values.new_empty(0).set_(wide.untyped_storage(), wide.storage_offset(), wide.shape, wide.stride())  # type: ignore[call-overload]
        return place.copy_(values)

    for param in params_of(optimizer):
        grad, param.grad = param.grad, None
        assert grad is not None
        param.data = narrowed(param.data)
        param.grad = narrowed(grad)


def replace_state(optimizer: LoRAPreAdamW) -> None:
    state = optimizer.state[params_of(optimizer)[0]]
    for key in ("m_B", "m_A", "v_row", "step"):
        old, state[key] = state[key], state[key].clone()
        old.fill_(float("nan"))


def move_state(optimizer: LoRAPreAdamW) -> None:
    """The same tensors with other memory."""
    value = optimizer.state[params_of(optimizer)[2]]["m_A"]
    old, value.data = value.data, 0.5 * value.data
    old.fill_(float("nan"))


def narrow_state(optimizer: LoRAPreAdamW) -> None:
    for param in params_of(optimizer)[:2]:
        state = optimizer.state[param]
        for key in state.keys() - {"step"}:
            state[key] = state[key].bfloat16()


def load_state(optimizer: LoRAPreAdamW) -> None:
    """That of another optimizer, two steps further on one parameter."""
    other = build()
    for seed, without in enumerate(((), (1, 3), (1,))):
        step(other, 50 + seed, without)
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))


def set_options(optimizer: LoRAPreAdamW) -> None:
    optimizer.param_groups[0].update(lr=0.02, weight_decay=0.5, eps=1e-3, maximize=True, betas=(0.8, 0.9))


def add_group(optimizer: LoRAPreAdamW) -> None:
    added = make_params(((12, 12), (5,)), torch.float32, torch.device(DEVICE), seed=3)
    optimizer.add_param_group({"params": added, "lr": 0.03})


def replace_param(optimizer: LoRAPreAdamW) -> None:
    """Another parameter in the place and with the state of one, whose memory stays where it is."""
    params = optimizer.param_groups[0]["params"]
    old, params[0] = params[0], nn.Parameter(params[0].detach().clone())
    optimizer.state[params[0]] = optimizer.state.pop(old)


def set_count(optimizer: LoRAPreAdamW) -> None:
    optimizer.state[params_of(optimizer)[0]]["step"].fill_(7.0)


CHANGES: tuple[Change, ...] = (
    swap_weight,
    transpose_weights,
    lay_weights_in_columns,
    narrow_weights,
    narrow_where_it_lies,
    replace_state,
    move_state,
    narrow_state,
    load_state,
    set_options,
    add_group,
    replace_param,
    set_count,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_two_steps_counts_from_the_next_one_on(change: Change) -> None:
    """An optimizer that has stepped before is then one that has not, with the same weights and state."""
    optimizer = build()
    step(optimizer, 0)
    optimizer.settle()
    change(optimizer)
    fresh: LoRAPreAdamW = copy.deepcopy(optimizer)  # which remembers nothing
    assert "_layouts" in vars(optimizer)
    assert "_layouts" not in vars(fresh)
    before = snapshot(optimizer)
    for each in (optimizer, fresh):
        step(each, 1)
        each.settle()
    assert_same_bits(snapshot(optimizer), snapshot(fresh))
    assert all(param.isfinite().all() for param in params_of(optimizer))
    with pytest.raises(AssertionError):
        assert_same_bits(snapshot(optimizer), before)


def refuse(optimizer: LoRAPreAdamW, match: str) -> None:
    """The step is refused by the kernels and changes nothing."""
    before = snapshot(optimizer)
    grads = random_grads(params_of(optimizer), 9)
    set_grads(params_of(optimizer), grads)
    with pytest.raises(ValueError, match=match):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)


def crook_state(optimizer: LoRAPreAdamW) -> None:
    value = optimizer.state[params_of(optimizer)[1]]["m_B"]
    value.data = value.data.t().contiguous().t()


def crook_state_in_place(optimizer: LoRAPreAdamW) -> None:
    """The same tensor, the same memory."""
    value = optimizer.state[params_of(optimizer)[1]]["m_B"]
    value.data = value.data.as_strided(value.shape, (1, value.shape[0]))


def widen_one_kind_of_state(optimizer: LoRAPreAdamW) -> None:
    for param in params_of(optimizer)[:2]:
        optimizer.state[param]["v_row"] = optimizer.state[param]["v_row"].double()


def narrow_one_state(optimizer: LoRAPreAdamW) -> None:
    state = optimizer.state[params_of(optimizer)[1]]
    state["v_col"] = state["v_col"].bfloat16()


def ask_for_the_tangent(optimizer: LoRAPreAdamW) -> None:
    optimizer.param_groups[0]["regression"] = "tangent"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (crook_state, "not contiguous"),
        (crook_state_in_place, "not contiguous"),
        (widen_one_kind_of_state, "v_row of dtype torch.float64"),
        (narrow_one_state, "v_col of several dtypes"),
        (transpose_one_weight, "weights whose strides differ"),
        (ask_for_the_tangent, "regression='tangent'"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_kernels_cannot_step_any_more_is_refused_though_they_have_stepped_it(change: Change, match: str) -> None:
    optimizer = build()
    step(optimizer, 0)
    optimizer.settle()
    change(optimizer)
    refuse(optimizer, match)


def test_gradients_of_another_layout_are_refused_or_followed() -> None:
    optimizer, fresh = build(), build()
    for each in (optimizer, fresh):
        step(each, 0)
        each.settle()
    fresh = copy.deepcopy(fresh)
    for each in (optimizer, fresh):
        grads = random_grads(params_of(each), 2)
        set_grads(params_of(each), [grad.t().contiguous().t() if grad.ndim == 2 else grad for grad in grads])
        each.step()
    assert_same_bits(snapshot(optimizer), snapshot(fresh))
    params = params_of(optimizer)
    params[1].grad = params[1].grad.contiguous()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="gradients whose strides differ"):
        optimizer.step()
    set_grads(params, random_grads(params, 3))
    params[0].grad = params[0].grad.to_sparse()  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="sparse gradients \\(parameter '0'\\)"):
        optimizer.step()


def test_a_gradient_that_is_gone_for_a_step_leaves_its_parameter_alone() -> None:
    optimizer = build()
    steps: tuple[tuple[int, ...], ...] = ((), (0, 3), (1, 4), tuple(range(5)), ())
    for seed, without in enumerate(steps):
        before = snapshot(optimizer)
        fresh = copy.deepcopy(optimizer)
        for each in (optimizer, fresh):
            step(each, seed, without)
            each.settle()
        assert_same_bits(snapshot(optimizer), snapshot(fresh))
        for place, param in enumerate(params_of(optimizer)):
            assert optimizer.state[param]["step"].item() == sum(place not in some for some in steps[: seed + 1])
            if place in without:
                assert_same_bits(snapshot(optimizer)[place], before[place])


def test_gradients_may_be_zeroed_in_place_or_be_views_of_one_buffer() -> None:
    optimizer, expected = build(), build()
    params = params_of(optimizer)
    sizes = [param.numel() for param in params]
    flat = torch.zeros(sum(sizes), device=DEVICE)
    for param, part in zip(params, flat.split(sizes), strict=True):
        param.grad = part.view(param.shape)
    for seed in range(3):
        optimizer.zero_grad(set_to_none=False)
        assert not flat.any()
        for param, grad in zip(params, random_grads(params, seed), strict=True):
            assert param.grad is not None
            param.grad += grad.to(DEVICE)
        optimizer.step()
        step(expected, seed)
    assert_same_bits(snapshot(optimizer), snapshot(expected))


def test_steps_leave_nothing_in_copies_pickles_and_state_dicts() -> None:
    optimizer, unstepped = build(), build()
    step(optimizer, 0)
    assert vars(copy.deepcopy(optimizer)).keys() == vars(copy.deepcopy(unstepped)).keys()
    assert vars(pickle.loads(pickle.dumps(optimizer))).keys() == vars(pickle.loads(pickle.dumps(unstepped))).keys()
    stepped, fresh = optimizer.state_dict(), unstepped.state_dict()
    assert stepped.keys() == fresh.keys()
    assert all(stepped["state"][place].keys() == fresh["state"][place].keys() for place in fresh["state"])


def test_parameters_of_one_shape_part_by_their_counts_and_dtypes() -> None:
    params = [
        *make_params(((6, 8),) * 3, torch.float32, torch.device(DEVICE)),
        *make_params(((6, 8), (8,), (8,)), torch.float64, torch.device(DEVICE)),
    ]
    optimizer = LoRAPreSGD(params, rank=2, lr=0.1)
    for seed, without in enumerate(((0,), (), (4,))):
        grads: list[Tensor] = random_grads(params, seed)
        set_grads(params, [None if place in without else grad for place, grad in enumerate(grads)])
        optimizer.step()
    assert [optimizer.state[param]["step"].item() for param in params] == [2, 3, 3, 3, 2, 3]
