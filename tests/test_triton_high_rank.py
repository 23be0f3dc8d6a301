"""Steps at high ranks, by batched products after the first pass: against the reference and the kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from _formulas import random_matrix
from _support import Shape, assert_close, gradients, set_grads
from _triton import (  # noqa: F401
    assert_nothing_changes_where_not_enabled,
    both,
    exact_products,
    needs_triton,
    params_of,
    scalars_as_bounds,
)
from lorapre.backends.triton import blocked_cholesky, row_bases, table
from test_triton_adamw import CASES, run_beside_the_reference

pytestmark = needs_triton

NAMES = (
    "tall",
    "two shapes",
    "stacks on the device",
    "convolutions",
    "transposed",
    "clipped",
    "maximize",
    "spectrum clipped",
    "spectrum clipped besides",
    "spectrum clipped on the device",
    "absolute eps",
    "full v, clipped",
    "no memory in m",
    "sweeps now and then",
    "sweeps once, with everything clipped",
    "sweeps now and then, transposed",
    "sweeps now and then, full v, gradients missing",
    "gradients missing, on the device, with everything else",
)


@pytest.fixture(autouse=True)
def torch_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "KERNEL_RANK", 0)
    monkeypatch.setattr(table, "CHOLESKY_COLUMNS", 16)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_that_of_the_formulas(name: str, device: torch.device) -> None:
    (case,) = (one for one in CASES if one.name == name)
    run_beside_the_reference(case, torch.float32, device, 1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"sweep_interval": 2}, {"state_dtype": torch.bfloat16}, {"stochastic_rounding": True}]
)
def test_narrow_numbers_are_stepped_as_by_the_kernels(
    options: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: tuple[Shape, ...] = ((40, 56), (40, 56), (17, 33))
    steps = []
    for rank in (0, table.MAX_RANK):
        monkeypatch.setattr(table, "KERNEL_RANK", rank)
        optimizer, _ = both(shapes, torch.bfloat16, device, rank=8, **options)
        for grads in zip(*(gradients(shape, 2, seed=i) for i, shape in enumerate(shapes)), strict=True):
            set_grads(params_of(optimizer), grads)
            optimizer.step()
        steps.append([param.detach().float() for param in params_of(optimizer)])
    for mine, kernels in zip(*steps, strict=True):
        # numbers close to the middle between two fall on either side
        assert ((mine - kernels).abs() > 0).float().mean() < 0.05
        assert_close(mine, kernels, 2e-3)


@pytest.mark.parametrize("sweeps", [True, False])
@pytest.mark.parametrize("second_moment", ["rank1", "full"])
def test_nothing_changes_where_the_step_is_not_enabled(second_moment: str, sweeps: bool, device: torch.device) -> None:
    shapes: tuple[Shape, ...] = ((17, 33), (17, 33))
    options = {"nonfinite": "skip", "weight_decay": 0.5, "update_clipping": True, "second_moment": second_moment}
    optimizer, _ = both(shapes, torch.float32, device, **options)
    assert_nothing_changes_where_not_enabled(optimizer, shapes, sweeps=sweeps)


@pytest.mark.parametrize("kind", ["of full rank", "of low rank", "none", "between sweeps"])
def test_a_rank_above_that_of_the_kernels(kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one matrix, too, and shapes whose sides are no multiples of anything."""
    monkeypatch.setattr(table, "KERNEL_RANK", 128)
    monkeypatch.setattr(table, "CHOLESKY_COLUMNS", 64)
    monkeypatch.setattr(table, "HIGH_RANK_FACTORS", 1)
    shapes: tuple[Shape, ...] = ((133, 140), (150, 139), (131, 170), (133, 140))
    interval = 2 if kind == "between sweeps" else 1
    mine, expected = both(shapes, torch.float32, device, rank=130, sweep_interval=interval)
    for seed in range(2):
        for optimizer in (mine, expected):
            grads = [random_matrix(*shape, seed=seed) for shape in shapes]
            if kind == "of low rank":
                grads = [random_matrix(p, 3, seed=seed) @ random_matrix(3, q, seed=9) for p, q in shapes]
            set_grads(params_of(optimizer), [grad.float() * (kind != "none") for grad in grads])
            optimizer.step()
    for param, twin in zip(params_of(mine), params_of(expected), strict=True):
        assert_close(param.detach(), twin.detach(), 1e-4)
        A = mine.state[param]["m_A"].double()
        assert (A @ A.mT - torch.eye(130, device=device)).abs().max() < 1e-5


