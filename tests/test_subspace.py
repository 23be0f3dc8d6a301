"""The robust regression: orthonormal bases, one sweep or one tangent step, and how well they follow a momentum."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import pytest
import torch
from torch import Tensor

from _formulas import random_matrix, tangent_momentum
from _support import assert_close, gradients, relative_difference
from lorapre import reference
from lorapre.subspace import basis, orthonormalize, sweep, tangent_step

Step: TypeAlias = Callable[..., tuple[Tensor, Tensor]]
FLOAT32 = torch.finfo(torch.float32).eps
BOTH = pytest.mark.parametrize("step", [sweep, tangent_step], ids=lambda step: step.__name__)


def conditioned(p: int, r: int, condition: float, seed: int = 0) -> Tensor:
    """(1, p, r) in float64 whose singular values fall from 1 to 1 / condition in equal ratios."""
    U, V = torch.linalg.qr(random_matrix(p, r, seed=seed)).Q, torch.linalg.qr(random_matrix(r, r, seed=seed + 1)).Q
    return (U * torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), r, dtype=torch.float64) @ V.T)[None]


def error_of(Q: Tensor) -> float:
    """Largest element of Q^T Q - I."""
    Q = Q.double()
    return (Q.mT @ Q - torch.eye(Q.shape[-1])).abs().max().item()


def largest_eigenvalue(Q: Tensor) -> float:
    Q = Q.double()
    return torch.linalg.eigvalsh(Q.mT @ Q).max().item()


def orthonormal_rows(r: int, q: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(random_matrix(q, r, seed=seed)).Q.T[None].contiguous()


def take(step: Step, B: Tensor, A: Tensor, G: Tensor, decay: float = 0.9, gain: float = 0.1) -> tuple[Tensor, Tensor]:
    return step(B, A, G, G @ A.mT, decay=decay, gain=gain)


# Orthonormal bases.


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize(("p", "r"), [(300, 40), (64, 64), (500, 3), (17, 1)])
@pytest.mark.parametrize(
    ("gram_dtype", "passes", "tolerance"),
    [(torch.float64, 2, 8 * FLOAT32), (torch.float32, 3, 64 * FLOAT32)],
    ids=["float64 Gram", "float32 Gram"],
)
def test_a_basis_is_orthonormal_to_float32s_rounding_up_to_a_condition_of_a_million(
    gram_dtype: torch.dtype, passes: int, tolerance: float, p: int, r: int, condition: float
) -> None:
    X = conditioned(p, r, condition).float()
    Q = orthonormalize(X, passes=passes, gram_dtype=gram_dtype)
    assert Q.dtype == torch.float32
    assert error_of(Q) < tolerance
    left_out = X.double() - Q.double() @ (Q.double().mT @ X.double())
    assert left_out.norm() < tolerance * X.norm(), "and spans what the columns span"


def test_one_pass_or_a_float32_gram_with_two_would_not_be_enough() -> None:
    X = conditioned(300, 40, 1e6).float()
    assert error_of(orthonormalize(X, passes=1)) > 1e-5
    assert error_of(orthonormalize(X, passes=2, gram_dtype=torch.float32)) > 1e-4


@pytest.mark.parametrize("condition", [1.0, 1e4, 1e6])
def test_in_float64_a_basis_is_orthonormal_to_float64s_rounding(condition: float) -> None:
    assert error_of(orthonormalize(conditioned(300, 40, condition))) < 1e-13


def test_columns_of_very_different_lengths_are_as_good_as_equal_ones() -> None:
    X = random_matrix(1, 60, 12) * torch.logspace(0, -18, 12, dtype=torch.float64)
    assert error_of(orthonormalize(X.float())) < 8 * FLOAT32


def singular_matrices() -> dict[str, Tensor]:
    full = random_matrix(1, 50, 16)
    equal, zero, tiny, few_rows = full.clone(), full.clone(), full.clone(), full.clone()
    equal[:, :, 5] = equal[:, :, 4]
    zero[:, :, 3] = 0.0
    tiny[:, :, 2] = 1e-35 * full[:, :, 2]
    few_rows[:, 3:] = 0.0
    rank_1, rank_3 = (random_matrix(1, 50, k) @ random_matrix(1, k, 16, seed=1) for k in (1, 3))
    return {
        "two columns equal": equal,
        "a column of zeros": zero,
        "a column near underflow": tiny,
        "rank 1": rank_1,
        "rank 3": rank_3,
        "nearly rank 3": rank_3 + 1e-9 * full,
        "signs of rank 1": rank_1.sign(),
        "all ones": torch.ones_like(full),
        "one row": few_rows * torch.eye(50).double()[None, :, :1],
        "three rows": few_rows,
        "zeros": torch.zeros_like(full),
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.float64, 1e-7)], ids=str)
@pytest.mark.parametrize("name", singular_matrices())
def test_of_a_singular_matrix_no_direction_is_enlarged_and_what_it_spans_is_kept(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    X = singular_matrices()[name].to(dtype)
    Q = orthonormalize(X).double()
    assert largest_eigenvalue(Q) < 1 + tolerance
    left_out = X.double() - Q @ (Q.mT @ X.double())
    assert left_out.norm() <= tolerance * X.norm()


def test_zero_columns_stay_zero_and_do_not_disturb_the_others() -> None:
    X = random_matrix(1, 50, 8).float()
    X[:, :, 3] = 0.0
    Q = orthonormalize(X)
    kept = [0, 1, 2, 4, 5, 6, 7]
    assert not Q[:, :, 3].any()
    assert error_of(Q[:, :, kept]) < 8 * FLOAT32
    assert not orthonormalize(torch.zeros(2, 5, 3)).any()


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
@pytest.mark.parametrize("condition", [1.0, 1e4])
def test_the_size_of_a_matrix_does_not_matter(condition: float, scale: float) -> None:
    X = conditioned(40, 6, condition).float()
    Q = orthonormalize(X * scale)
    assert error_of(Q) < 8 * FLOAT32
    # the scaled input is rounded anew: as far apart as its condition makes of that
    assert_close(Q, orthonormalize(X), 4 * FLOAT32 * condition)
    exact = 2.0 ** round(torch.log2(torch.tensor(scale)).item())
    assert torch.equal(orthonormalize(X * exact), orthonormalize(X))


def test_each_matrix_of_a_batch_is_treated_alone() -> None:
    X = torch.cat([conditioned(30, 5, 1.0), torch.zeros(1, 30, 5), 1e-20 * conditioned(30, 5, 1e6, seed=7)]).float()
    together = orthonormalize(X)
    for i in range(3):
        assert_close(together[i], orthonormalize(X[i : i + 1])[0], 1e-6)


@pytest.mark.parametrize(("p", "r"), [(300, 40), (64, 64), (17, 1)])
@pytest.mark.parametrize("condition", [1.0, 1e3])
def test_reflections_give_the_basis_of_cholesky_qr_with_its_signs(p: int, r: int, condition: float) -> None:
    X = torch.cat([conditioned(p, r, condition, seed=seed) for seed in (0, 5)])
    assert_close(basis(X), orthonormalize(X), 1e-10 * condition)
    assert error_of(basis(X.float())) < 8 * FLOAT32


@pytest.mark.parametrize("name", singular_matrices())
def test_reflections_of_a_singular_matrix_are_orthonormal_and_keep_what_it_spans(name: str) -> None:
    X = singular_matrices()[name].float()
    Q = basis(X)
    assert error_of(Q) < 8 * FLOAT32
    left_out = X.double() - Q.double() @ (Q.double().mT @ X.double())
    assert left_out.norm() <= 64 * FLOAT32 * X.norm()


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_the_size_of_a_matrix_does_not_matter_to_reflections(scale: float) -> None:
    X = conditioned(40, 6, 1e4).float()
    assert torch.equal(basis(X * scale), basis(X))


# One step.

SHAPES = [(12, 20, 4), (20, 12, 4), (16, 16, 15), (9, 30, 1), (30, 9, 8)]


@pytest.mark.parametrize(("p", "q", "r"), SHAPES)
@pytest.mark.parametrize(("decay", "gain"), [(0.9, 0.1), (0.95, 1.0), (0.0, 1.0)])
@BOTH
def test_a_step_is_the_formula_from_any_factors(step: Step, decay: float, gain: float, p: int, q: int, r: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        B, A, G = random_matrix(1, p, r, seed=1), orthonormal_rows(r, q), random_matrix(1, p, q, seed=2)
        new_B, new_A = take(step, B.to(dtype), A.to(dtype), G.to(dtype), decay, gain)
        if step is sweep:
            expected_B, expected_A = reference.subspace_sweep(B[0], A[0], G[0], keep=decay, gain=gain)
            expected = expected_B @ expected_A
            assert_close((new_A.mT @ new_A)[0], expected_A.T @ expected_A, tolerance, "row space")
        else:
            expected = tangent_momentum(B[0], A[0], G[0], decay=decay, gain=gain)
        assert_close((new_B @ new_A)[0], expected, tolerance, f"{dtype}")
        assert error_of(new_A.mT) < (8 * FLOAT32 if dtype == torch.float32 else 1e-13)


@BOTH
def test_several_steps_from_zero_are_the_formula(step: Step) -> None:
    B, A = torch.zeros(1, 12, 4).double(), orthonormal_rows(4, 20)
    expected = (B[0], A[0])
    for G in gradients((12, 20), 10):
        previous = (B[0], A[0])
        B, A = take(step, B, A, G[None])
        if step is sweep:
            expected = reference.subspace_sweep(*expected, G, keep=0.9, gain=0.1)
            assert_close((B @ A)[0], expected[0] @ expected[1], 1e-12)
        else:
            assert_close((B @ A)[0], tangent_momentum(*previous, G, decay=0.9, gain=0.1), 1e-12)


@BOTH
def test_a_stack_is_stepped_matrix_by_matrix(step: Step) -> None:
    B, G = random_matrix(3, 12, 4, seed=1), random_matrix(3, 12, 20, seed=2)
    A = torch.cat([orthonormal_rows(4, 20, seed=i) for i in range(3)])
    together = take(step, B, A, G)
    for i in range(3):
        alone = take(step, B[i : i + 1], A[i : i + 1], G[i : i + 1])
        assert_close((together[0] @ together[1])[i], (alone[0] @ alone[1])[0], 1e-12)


def streams() -> dict[str, Callable[[int], Tensor]]:
    """Gradients by step, 24 x 30."""

    def normal(number: int) -> Tensor:
        return random_matrix(24, 30, seed=number).float()

    def some_rows(number: int, count: int) -> Tensor:
        G = normal(number)
        G[count:] = 0.0
        return G

    return {
        "random": normal,
        "rank one": lambda number: normal(number)[:, :1] * normal(number)[:1],
        "signs of rank one": lambda number: (normal(number)[:, :1] * normal(number)[:1]).sign(),
        "all ones": lambda number: torch.ones(24, 30),
        "one unit awake": lambda number: some_rows(number, 1),
        "three units awake": lambda number: some_rows(number, 3),
        "one input awake": lambda number: normal(number) * torch.eye(30)[:1],
        "mostly zeros": lambda number: normal(number) * float(number % 3 == 0),
        "huge after tiny": lambda number: normal(number) * 10.0 ** (12 * (number % 2) - 6),
    }


@pytest.mark.parametrize("name", streams())
@pytest.mark.parametrize("r", [1, 5, 20])
@pytest.mark.parametrize(("decay", "gain"), [(0.9, 0.1), (0.95, 1.0)])
def test_the_momentum_never_exceeds_what_decays_and_what_is_added(decay: float, gain: float, r: int, name: str) -> None:
    B, A = torch.zeros(1, 24, r), orthonormal_rows(r, 30).float()
    for number in range(30):
        G = streams()[name](number)[None]
        before = (B @ A).norm().item()
        B, A = take(sweep, B, A, G, decay, gain)
        assert (B @ A).norm().item() <= (decay * before + gain * G.norm().item()) * 1.001
        assert error_of(A.mT) < 16 * FLOAT32


@BOTH
@pytest.mark.parametrize("name", ["all ones", "one unit awake", "three units awake", "one input awake"])
@pytest.mark.parametrize("r", [4, 20])
def test_of_gradients_with_a_rank_below_r_nothing_is_lost(r: int, name: str, step: Step) -> None:
    B, A = torch.zeros(1, 24, r), orthonormal_rows(r, 30).float()
    exact = torch.zeros(24, 30).double()
    for number in range(150):
        G = streams()[name](number)
        B, A = take(step, B, A, G[None])
        exact = 0.9 * exact + 0.1 * G
    assert_close((B @ A)[0], exact, 5e-3)


@pytest.mark.parametrize(("p", "q"), [(8, 12), (12, 8), (10, 10)])
@pytest.mark.parametrize(("decay", "gain"), [(0.9, 0.1), (0.95, 1.0)])
def test_at_the_rank_of_the_smaller_side_it_is_the_exact_average(p: int, q: int, decay: float, gain: float) -> None:
    r = min(p, q)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        B, A = torch.zeros(1, p, r, dtype=dtype), orthonormal_rows(r, q).to(dtype)
        exact = torch.zeros(p, q).double()
        for G in gradients((p, q), 50):
            B, A = take(sweep, B, A, G[None].to(dtype), decay, gain)
            exact = decay * exact + gain * G
        assert_close((B @ A)[0], exact, tolerance)


# Degenerate gradients.


@pytest.mark.parametrize("rank", [1, 3, 5])
@BOTH
def test_gradients_in_a_fixed_row_space_of_rank_up_to_r_are_followed_exactly(step: Step, rank: int) -> None:
    V = random_matrix(rank, 30, seed=9)
    A = orthonormal_rows(5, 30)
    if step is tangent_step:
        # It reads the gradient through the old bases alone: only from a row space that holds V is it exact.
        A = torch.linalg.qr(torch.cat([V, A[0]]).T).Q[:, :5].T[None]
    B, A = torch.zeros(1, 24, 5), A.float().contiguous()
    exact = torch.zeros(24, 30).double()
    for number in range(40):
        G = (random_matrix(24, rank, seed=number) @ V).float()
        B, A = take(step, B, A, G[None])
        exact = 0.9 * exact + 0.1 * G.double()
        assert error_of(A.mT) < 16 * FLOAT32
    assert_close((B @ A)[0], exact, 1e-5 if rank == 5 else 1e-3)


@BOTH
def test_zero_gradients_leave_the_basis_and_let_the_momentum_decay(step: Step) -> None:
    B, A = torch.zeros(1, 24, 5), orthonormal_rows(5, 30).float()
    zeros = torch.zeros(1, 24, 30)
    for _ in range(3):
        B, A = take(step, B, A, zeros)
    assert not B.any()
    assert error_of(A.mT) < 8 * FLOAT32
    for number in range(10):
        B, A = take(step, B, A, random_matrix(1, 24, 30, seed=number).float())
    held = B @ A
    for pause in range(1, 60):
        B, A = take(step, B, A, zeros)
        assert_close(B @ A, 0.9**pause * held, 1e-5)
        assert error_of(A.mT) < 8 * FLOAT32


@BOTH
def test_a_gradient_that_cancels_the_momentum_leaves_a_basis(step: Step) -> None:
    B, A = random_matrix(1, 24, 5, seed=1).float(), orthonormal_rows(5, 30).float()
    B, A = take(step, B, A, -9 * B @ A)
    assert (B @ A).norm() < 1e-5
    assert error_of(A.mT) < 16 * FLOAT32
    G = random_matrix(1, 24, 30, seed=3).float()
    B, A = take(step, B, A, G)
    assert 0 < (B @ A).norm() <= 0.1 * G.norm() * (1 + 1e-4)


@pytest.mark.parametrize(("step", "steps"), [(sweep, 10_000), (tangent_step, 1_000)], ids=["sweep", "tangent_step"])
def test_rows_stay_orthonormal_over_thousands_of_steps_on_drifting_gradients(step: Step, steps: int) -> None:
    p, q, r = 6, 8, 3
    B, A = torch.zeros(1, p, r), orthonormal_rows(r, q).float()
    U, V, generator = torch.randn(p, 2), torch.randn(2, q), torch.Generator().manual_seed(0)
    noise = torch.randn(steps, p, q, generator=generator)
    worst = 0.0
    for number in range(steps):
        # of rank 2 below r, with noise that comes and goes over fourteen orders of magnitude
        G = U @ V + 10.0 ** (-7 + 7 * torch.cos(torch.tensor(number / 500.0))) * noise[number]
        B, A = take(step, B, A, G[None])
        if number % 10 == 0:
            U, V = 0.99 * U + 0.14 * noise[number, :, :2], 0.99 * V + 0.14 * noise[number, :2]
            worst = max(worst, error_of(A.mT))
    assert worst < 16 * FLOAT32
    assert B.isfinite().all()


# How well the momentum is followed.


def tracked(step: Step, stream: Iterator[Tensor], shape: tuple[int, int], r: int, beta: float) -> tuple[float, float]:
    """Relative errors after the stream: of the factors, and of the best rank-r approximation of the exact average."""
    p, q = shape
    exact = torch.zeros(p, q)
    B, A = torch.zeros(1, p, r), orthonormal_rows(r, q, seed=1).float()
    for G in stream:
        B, A = take(step, B, A, G[None].float(), beta, 1 - beta)
        exact = beta * exact + (1 - beta) * G.float()
    S = torch.linalg.svdvals(exact.double())
    best = (S[r:].square().sum() / S.square().sum()).sqrt().item()
    return relative_difference((B @ A)[0], exact), best


def drifting(steps: int) -> Iterator[Tensor]:
    """The stream of algorithm.md, section 5.1: 256 x 384, a drifting signal of rank 40 below as much noise."""
    generator = torch.Generator().manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    k = 40
    U, V = normal(256, k), normal(k, 384)
    for _ in range(steps):
        yield 0.5 * U @ V / k**0.5 + normal(256, 384)
        U, V = 0.99 * U + 0.14 * normal(256, k), 0.99 * V + 0.14 * normal(k, 384)


@pytest.mark.parametrize(("r", "above_best"), [(16, 0.05), (64, 0.11)])
@BOTH
def test_the_factors_come_close_to_the_best_rank_r_approximation(step: Step, r: int, above_best: float) -> None:
    error, best = tracked(step, drifting(100), (256, 384), r, 0.9)
    assert best <= error <= best * (1 + above_best)


@pytest.mark.parametrize(("beta", "steps"), [(0.99, 300), (0.999, 1000), (0.9999, 1000)])
@BOTH
def test_a_long_memory_does_not_make_the_momentum_collapse(step: Step, beta: float, steps: int) -> None:
    # a signal of rank 4 that stays, and noise whose average shrinks as the memory grows
    signal = random_matrix(24, 4, seed=1) @ random_matrix(4, 32, seed=2)

    def stream() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(5)
        for _ in range(steps):
            yield signal + torch.randn(24, 32, generator=generator)

    error, best = tracked(step, stream(), (24, 32), 4, beta)
    assert error < max(1.25 * best, 1e-6)
