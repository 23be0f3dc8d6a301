"""Steps of which torch takes over after the first pass, as at high ranks: against the reference and the kernels."""

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
from lorapre import subspace
from lorapre.backends.triton import high_rank, table
from test_triton_adamw import CASES, Case, run_beside_the_reference

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
    "gradients missing, on the device, with everything else",
)


@pytest.fixture(autouse=True)
def torch_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "KERNEL_RANK", 0)
    monkeypatch.setattr(table, "CHUNK", 64)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_that_of_the_formulas(name: str, device: torch.device) -> None:
    (case,) = (one for one in CASES if one.name == name)
    run_beside_the_reference(case, torch.float32, device, 1e-5)


@pytest.mark.parametrize("options", [{}, {"state_dtype": torch.bfloat16}, {"stochastic_rounding": True}])
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


@pytest.mark.parametrize("second_moment", ["rank1", "full"])
def test_nothing_changes_where_the_step_is_not_enabled(second_moment: str, device: torch.device) -> None:
    shapes: tuple[Shape, ...] = ((17, 33), (17, 33))
    options = {"nonfinite": "skip", "weight_decay": 0.5, "update_clipping": True, "second_moment": second_moment}
    optimizer, _ = both(shapes, torch.float32, device, **options)
    assert_nothing_changes_where_not_enabled(optimizer, shapes)


def test_a_rank_above_that_of_the_kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "KERNEL_RANK", 128)
    run_beside_the_reference(Case("", ((133, 140),), rank=130, steps=1), torch.float32, device, 1e-5)


@pytest.mark.parametrize(("passes", "dtype"), [(2, torch.float64), (3, torch.float32)])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_bases_are_orthonormal_to_rounding_and_the_triangles_are_theirs(
    condition: float, passes: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "GRAM_PASSES", passes)
    monkeypatch.setattr(table, "GRAM_DTYPE", dtype)
    X = random_matrix(2, 90, 40) * torch.logspace(0, -1, 40, base=condition, dtype=torch.float64)
    X = (X @ torch.linalg.qr(random_matrix(40, 40)).Q).float().to(device)
    Q, triangle = (found.double().cpu() for found in high_rank.orthonormalize(X))
    eps = torch.finfo(torch.float32).eps
    assert (Q.mT @ Q - torch.eye(40)).abs().max() < 64 * eps
    assert not triangle.tril(-1).any()
    assert (X.double().cpu() - Q @ triangle).norm() < 64 * eps * X.double().norm().cpu()


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_bases_of_any_size_are_those_that_torch_finds(scale: float, device: torch.device) -> None:
    X: Tensor = (random_matrix(3, 40, 20) * scale).float().to(device)
    found, triangle = high_rank.orthonormalize(X)
    assert triangle.isfinite().all()
    assert_close(found, subspace.orthonormalize(X), 1e-5)