@pytest.mark.parametrize("n", [1, 5, 37, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_factors_are_those_that_torch_finds(dtype: torch.dtype, n: int, device: torch.device) -> None:
    X = random_matrix(3, 2 * n, n).to(device, dtype)
    S = X.mT @ X
    L = S.clone()
    T, works = blocked_cholesky.inverse_cholesky(L, 1e-30)
    assert works.all()
    eps = torch.finfo(dtype).eps
    assert_close(L, torch.linalg.cholesky(S), 100 * eps)
    assert_close(T, torch.linalg.inv(torch.linalg.cholesky(S)), 1000 * eps)


def test_a_matrix_without_a_decomposition_is_told_and_bounded(device: torch.device) -> None:
    S = torch.eye(40).repeat(2, 1, 1).to(device)
    S[1, 20, 20] = -1.0
    T, works = blocked_cholesky.inverse_cholesky(S, 1e-6)
    assert works.tolist() == [True, False]
    assert T.abs().max() < 1.1e3


def basis(X: Tensor) -> tuple[Tensor, Tensor]:
    """Q with orthonormal rows and the matrix S of X = S Q."""
    E, S = row_bases.last_pass(*row_bases.conditioned([X]))
    return torch.baddbmm(X, E, X), S


@pytest.mark.parametrize("grams", [("float64", "ieee"), ("float64", "float64"), ("ieee",) * 3])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_bases_are_orthonormal_to_rounding(
    condition: float, grams: tuple[str, ...], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "GRAMS", grams)
    X = random_matrix(2, 90, 40) * torch.logspace(0, -1, 40, base=condition, dtype=torch.float64)
    X = (X @ torch.linalg.qr(random_matrix(40, 40)).Q).mT.float().contiguous().to(device)
    Q, S = (found.double().cpu() for found in basis(X.clone()))
    eps = torch.finfo(torch.float32).eps
    assert (Q @ Q.mT - torch.eye(40)).abs().max() < 64 * eps
    assert (X.double().cpu() - S @ Q).norm() < 64 * eps * X.double().norm().cpu()


def test_a_basis_of_nothing_is_nothing(device: torch.device) -> None:
    Q, S = basis(torch.zeros(2, 20, 40, device=device))
    assert not Q.any()
    assert not S.any()


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_momenta_of_any_size_are_followed(scale: float, device: torch.device) -> None:
    shape: Shape = (40, 56)
    optimizer, expected = both((shape,), torch.float32, device, rank=8)
    for grad in gradients(shape, 2):
        for one in (optimizer, expected):
            set_grads(params_of(one), [grad * scale])
            one.step()
    states = [one.state[params_of(one)[0]] for one in (optimizer, expected)]
    assert_close(*(state["m_B"] @ state["m_A"] for state in states), 1e-5)


@pytest.mark.parametrize("weak", [1.0, 0.9, 0.0])
def test_the_projector_is_that_on_the_rows_and_enlarges_nothing(weak: float, device: torch.device) -> None:
    exact = torch.linalg.qr(random_matrix(2, 60, 20)).Q.mT
    strength = torch.ones(20, 1, dtype=torch.float64)
    strength[-1] = weak
    X = (exact * strength).float().to(device)
    found = X.mT @ row_bases.projector(row_bases.grams([X], "ieee")) @ X
    assert_close(found, exact.mT @ (exact * (1.0 - (1.0 - strength**2) ** 3)), 1e-5)


def test_on_drifting_data_of_changing_scale_the_factors_stay_those_of_batched_torch(device: torch.device) -> None:
    shapes: tuple[Shape, ...] = ((48, 72), (72, 48))
    optimizer, expected = both(shapes, torch.float32, device, rank=20, lr=1e-3)
    drawn = torch.Generator().manual_seed(0)
    signals = [torch.zeros(shape) for shape in shapes]
    for step in range(24):
        if step % 4 == 0:
            lows = [torch.randn(p, 6, generator=drawn) @ torch.randn(6, q, generator=drawn) for p, q in shapes]
            signals = [0.5 * signal + low for signal, low in zip(signals, lows, strict=True)]
        scale = 10.0 ** (4 * (step // 8 % 3) - 4)
        noisy = [(signal + torch.randn(signal.shape, generator=drawn)) * scale for signal in signals]
        for each in (optimizer, expected):
            set_grads(params_of(each), [grad.to(device) for grad in noisy])
            each.step()
    for ours, theirs in zip(params_of(optimizer), params_of(expected), strict=True):
        own, other = optimizer.state[ours], expected.state[theirs]
        assert (own["m_A"] @ own["m_A"].mT - torch.eye(20, device=device)).abs().max() < 5e-6
        assert_close(own["m_B"] @ own["m_A"], other["m_B"] @ other["m_A"], 1e-4)
        assert_close(ours, theirs, 1e-4)
