"""The oracle itself: its formulas against values worked by hand, and against what they are derived from."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from _support import assert_close, relative_difference
from lorapre import factors, reference


def f64(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# 1 x 1, by hand. beta1 = 0.81 gives gamma1 = 1 - 0.9 = 0.1; beta2 = 0.0625 = 0.5^4 gives gamma2 = 0.5.
# m_B = 2, m_A = 4, v_B = 1, v_A = 3, G = -5, damping absolute 1, t goes from 1 to 2:
#   m   = 0.81 * 8 + 0.19 * -5                    = 5.53
#   v   = 0.0625 * 3^2 + 0.9375 * 25              = 24
#   m_B = 0.9 * 2 + 0.1 * (-5 * 4) / (16 + 1)     = 1.8 - 2 / 17
#   m_A = 0.9 * 4 + 0.1 * (2 * -5) / (4 + 1)      = 3.4
#   v_B = 0.5 * 1 + 0.5 * (5 * 3) / (9 + 1)       = 1.25
#   v_A = 0.5 * 3 + 0.5 * (1 * 5) / (1 + 1)       = 2.75
#   mhat = 5.53 / (1 - 0.81^2) = 5.53 / 0.3439;  vhat = 24 / (1 - 0.0625^2) = 24 / 0.99609375
#   exact: the share in v is 0.0625 * (1 - 0.0625^0.5)^2 + 0.9375 = 0.0625 * 0.5625 + 0.9375 = 0.97265625
@pytest.mark.parametrize(("correction", "share"), [("paper", 0.99609375), ("exact", 0.97265625)])
def test_one_step_of_algorithm_1_on_numbers_is_what_the_formulas_give_by_hand(
    correction: Literal["paper", "exact"], share: float
) -> None:
    state = reference.AdamState(m_B=f64([2.0]), m_A=f64([4.0]), v_B=f64([1.0]), v_A=f64([3.0]), step=1)
    W = reference.lorapre_adam_step(
        f64([10.0]),
        f64([-5.0]),
        state,
        lr=0.1,
        beta1=0.81,
        beta2=0.0625,
        eps=0.5,
        weight_decay=0.2,
        scale=0.25,
        damping=1.0,
        bias_correction=correction,
    )
    assert state.v_B is not None
    assert state.v_A is not None
    assert state.m_B.item() == pytest.approx(1.8 - 2 / 17, rel=1e-14)
    assert state.m_A.item() == pytest.approx(3.4, rel=1e-14)
    assert state.v_B.item() == pytest.approx(1.25, rel=1e-14)
    assert state.v_A.item() == pytest.approx(2.75, rel=1e-14)
    assert state.step == 2
    direction = (5.53 / 0.3439) / (math.sqrt(24 / share) + 0.5)
    assert W.item() == pytest.approx(10 - 0.1 * (0.25 * direction + 0.2 * 10), rel=1e-14)


def test_the_default_arguments_are_the_papers() -> None:
    state = reference.AdamState(m_B=f64([0.0]), m_A=f64([1.0]), v_B=f64([0.0]), v_A=f64([1.0]))
    W = reference.lorapre_adam_step(f64([0.0]), f64([2.0]), state, lr=1.0)
    # m = 0.1 * 2, v = 0.05 * 4; both corrections at t = 1 undo exactly that: the step is G / (|G| + eps).
    assert W.item() == pytest.approx(-2 / (2 + 1e-8), rel=1e-14)
    assert state.m_B.item() == pytest.approx((1 - math.sqrt(0.9)) * 2 / (1 + 1e-6), rel=1e-14)
    assert state.v_B is not None
    assert state.v_B.item() == pytest.approx((1 - 0.95**0.25) * 2 / (1 + 1e-6), rel=1e-14)


def test_two_by_two_targets_are_what_diagonal_factors_give_by_hand() -> None:
    # A = diag(1, 2): A A^T + I = diag(2, 5); G A^T = [[1, 4], [3, 8]]. B = diag(3, 1): B^T B + I = diag(10, 2).
    G = f64([1.0, 2.0], [3.0, 4.0])
    left = reference.left_target(f64([1.0, 0.0], [0.0, 2.0]), G, 1.0, "absolute")
    assert_close(left, f64([0.5, 0.8], [1.5, 1.6]), 1e-15)
    right = reference.right_target(f64([3.0, 0.0], [0.0, 1.0]), G, 1.0, "absolute")
    assert_close(right, f64([0.3, 0.6], [1.5, 2.0]), 1e-15)


def test_relative_damping_is_a_share_of_the_mean_diagonal_and_the_identity_for_zeros() -> None:
    gram = f64([3.0, 1.0], [1.0, 5.0])  # mean diagonal 4
    assert_close(reference.damped_gram(gram, 0.5, "relative"), f64([5.0, 1.0], [1.0, 7.0]), 0.0)
    assert_close(reference.damped_gram(gram, 0.5, "absolute"), f64([3.5, 1.0], [1.0, 5.5]), 0.0)
    assert_close(reference.damped_gram(torch.zeros(2, 2).double(), 0.5, "relative"), f64([1.0, 0.0], [0.0, 1.0]), 0.0)


@pytest.mark.parametrize(("p", "q", "r"), [(5, 7, 3), (7, 5, 1), (6, 6, 5)])
def test_without_damping_each_target_is_the_minimum_that_newtons_method_steps_to(p: int, q: int, r: int) -> None:
    B, A, G = normal(p, r, seed=1), normal(r, q, seed=2), normal(p, q, seed=3)

    def loss(B: Tensor, A: Tensor) -> Tensor:
        return 0.5 * (B @ A - G).square().sum()

    for name, target, at in (
        ("B", reference.left_target(A, G, 1e-14, "absolute"), lambda X: loss(X, A)),
        ("A", reference.right_target(B, G, 1e-14, "absolute"), lambda X: loss(B, X)),
    ):
        X = target.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(at(X), X)
        assert gradient.norm() < 1e-10 * G.norm(), f"the gradient in {name} is not zero at its target"
        # and Newton's own step, from the old factor with autograd's gradient and Hessian, ends there
        old = (B if name == "B" else A).clone().requires_grad_()
        (first,) = torch.autograd.grad(at(old), old)
        hessian = torch.autograd.functional.hessian(at, old.detach()).reshape(old.numel(), old.numel())
        newton = old - torch.linalg.solve(hessian, first.flatten()).reshape(old.shape)
        assert_close(target, newton, 1e-9, name)


def test_both_right_hand_sides_read_the_old_factors() -> None:
    B, A, G = normal(5, 2, seed=1), normal(2, 6, seed=2), normal(5, 6, seed=3)
    options = {"keep": 0.7, "gain": 0.3, "damping": 1e-3, "damping_mode": "relative"}
    new_B, new_A = reference.advance_factors(B, A, G, **options)  # type: ignore[arg-type]
    sequential = 0.7 * A + 0.3 * reference.right_target(new_B, G, 1e-3, "relative")
    assert_close(new_B, 0.7 * B + 0.3 * reference.left_target(A, G, 1e-3, "relative"), 1e-15)
    assert_close(new_A, 0.7 * A + 0.3 * reference.right_target(B, G, 1e-3, "relative"), 1e-15)
    assert relative_difference(new_A, sequential) > 1e-2


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.95, 0.999])
def test_the_rates_share_one_decay_between_the_factors(beta: float) -> None:
    # Two factors shrink by 1 - gamma each when the gradient is zero: m by beta1, v (its square) by beta2.
    assert (1 - reference.first_moment_rate(beta)) ** 2 == pytest.approx(beta, rel=1e-13, abs=1e-15)
    assert (1 - reference.second_moment_rate(beta)) ** 4 == pytest.approx(beta, rel=1e-13, abs=1e-15)


@pytest.mark.parametrize("beta", [0.9, 0.95, 0.999])
@pytest.mark.parametrize("mode", ["paper", "exact"])
def test_both_modules_agree_on_the_corrections(beta: float, mode: Literal["paper", "exact"]) -> None:
    for step in (1, 2, 10, 1000):
        expected = reference.second_moment_correction(beta, step, mode)
        assert factors.second_moment_correction(beta, step, mode) == pytest.approx(expected, rel=1e-14)
        on_device = factors.second_moment_correction(beta, torch.tensor(float(step), dtype=torch.float64), mode)
        assert float(on_device) == pytest.approx(expected, rel=1e-12)
        expected = reference.first_moment_correction(beta, step)
        assert factors.first_moment_correction(beta, step) == pytest.approx(expected, rel=1e-14)


# The claim behind "exact": with a constant gradient, the product of two factors that both approach it at rate
# gamma is a share of it that follows the EMA. Rank one and G = u v^T with positive entries is exact; the
# factors start at balanced multiples of u and v whose product is a share `start` of G.
@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_the_exact_divisor_is_the_share_of_a_constant_gradient_that_has_arrived(beta2: float) -> None:
    half_life = beta2**0.5  # of the product v_B v_A, per step
    u, v = normal(6, 1, seed=1).abs() + 0.1, normal(1, 8, seed=2).abs() + 0.1
    G = u @ v
    tracked = torch.zeros_like(G)
    for step in range(1, 60):
        second = beta2 * tracked**2 + (1 - beta2) * G**2  # equation (5)
        share = reference.second_moment_correction(beta2, step, "exact")
        assert_close(second / share, G**2, 1e-12, f"step {step}")
        if step == 10:
            too_small = (second / reference.second_moment_correction(beta2, step, "paper") / G**2).mean().item()
            # algorithm.md, section 5.3: 4 times for 0.95 (10 for 0.999) at t = 10
            assert 1 / too_small == pytest.approx(4 if beta2 == 0.95 else 10, rel=0.2)
        tracked = half_life * tracked + (1 - half_life) * G


@pytest.mark.parametrize("beta2", [0.95, 0.99])
def test_algorithm_1_itself_reaches_that_share_with_the_exact_divisor_only(beta2: float) -> None:
    # From its own start (left factor zero, right factor small), the product is not on that path at first: the
    # right factor must grow. After as many steps as it remembers, the exact divisor is right and the paper's is not.
    u, v = normal(6, 1, seed=1).abs() + 0.1, normal(1, 8, seed=2).abs() + 0.1
    G = u @ v
    B, A = torch.zeros(6, 1).double(), v.clone()  # the right factor points the right way already
    gamma = reference.second_moment_rate(beta2)
    for step in range(1, 6):
        second = reference.second_moment(B, A, G, beta2)
        share = reference.second_moment_correction(beta2, step, "exact")
        assert_close(second / share, G**2, 2 * gamma, f"step {step}")
        assert_close(reference.second_moment_correction(beta2, 1, "exact") * G**2, (1 - beta2) * G**2, 1e-12)
        B, A = reference.advance_factors(B, A, G, keep=1 - gamma, gain=gamma, damping=1e-12, damping_mode="relative")
    for _ in range(int(20 / gamma)):
        B, A = reference.advance_factors(B, A, G, keep=1 - gamma, gain=gamma, damping=1e-12, damping_mode="relative")
    assert_close(B @ A, G, 1e-6, "the limit")


def test_the_first_moment_of_a_constant_rank_one_gradient_is_an_ema() -> None:
    G = normal(6, 1, seed=1) @ normal(1, 8, seed=2)
    ema = torch.zeros_like(G)
    for step in range(1, 30):
        m = reference.first_moment(ema, torch.eye(8).double(), G, 0.9)
        assert_close(m / reference.first_moment_correction(0.9, step), G, 1e-12)
        ema = m


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize(("p", "q"), [(6, 10), (10, 6), (8, 8)])
def test_the_first_step_of_algorithm_2_is_torchs_muon(
    p: int, q: int, adjust: Literal["original", "match_rms_adamw"]
) -> None:
    # From m_B = 0 the momentum of step 1 is G itself, like torch.optim.Muon's with momentum 0.
    W, G = normal(p, q, seed=1), normal(p, q, seed=2)
    W_new, m_B, m_A = reference.lorapre_muon_step(
        W, G, torch.zeros(p, 2).double(), normal(2, q, seed=3), lr=0.1, weight_decay=0.2, shape_scale=adjust
    )
    weight = torch.nn.Parameter(W.clone().float())
    weight.grad = G.float()
    torch.optim.Muon([weight], lr=0.1, weight_decay=0.2, momentum=0.0, nesterov=False, adjust_lr_fn=adjust).step()
    step = W * (1 - 0.1 * 0.2)
    # torch orthogonalises in bfloat16: two digits of the update, before the decayed weight is added.
    assert_close(weight - step, W_new - step, 3e-2, "update")
    left = reference.left_target(normal(2, q, seed=3), G, 1e-6, "absolute")
    assert_close(m_B, (1 - math.sqrt(0.95)) / 0.05 * left, 1e-12, "m_B")
    assert_close(m_A, math.sqrt(0.95) * normal(2, q, seed=3), 1e-12, "m_A")  # its own target is zero


def test_newton_schulz_brings_every_singular_value_near_one_and_keeps_the_singular_vectors() -> None:
    for p, q in ((5, 9), (9, 5)):
        M = normal(p, q, seed=4)
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        core = U.T @ reference.newton_schulz(M) @ Vh.T
        assert_close(core, torch.diag(core.diagonal()), 1e-12)
        # the same polynomial on the singular values alone
        a, b, c = reference.NEWTON_SCHULZ_COEFFICIENTS
        s = S / S.norm()
        for _ in range(5):
            s = a * s + b * s**3 + c * s**5
        assert_close(core.diagonal(), s, 1e-12)
        assert (core.diagonal() > 0.5).all()
        assert (core.diagonal() < 1.3).all()


@pytest.mark.parametrize("mode", ["absolute", "relative"])
@pytest.mark.parametrize(("decay", "gain"), [(0.49, 0.51), (0.9, 1.0), (0.0, 1.0)])
def test_the_batched_newton_step_is_the_references(
    mode: Literal["absolute", "relative"], decay: float, gain: float
) -> None:
    B, A, G = normal(3, 6, 2, seed=1), normal(3, 2, 9, seed=2), normal(3, 6, 9, seed=3)
    regressor = factors.Regressor("newton", 1e-3, mode)
    left = regressor.project(A, G)
    new_B, new_A = regressor.advance(B, A, G, left, decay=decay, gain=gain)
    root = math.sqrt(decay)
    for i in range(3):
        assert_close(left[i], reference.left_target(A[i], G[i], 1e-3, mode), 1e-13)
        expected = reference.advance_factors(
            B[i],
            A[i],
            G[i],
            keep=root,
            gain=gain * (1 - root) / (1 - decay),  # equation (9); for an average, 1 - sqrt(beta)
            damping=1e-3,
            damping_mode=mode,
        )
        assert_close(new_B[i], expected[0], 1e-13)
        assert_close(new_A[i], expected[1], 1e-13)


@pytest.mark.parametrize("regression", ["newton", "subspace", "tangent"])
def test_factors_that_are_not_to_advance_stay_as_they_are(regression: factors.Regression) -> None:
    B, A, G = normal(3, 6, 2, seed=1), normal(3, 2, 9, seed=2), normal(3, 6, 9, seed=3)
    A = torch.linalg.qr(A.mT).Q.mT.contiguous()
    regressor = factors.Regressor(regression, 1e-3, "relative")
    left = regressor.project(A, G)
    for on in (True, False):
        new_B, new_A = regressor.advance(B, A, G, left, decay=0.9, gain=0.1, on=torch.tensor(on))
        assert torch.equal(new_B, B) == torch.equal(new_A, A) == (not on)


def test_the_batched_moments_are_the_references() -> None:
    B, A, G = normal(3, 6, 2, seed=1), normal(3, 2, 9, seed=2), normal(3, 6, 9, seed=3)
    left = factors.Regressor("newton", 1e-3, "absolute").project(A, G)
    m = factors.read_momentum(B, A, G, left, keep=0.9, inside=0.1, outside=0.1)
    v = factors.second_moment(B, A, G, 0.95)
    # equation (12): the gradient inside and outside of the row space with weights of their own
    split = factors.read_momentum(B, A, G, left, keep=0.9, inside=0.1, outside=0.7)
    per_matrix = factors.read_momentum(
        B, A, G, left, keep=0.9, inside=0.1, outside=torch.tensor([0.7, 0.2, 0.0], dtype=torch.float64)[:, None, None]
    )
    for i, outside in enumerate((0.7, 0.2, 0.0)):
        assert_close(m[i], reference.first_moment(B[i], A[i], G[i], 0.9), 1e-14)
        assert_close(v[i], reference.second_moment(B[i], A[i], G[i], 0.95), 1e-14)
        P = left[i] @ A[i]
        assert_close(split[i], 0.9 * B[i] @ A[i] + 0.1 * P + 0.7 * (G[i] - P), 1e-13)
        assert_close(per_matrix[i], 0.9 * B[i] @ A[i] + 0.1 * P + outside * (G[i] - P), 1e-13)


def test_the_batched_rank_1_second_moment_is_the_references() -> None:
    G, row, col = normal(3, 6, 9, seed=1), normal(3, 6, 1, seed=2).square(), normal(3, 1, 9, seed=3).square()
    row[2] = col[2] = 0.0  # a matrix that has seen nothing
    v, new_row, new_col = factors.rank1_second_moment(row, col, G, 0.95, 0.05)
    for i in range(3):
        expected = reference.rank1_second_moment(row[i, :, 0], col[i, 0], G[i], 0.95)
        assert_close(v[i], expected, 1e-14)
        assert_close(new_row[i, :, 0], 0.95 * row[i, :, 0] + 0.05 * (G[i] ** 2).mean(1), 1e-14)
        assert_close(new_col[i, 0], 0.95 * col[i, 0] + 0.05 * (G[i] ** 2).mean(0), 1e-14)
    assert (v >= 0.05 * G.square()).all()


# 2 x 2, by hand: v_r = (1, 3), v_c = (4, 8), mean(v_r) = 2: the outer product over it is ((2, 4), (6, 12)).
def test_a_rank_1_second_moment_on_numbers_is_what_equation_13_gives_by_hand() -> None:
    v = reference.rank1_second_moment(torch.tensor([1.0, 3.0]), torch.tensor([4.0, 8.0]), torch.ones(2, 2), 0.5)
    assert torch.equal(v, torch.tensor([[1.5, 2.5], [3.5, 6.5]]))


@pytest.mark.parametrize("gain", [0.0, 0.1, 0.3, 1.0, 2.5])
def test_the_residuals_weight_is_that_of_the_newest_entry_of_an_average(gain: float) -> None:
    weights = []
    for step in range(1, 8):
        expected = gain / sum(gain * (1 - gain) ** age for age in range(step)) if 0 < gain < 1 else gain
        weights.append(expected)
        assert reference.residual_weight(gain, step) == pytest.approx(expected, rel=1e-12)
        assert factors.residual_weight(gain, step) == pytest.approx(expected, rel=1e-12)
        steps = torch.tensor([float(step)], dtype=torch.float64)
        assert float(factors.residual_weight(gain, steps)) == pytest.approx(expected, rel=1e-12)
    if 0 < gain < 1:
        assert weights[0] == pytest.approx(1.0)
        # with the paper's gain, 1 - beta1, equations (4) and (6)
        assert weights[6] == pytest.approx(gain / reference.first_moment_correction(1 - gain, 7))


def test_vanishing_factors_are_rescaled_without_changing_their_product() -> None:
    B, A, G = 1e-12 * normal(1, 6, 2, seed=1), 1e-12 * normal(1, 2, 9, seed=2), torch.zeros(1, 6, 9).double()
    regressor = factors.Regressor("newton", 1e-4, "relative")
    left = regressor.project(A, G)
    new_B, new_A = regressor.advance(B, A, G, left, decay=0.81, gain=0.19)
    assert_close(new_B @ new_A, 0.81 * (B @ A), 1e-13)
    assert new_A.square().sum(-1).mean().item() == pytest.approx(0.81, rel=1e-12)  # the size moved over
    left_out = regressor.advance(B, A, G, left, decay=0.81, gain=0.19, on=torch.tensor(False))
    assert torch.equal(left_out[0], B)
    assert torch.equal(left_out[1], A)
