"""The contract of torch.optim: what the state holds, from before the first step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from _contract import (
    ADAMW,
    LION,
    MUON,
    MUON_PAPER,
    MUON_ROWS,
    PAPER,
    SGD,
    Kind,
    build,
    each_class,
    params_of,
)
from _support import (
    train,
)
from lorapre import LoRAPreAdamW

FACTORS = {"step", "m_B", "m_A"}
STATES = [
    (Kind("rank1", LoRAPreAdamW, {"second_moment": "rank1"}), {*FACTORS, "v_row", "v_col"}),
    (Kind("hadamard", LoRAPreAdamW, {"second_moment": "hadamard"}), {*FACTORS, "v_B", "v_A"}),
    (Kind("full", LoRAPreAdamW, {"second_moment": "full"}), {*FACTORS, "exp_avg_sq"}),
    (PAPER, {*FACTORS, "v_B", "v_A"}),
    (MUON_ROWS, {*FACTORS, "u_row"}),
    *((kind, FACTORS) for kind in (MUON, SGD, LION, MUON_PAPER)),
]


@pytest.mark.parametrize(("kind", "keys"), STATES, ids=lambda value: str(value) if isinstance(value, Kind) else "")
def test_state_exists_before_the_first_step_and_keeps_its_keys(
    kind: Kind, keys: set[str], device: torch.device
) -> None:
    optimizer = build(kind, device)
    for steps in (0, 1, 2):
        for param in params_of(optimizer):
            held = optimizer.state[param]
            expected = keys if param.ndim >= 2 else kind.dense_keys
            if kind is MUON and param.ndim >= 2:  # what is evened out is the longer side
                expected = expected | {"u_row" if param.shape[-2] >= param.shape[-1] else "u_col"}
            assert set(held) == expected
            assert all(type(value) is Tensor and not value.requires_grad for value in held.values())
            assert held["step"].shape == ()
            assert held["step"].dtype == torch.float32
            assert held["step"].device.type == "cpu"
            assert held["step"].item() == steps
        train(optimizer, 1)


INITIAL_SHAPES = {(30, 50): ((30, 3), (3, 50)), (2, 30, 50): ((2, 30, 3), (2, 3, 50))}


@pytest.mark.parametrize("kind", [PAPER, MUON_PAPER], ids=str)
def test_newtons_initial_factors_are_zero_on_the_left_and_small_on_the_right(kind: Kind, device: torch.device) -> None:
    optimizer = build(kind, device, shapes=tuple(INITIAL_SHAPES), view_3d="stack")
    for param, (left, right) in zip(params_of(optimizer), INITIAL_SHAPES.values(), strict=True):
        state = optimizer.state[param]
        for moment in "mv" if kind is PAPER else "m":
            assert state[f"{moment}_B"].shape == left
            assert not state[f"{moment}_B"].any()
            assert state[f"{moment}_A"].shape == right
            assert state[f"{moment}_A"].std().item() == pytest.approx(0.02, rel=0.15)
            assert abs(state[f"{moment}_A"].mean().item()) < 0.006


@pytest.mark.parametrize("regression", ["subspace", "tangent"])
@each_class
def test_the_other_initial_factors_are_zero_on_the_left_and_orthonormal_on_the_right(
    kind: Kind, regression: str, device: torch.device
) -> None:
    second = {"second_moment": "hadamard"} if kind is ADAMW else {}
    optimizer = build(kind, device, shapes=tuple(INITIAL_SHAPES), view_3d="stack", regression=regression, **second)
    for param, (left, right) in zip(params_of(optimizer), INITIAL_SHAPES.values(), strict=True):
        state = optimizer.state[param]
        for moment in "mv" if second else "m":
            assert state[f"{moment}_B"].shape == left
            assert not state[f"{moment}_B"].any()
            A = state[f"{moment}_A"].double().cpu()
            assert A.shape == right
            assert (A @ A.mT - torch.eye(3)).abs().max() < 1e-6
            assert abs(A.mean().item()) < 0.05


def test_a_second_moments_rank_is_its_own_and_at_most_the_smaller_side(device: torch.device) -> None:
    for given, resolved in ((2, 2), (0.5, 6), (12, 12), (100, 12)):
        optimizer = build(ADAMW, device, shapes=((12, 20),), second_moment="hadamard", second_moment_rank=given)
        state = optimizer.state[params_of(optimizer)[0]]
        assert (state["m_B"].shape, state["m_A"].shape) == ((12, 3), (3, 20))
        assert (state["v_B"].shape, state["v_A"].shape) == ((12, resolved), (resolved, 20))


def test_a_stacks_rank_1_second_moment_has_a_row_and_a_column_for_each_matrix(device: torch.device) -> None:
    optimizer = build(ADAMW, device, shapes=((12, 20), (4, 12, 20), (12, 3, 2, 2)), second_moment="rank1")
    shapes = [(optimizer.state[p]["v_row"].shape, optimizer.state[p]["v_col"].shape) for p in params_of(optimizer)]
    assert shapes == [((12,), (20,)), ((4, 12), (4, 20)), ((12,), (12,))]
