"""The bases of the Triton step, whose r x r algebra is one kernel, against those of `lorapre.subspace`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from _formulas import random_matrix
from _support import assert_close
from _triton import needs_triton, scalars_as_bounds  # noqa: F401
from lorapre import subspace
from lorapre.backends import triton as backend

if backend.unavailable("cpu") is None or torch.cuda.is_available():
    from lorapre.backends.triton import bases, table

pytestmark = needs_triton
EPS = torch.finfo(torch.float32).eps


def conditioned(p: int, r: int, condition: float, seed: int = 0) -> Tensor:
    left, right = (torch.linalg.qr(random_matrix(rows, r, seed=seed + rows)).Q for rows in (p, r))
    return (left * torch.logspace(0, -1, r, base=condition, dtype=torch.float64)) @ right.T


def error_of(Q: Tensor) -> float:
    wide = Q.double().cpu()
    return float((wide.mT @ wide - torch.eye(Q.shape[-1])).abs().max())


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize(("p", "r"), [(90, 40), (64, 64), (50, 3), (17, 1), (33, 16)])
def test_a_basis_is_orthonormal_to_rounding_and_spans_its_columns(
    p: int, r: int, condition: float, device: torch.device
) -> None:
    X = torch.stack([conditioned(p, r, condition, seed=seed) for seed in (0, 100)]).float().to(device)
    Q = bases.orthonormalize(X)
    assert error_of(Q) < 64 * EPS
    X, Q = X.double().cpu(), Q.double().cpu()
    assert ((X - Q @ (Q.mT @ X)).norm() / X.norm()).item() < 64 * EPS


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_it_is_the_basis_that_torch_finds(scale: float, device: torch.device) -> None:
    X = (random_matrix(3, 40, 20) * torch.logspace(0, -12, 20, dtype=torch.float64) * scale).float().to(device)
    # the one with an upper triangular factor of positive diagonal: no other basis has it
    assert_close(bases.orthonormalize(X), subspace.orthonormalize(X), 1e-5)


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
    Q = bases.orthonormalize(X).double().cpu()
    X = X.double().cpu()
    assert torch.linalg.eigvalsh(Q.mT @ Q).max() < 1 + 2e-3
    assert (X - Q @ (Q.mT @ X)).norm() <= 2e-3 * X.norm()
    if name == "a column of zeros":
        assert not Q[:, :, 3].any()


def test_a_rank_beyond_a_programs_registers_is_left_to_torch(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    X = random_matrix(2, 40, 20).float().to(device)
    monkeypatch.setattr(table, "REGISTER_RANK", 19)
    assert torch.equal(bases.orthonormalize(X), subspace.orthonormalize(X))
