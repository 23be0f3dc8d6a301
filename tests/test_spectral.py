"""Equation (15): the sketch finds a large singular value, and what it clips stays below its limit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from _support import assert_close, set_grads
from lorapre import LoRAPreAdamW, reference, spectral


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def estimate(M: Tensor) -> Tensor:
    n, p, q = M.shape
    return spectral.norm(M, ones(n, p, 1), ones(n, 1, q)).flatten()


def test_the_signs_are_those_of_the_formulas_and_fair() -> None:
    signs = spectral.random_signs(5461, torch.float64, torch.device("cpu"))
    assert torch.equal(signs[:300], reference.sketch_signs(300))
    assert signs.square().eq(1).all()
    # Columns, and products of two different ones, are sums of 5461 fair coins.
    products = signs.mT @ signs / 5461
    assert (products - torch.eye(16)).abs().max() < 4.5 / math.sqrt(5461)
    assert signs.mean(dim=0).abs().max() < 4 / math.sqrt(5461)


@pytest.mark.parametrize(("p", "q"), [(96, 96), (40, 200), (200, 40)])
def test_one_large_singular_value_is_found_whatever_its_direction(p: int, q: int) -> None:
    unit = spectral.random_norm(p, q)
    found = []
    for seed in range(40):
        direction = torch.outer(normal(p, seed=seed), normal(q, seed=seed + 100))
        M = normal(p, q, seed=seed + 200) * 0.5 + 3.0 * unit * direction / torch.linalg.matrix_norm(direction, 2)
        found.append(estimate(M[None]).item() / torch.linalg.matrix_norm(M, 2).item())
    ratios = torch.tensor(found)
    assert ratios.median() == pytest.approx(0.95, abs=0.1)
    assert ((ratios > 0.75) & (ratios < 1.25)).float().mean() >= 0.75
    assert ((ratios > 0.5) & (ratios < 1.5)).all()


def test_a_random_matrix_of_mean_square_1_is_not_far_above_its_own_norm() -> None:
    # The bulk is taken off: what is left is the chance of 120 products.
    for p, q in ((64, 64), (300, 20), (20, 300)):
        found = estimate(normal(20, p, q)) / spectral.random_norm(p, q)
        assert found.max() < 2.0
        assert found.median() < 1.0


def test_zeros_have_no_norm_and_rows_without_a_gradient_do_not_count() -> None:
    assert estimate(torch.zeros(2, 5, 7, dtype=torch.float64)).tolist() == [0.0, 0.0]
    M, rows = normal(1, 30, 20), ones(1, 30, 1)
    rows[:, :10] = 0.0
    assert_close(
        spectral.norm(M, rows, ones(1, 1, 20)), spectral.norm(M * (rows > 0), ones(1, 30, 1), ones(1, 1, 20)), 1e-12
    )


def test_scales_of_the_columns_do_not_matter_and_those_of_the_rows_divide() -> None:
    M, rows, columns = normal(3, 12, 20), normal(3, 12, 1).square(), normal(3, 1, 20, seed=1).square()
    columns[1] = 0.0  # before the first step: all alike
    found = spectral.norm(M, rows, columns)
    assert_close(spectral.norm(1e-6 * M, 1e-12 * rows, 1e9 * columns), found, 1e-10)
    assert_close(spectral.norm(M, 4.0 * rows, columns), found / 2.0, 1e-12)
    for i in range(3):
        expected = reference.sketched_norm(M[i], rows[i, :, 0], columns[i, 0])
        assert found[i].item() == pytest.approx(expected, rel=1e-10)


def turning(clipping: float | None, second_moment: str) -> list[float]:
    """Largest singular values of updates, in units of a random matrix's.

    The factors follow two steady directions; a third one turns round from step to step, which no average holds.
    """
    p, q = 48, 80
    steady = 3.0 * normal(p, 2).sign() @ normal(2, q).sign()
    direction = torch.outer(normal(p, seed=1).sign(), normal(q, seed=1).sign())
    param = nn.Parameter(torch.zeros(p, q, dtype=torch.float64))
    optimizer = LoRAPreAdamW(
        [param], lr=1.0, rank=2, weight_decay=0.0, spectral_clipping=clipping, second_moment=second_moment
    )
    found = []
    for step in range(24):
        before = param.detach().clone()
        set_grads([param], [steady + (-1.06) ** step * direction + 0.1 * normal(p, q, seed=step)])
        optimizer.step()
        found.append(torch.linalg.matrix_norm(param.detach() - before, 2).item() / spectral.random_norm(p, q))
    return found[4:]


@pytest.mark.parametrize("second_moment", ["rank1", "full", "hadamard"])
def test_a_direction_that_turns_round_is_held_near_the_limit(second_moment: str) -> None:
    assert max(turning(None, second_moment)) > 1.5
    # The sketch knows v by its means of rows and columns alone, which is all of it where it is of rank 1.
    assert max(turning(0.5, second_moment)) < (0.75 if second_moment == "rank1" else 1.1)


def test_an_update_within_the_limit_is_left_alone() -> None:
    def trained(clipping: float | None) -> Tensor:
        param = nn.Parameter(torch.zeros(24, 40, dtype=torch.float64))
        optimizer = LoRAPreAdamW([param], rank=4, spectral_clipping=clipping)
        for step in range(5):
            set_grads([param], [normal(24, 40, seed=step)])
            optimizer.step()
        return param.detach()

    assert torch.equal(trained(3.0), trained(None))


def test_a_column_that_seldom_has_a_gradient_does_not_stop_the_matrix() -> None:
    param = nn.Parameter(torch.zeros(32, 32, dtype=torch.float64))
    optimizer = LoRAPreAdamW([param], lr=1.0, rank=2, weight_decay=0.0)
    moved = torch.zeros(())
    for step in range(200):
        grad = normal(32, 32, seed=step)
        if step < 199:
            grad[:, 5] = 0.0
        before = param.detach().clone()
        set_grads([param], [grad])
        optimizer.step()
        moved = (param.detach() - before).square().mean().sqrt()
    assert moved > 0.2
