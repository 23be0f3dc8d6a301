"""The bases of the Triton step, by products of chunks and r x r matrices, against those of `lorapre.subspace`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from _formulas import random_matrix
from _support import assert_close
from _triton import exact_products, needs_triton, scalars_as_bounds, small_blocks  # noqa: F401
from lorapre import subspace
from lorapre.backends import triton as backend

if backend.unavailable("cpu") is None or torch.cuda.is_available():
    from lorapre.backends.triton import elements, layout, subspace_step, table

pytestmark = needs_triton
EPS = torch.finfo(torch.float32).eps


def conditioned(p: int, r: int, condition: float, seed: int = 0) -> Tensor:
    left, right = (torch.linalg.qr(random_matrix(rows, r, seed=seed + rows)).Q for rows in (p, r))
    return (left * torch.logspace(0, -1, r, base=condition, dtype=torch.float64)) @ right.T


def orthonormalize(X: Tensor, *, right: bool = False) -> tuple[Tensor, Tensor]:
    """Q (n, p, r) and the triangles (n, r, r) of X = Q R, by the kernels; ``right`` lays X out as L is, transposed."""
    n, p, r = X.shape
    step = subspace_step.SubspaceStep.__new__(subspace_step.SubspaceStep)
    step.r, step.n, step.device, step.layouts = r, n, X.device, layout.Layouts()
    step.X_in_state = step.L_in_state = False
    table_of = torch.zeros((n, layout.COLUMNS), dtype=torch.int64)
    table_of[:, layout.P] = table_of[:, layout.Q] = p
    column = p if right else layout.lines(p)
    table_of[:, layout.LEFT] = torch.arange(n) * r * column
    table_of[:, layout.RIGHT] = torch.arange(n) * layout.lines(r * p)
    step.matrices = layout.Matrices(table_of.to(X.device), (p,) * n, (p,) * n, ((0, 0),) * n, 0, 0, 0, p % 8 == 0, True)
    each = layout.lines(r * p) if right else r * column
    scratch = torch.zeros((n, each), device=X.device)
    scratch[:, : r * column].view(n, r, column)[:, :, :p] = X.mT
    step.U = step.X = step.L = scratch.flatten()
    step.decay, step.gain, step.S_dtype = 0.9, 0.1, X.dtype
    step.sizes = X.abs().amax(dim=(1, 2)) * (3 if right else 1)
    step.T, step.triangles, step.lower = (step._squares(n) for _ in range(3))
    step.coefficients = torch.ones((n, elements.COLUMNS), device=X.device)
    side = subspace_step._Side(step, right=right)
    side.forms_K = False  # it is there
    products = side.first_products()
    for number in range(3):
        side.decompose(products, number)
        products = side.multiply(products, number, gram=number < 2)
    found = step.U.view(n, each)[:, : r * column].view(n, r, column)
    assert not found[:, :, p:].any()
    Q = found[:, :, :p].mT
    return Q, step.triangles


def error_of(Q: Tensor) -> float:
    wide = Q.double().cpu()
    return float((wide.mT @ wide - torch.eye(Q.shape[-1])).abs().max())


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize(("p", "r"), [(90, 40), (64, 64), (50, 3), (17, 1), (33, 16), (150, 100)])
def test_a_basis_is_orthonormal_to_rounding_and_spans_its_columns(
    p: int, r: int, condition: float, device: torch.device
) -> None:
    X = torch.stack([conditioned(p, r, condition, seed=seed) for seed in (0, 100)]).float().to(device)
    for right in (False, True):
        Q, triangle = orthonormalize(X, right=right)
        assert error_of(Q) < 64 * EPS
        assert not triangle.tril(-1).any()
        wide, Q, triangle = X.double().cpu(), Q.double().cpu(), triangle.double().cpu()
        assert ((wide - Q @ (Q.mT @ wide)).norm() / wide.norm()).item() < 64 * EPS
        assert ((wide - Q @ triangle).norm() / wide.norm()).item() < 64 * EPS


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_it_is_the_basis_that_torch_finds(scale: float, device: torch.device) -> None:
    X = (random_matrix(3, 40, 20) * torch.logspace(0, -12, 20, dtype=torch.float64) * scale).float().to(device)
    # the one with an upper triangular factor of positive diagonal: no other basis has it
    assert_close(orthonormalize(X)[0], subspace.orthonormalize(X), 1e-5)


def singular() -> dict[str, Tensor]:
    full = random_matrix(1, 50, 16)
    equal, zero, few_rows = full.clone(), full.clone(), full.clone()
    equal[:, :, 5] = equal[:, :, 4]
    zero[:, :, 3] = 0.0
    few_rows[:, 3:] = 0.0
    rank_3 = random_matrix(1, 50, 3) @ random_matrix(1, 3, 16, seed=1)
    return {
        "two columns equal": equal,
        "a column of zeros": zero,
        "rank 3": rank_3,
        "nearly rank 3": rank_3 + 1e-9 * full,
        "all ones": torch.ones_like(full),
        "three rows": few_rows,
        "zeros": torch.zeros_like(full),
    }


@pytest.mark.parametrize("name", singular())
def test_of_a_singular_matrix_no_direction_is_enlarged_and_what_it_spans_is_kept(
    name: str, device: torch.device
) -> None:
    X = singular()[name].float().to(device)
    Q, triangle = (found.double().cpu() for found in orthonormalize(X))
    X = X.double().cpu()
    assert (X - Q @ triangle).norm() <= 64 * EPS * X.norm()
    assert torch.linalg.eigvalsh(Q.mT @ Q).max() < 1 + 2e-3
    assert (X - Q @ (Q.mT @ X)).norm() <= 2e-3 * X.norm()
    if name == "a column of zeros":
        assert not Q[:, :, 3].any()


def test_products_apart_from_the_factors_are_the_same(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    X = torch.stack([conditioned(90, 20, 1e4, seed=seed) for seed in (0, 100)]).float().to(device)
    expected = orthonormalize(X)
    monkeypatch.setattr(table, "FUSED_RANK", 19)
    found = orthonormalize(X)
    assert error_of(found[0]) < 64 * EPS
    for mine, other in zip(found, expected, strict=True):
        assert_close(mine, other, 1e-3)  # of condition 1e4 itself


@pytest.mark.usefixtures("small_blocks")
def test_chunks_and_blocks_change_nothing(device: torch.device) -> None:
    X = torch.stack([conditioned(150, 20, 1e3, seed=seed) for seed in (0, 100)]).float().to(device)
    Q, triangle = orthonormalize(X)
    assert error_of(Q) < 64 * EPS
    assert_close(Q @ triangle, X, 64 * EPS)
