"""LoRAPreSGD and LoRAPreLion: torch's SGD and Lion as the limits, plain formulas beyond them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from _contract import LION, SGD, Kind
from _formulas import MomentumRun, lion, random_matrix
from _support import (
    Shape,
    assert_close,
    assert_same_bits,
    clone_params,
    gradients,
    make_params,
    random_grads,
    relative_difference,
    set_grads,
)
from lorapre import LoRAPreLion, LoRAPreSGD

STEPS = 20
SHAPES: tuple[Shape, ...] = ((12, 20), (20, 12), (3, 12, 16), (12, 3, 3, 3))


def fixed_row_space(p: int, q: int, rank: int, steps: int) -> list[Tensor]:
    """Gradients whose rows all lie in one space of dimension ``rank``: factors can hold their momentum in full."""
    V = random_matrix(rank, q, seed=1)
    return [random_matrix(p, rank, seed=10 + step) @ V for step in range(steps)]


# Where the factors hold everything.


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("p", "q"), [(16, 24), (24, 16)])
def test_sgd_is_torchs_where_the_rank_suffices(
    p: int, q: int, nesterov: bool, momentum: float, device: torch.device
) -> None:
    if nesterov and momentum == 0.0:
        pytest.skip("torch refuses Nesterov without momentum")
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        ours = make_params([(p, q)], dtype, device)
        theirs = clone_params(ours)
        options: dict[str, Any] = {"lr": 0.05, "momentum": momentum, "nesterov": nesterov}
        # what is outside of the subspace has the weight of one gradient: only at the first step is there anything
        one = LoRAPreSGD(ours, rank=6, regression="subspace", residual_gain=None, **options)
        other = torch.optim.SGD(theirs, **options)
        for G in fixed_row_space(p, q, 5, STEPS):
            set_grads(ours, [G])
            set_grads(theirs, [G])
            one.step()
            other.step()
        assert_close(ours[0], theirs[0], tolerance, str(dtype))
        if momentum:
            state = one.state[ours[0]]
            assert_close(state["m_B"] @ state["m_A"], other.state[theirs[0]]["momentum_buffer"], 100 * tolerance)


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.5, 0.8)], ids=str)
@pytest.mark.parametrize(("p", "q"), [(16, 24), (24, 16)])
def test_lion_is_lion_where_the_rank_suffices(p: int, q: int, betas: tuple[float, float], device: torch.device) -> None:
    param = make_params([(p, q)], torch.float64, device)[0]
    optimizer = LoRAPreLion(
        [param], lr=0.01, rank=6, betas=betas, weight_decay=0.1, regression="subspace", residual_gain=None
    )
    W, m = param.detach().cpu().clone(), torch.zeros(p, q).double()
    for G in fixed_row_space(p, q, 5, STEPS):
        set_grads([param], [G])
        optimizer.step()
        direction, m = lion(m, G, betas)
        W = W - 0.01 * (direction + 0.1 * W)
    assert_close(param, W, 1e-12)
    state = optimizer.state[param]
    assert_close(state["m_B"] @ state["m_A"], m, 1e-12)


@pytest.mark.parametrize("kind", [SGD, LION], ids=str)
def test_at_the_highest_rank_the_momentum_is_within_its_last_singular_value(kind: Kind, device: torch.device) -> None:
    # r = min(p, q) - 1 of full-rank gradients: one direction of twelve is left out
    param = make_params([(12, 20)], torch.float64, device)[0]
    decay = 0.9
    options: dict[str, Any] = {"momentum": decay} if kind is SGD else {"betas": (0.5, decay)}
    optimizer = kind([param], rank=11, regression="subspace", **options)
    exact = torch.zeros(12, 20).double()
    for G in gradients((12, 20), 40):
        set_grads([param], [G])
        optimizer.step()
        exact = decay * exact + (1.0 if kind is SGD else 1 - decay) * G
    state = optimizer.state[param]
    S = torch.linalg.svdvals(exact)
    best = (S[-1] / exact.norm()).item()
    error = relative_difference(state["m_B"] @ state["m_A"], exact)
    assert 0.99 * best <= error <= 1.5 * best


# Plain formulas.

FORMS: dict[str, dict[str, Any]] = {
    "subspace": {},
    "no gain": {"residual_gain": None},
    "no residual": {"residual_gain": 0.0},
    "gain 0.3": {"residual_gain": 0.3},
    "gain 2": {"residual_gain": 2.0},
    "newton": {"regression": "newton", "residual_gain": None, "damping_mode": "relative", "damping": 1e-4},
    "newton, absolute": {"regression": "newton", "residual_gain": 0.5, "damping_mode": "absolute", "damping": 1e-4},
    "weight decay": {"weight_decay": 0.3},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "capturable": {"capturable": True, "weight_decay": 0.1},
}
OF_SGD: dict[str, dict[str, Any]] = {
    "Nesterov": {"nesterov": True, "residual_gain": None},
    "Nesterov, gain 0.3": {"nesterov": True, "residual_gain": 0.3},
    "no memory": {"momentum": 0.0},
}
TABLE = [(kind, name, options) for kind in (SGD, LION) for name, options in FORMS.items()]
TABLE += [(SGD, name, options) for name, options in OF_SGD.items()]
TABLE.append((LION, "other betas", {"betas": (0.3, 0.7)}))


@pytest.mark.parametrize(
    ("kind", "name", "options"), TABLE, ids=lambda value: "" if isinstance(value, dict) else str(value)
)
def test_twenty_steps_follow_the_formulas(kind: Kind, name: str, options: dict[str, Any], device: torch.device) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        params = [nn.Parameter(p.detach().to(dtype)) for p in make_params(SHAPES, torch.float32, device)]
        settings = {"lr": 1e-3, "regression": "subspace", "residual_gain": 1.0, **options}
        optimizer = kind(params, rank=4, **settings)
        runs = [MomentumRun(optimizer, param, optimizer.param_groups[0]) for param in params]
        streams = [gradients(shape, STEPS, seed=i) for i, shape in enumerate(SHAPES)]
        for step, grads in enumerate(zip(*streams, strict=True)):
            given: list[Tensor | None] = [grad.float() for grad in grads]
            given[step % 4] = None if step % 5 == 0 else given[step % 4]
            set_grads(params, given)
            optimizer.step()
            for run, grad in zip(runs, given, strict=True):
                if grad is not None:
                    run.step(grad)
        for param, run in zip(params, runs, strict=True):
            if kind is LION and dtype == torch.float32:
                # a sign may turn where rounding decides it; no more than a few elements do
                apart = (param.detach().cpu().double() - run.weight()).abs() > 1e-5
                assert apart.double().mean() < 0.005
                continue
            run.check(optimizer, param, tolerance)


def test_a_residual_gain_of_one_gives_both_parts_of_a_constant_gradient_the_same_weight(device: torch.device) -> None:
    # rank 2 below the gradient's: after a while the update is the whole sum, inside and outside
    G = (random_matrix(12, 6) @ random_matrix(6, 20, seed=1)).to(device)
    param = nn.Parameter(torch.zeros_like(G))
    optimizer = LoRAPreSGD([param], lr=1.0, rank=2, momentum=0.8, regression="subspace", residual_gain=1.0)
    for _ in range(120):
        before = param.detach().clone()
        param.grad = G.clone()
        optimizer.step()
    assert_close(before - param.detach(), G / (1 - 0.8), 1e-6)


# Weight decay.


@pytest.mark.parametrize("kind", [SGD, LION], ids=str)
def test_weight_decay_is_decoupled_from_the_momentum(kind: Kind, device: torch.device) -> None:
    shapes = ((12, 20), (7,))
    plain, decayed = (make_params(shapes, torch.float64, device) for _ in range(2))
    one, other = kind(plain, lr=0.1, rank=3, weight_decay=0.0), kind(decayed, lr=0.1, rank=3, weight_decay=0.5)
    for step in range(6):
        before = [(a.detach().clone(), b.detach().clone()) for a, b in zip(plain, decayed, strict=True)]
        grads = random_grads(plain, step)
        set_grads(plain, grads)
        set_grads(decayed, grads)
        one.step()
        other.step()
        for (old, old_decayed), a, b in zip(before, plain, decayed, strict=True):
            assert_close(b.detach() - (1 - 0.1 * 0.5) * old_decayed, a.detach() - old, 1e-12)
            for key, value in one.state[a].items():
                assert_same_bits(other.state[b][key], value)


# Dense parameters.


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("capturable", [False, True])
def test_dense_parameters_of_sgd_are_torchs(
    capturable: bool, maximize: bool, nesterov: bool, device: torch.device
) -> None:
    shapes = ((7,), (), (9, 11), (3, 3))
    options: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "nesterov": nesterov, "maximize": maximize}
    for dtype, ulps in ((torch.float64, 1e-15), (torch.float32, 5e-7)):
        ours = make_params(shapes, dtype, device)
        theirs = clone_params(ours)
        groups = [{"params": ours[:2]}, {"params": ours[2:], "compress": False}]
        matrix = make_params([(12, 20)], dtype, device, seed=3)  # and nothing compressed disturbs them
        one = LoRAPreSGD([*groups, {"params": matrix}], rank=3, capturable=capturable, **options)
        other = torch.optim.SGD(theirs, **options)
        for step in range(8):
            grads = random_grads(ours, step)
            for params in (ours, theirs):
                set_grads(params, grads)
            set_grads(matrix, random_grads(matrix, step))
            one.step()
            other.step()
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b, ulps, f"{dtype} {tuple(a.shape)}")
            assert_close(one.state[a]["momentum_buffer"], other.state[b]["momentum_buffer"], ulps)


def test_dense_parameters_of_lion_take_lion_exactly(device: torch.device) -> None:
    shapes = ((7,), (), (9, 11), (3, 3))
    ours = make_params(shapes, torch.float64, device)
    groups = [{"params": ours[:2]}, {"params": ours[2:], "compress": False}]
    matrix = make_params([(12, 20)], torch.float64, device, seed=3)
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1}
    optimizer = LoRAPreLion([*groups, {"params": matrix}], rank=3, **options)
    W = [param.detach().cpu().clone() for param in ours]
    m = [torch.zeros_like(weight) for weight in W]
    for step in range(8):
        grads = [grad.double() for grad in random_grads(ours, step)]
        set_grads(ours, grads)
        set_grads(matrix, random_grads(matrix, step))
        optimizer.step()
        for i, grad in enumerate(grads):
            direction, m[i] = lion(m[i], grad, (0.9, 0.99))
            W[i] = W[i] * (1 - 0.01 * 0.1) - 0.01 * direction
    for param, weight, buffer in zip(ours, W, m, strict=True):
        assert_close(param, weight, 1e-15)
        assert_close(optimizer.state[param]["momentum_buffer"], buffer, 1e-14)
