"""Our own rivals with low-rank state: each against its paper's formulas for one matrix, written plainly in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from _support import assert_close, gradients
from lorapre.lab.baselines.fira import Fira
from lorapre.lab.baselines.galore import GaLore
from lorapre.lab.baselines.galore_muon import GaLoreMuon, newton_schulz
from lorapre.lab.baselines.ldadam import LDAdam, turned_moments
from lorapre.lab.baselines.mlorc import MLorc, random_matrix, randomized_svd, without_negatives
from lorapre.lab.baselines.mofasgd import MoFaSGD

TALL, WIDE, SQUARE = (14, 6), (5, 12), (8, 8)
LR, DECAY, BETAS, EPS = 0.05, 0.1, (0.8, 0.9), 1e-6
Reference = Callable[[Tensor, list[Tensor], int], Iterator[Tensor]]


def normals(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights_after_each_step(optimizer: torch.optim.Optimizer, grads: list[Tensor]) -> Iterator[Tensor]:
    (param,) = optimizer.param_groups[0]["params"]
    for G in grads:
        param.grad = G.to(param.dtype)
        optimizer.step()
        yield param.detach().clone()


def adam(g: Tensor, m: Tensor, v: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
    (b1, b2) = BETAS
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    return m / (1 - b1**t) / ((v / (1 - b2**t)) ** 0.5 + EPS), m, v


def left_or_right(G: Tensor, r: int) -> tuple[Tensor | None, Tensor | None]:
    """GaLore's one-sided projections, as matrices to multiply from the left or from the right; the other is None."""
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return (None, Vh[:r].T) if G.shape[0] >= G.shape[1] else (U[:, :r], None)


def down(G: Tensor, P: Tensor | None, Q: Tensor | None) -> Tensor:
    return P.T @ G if P is not None else G @ Q


def up(R: Tensor, P: Tensor | None, Q: Tensor | None) -> Tensor:
    return P @ R if P is not None else R @ Q.T


GAP = 3


def galore_reference(W: Tensor, grads: list[Tensor], r: int) -> Iterator[Tensor]:
    m = v = torch.zeros(())
    for t, G in enumerate(grads, 1):
        if (t - 1) % GAP == 0:
            sides = left_or_right(G, r)
        step, m, v = adam(down(G, *sides), m, v, t)
        W = (1 - LR * DECAY) * W - LR * 0.25 * up(step, *sides)
        yield W


def fira_reference(W: Tensor, grads: list[Tensor], r: int) -> Iterator[Tensor]:
    m = v = torch.zeros(())
    last = None
    for t, G in enumerate(grads, 1):
        if (t - 1) % GAP == 0:
            sides = left_or_right(G, r)
        R = down(G, *sides)
        step, m, v = adam(R, m, v, t)
        correction = (1 - BETAS[1] ** t) ** 0.5 / (1 - BETAS[0] ** t)
        along = 1 if sides[0] is None else 0
        ratio = (step / correction).norm(dim=along, keepdim=True) / (R.norm(dim=along, keepdim=True) + 1e-8)
        S = ratio * (G - 0.25 * up(R, *sides))
        if last is not None and S.norm() / (last + 1e-8) > 1.01:
            S = S / (S.norm() / (last + 1e-8)) * 1.01
        last = S.norm()
        W = (1 - LR * DECAY) * W - LR * (0.25 * up(step, *sides) + correction * S)
        yield W


def galore_muon_reference(W: Tensor, grads: list[Tensor], r: int, plain: bool = False) -> Iterator[Tensor]:
    M = torch.zeros(())
    scale = max(1, W.shape[0] / W.shape[1]) ** 0.5 if plain else 0.2 * max(W.shape) ** 0.5
    for t, G in enumerate(grads, 1):
        if (t - 1) % GAP == 0:
            sides = left_or_right(G, r)
        R = down(G, *sides)
        M = 0.8 * M + 0.2 * R
        # The quintic acts on singular values alone, so that it can be written on the SVD's.
        U, s, Vh = torch.linalg.svd(M if plain else 0.8 * M + 0.2 * R, full_matrices=False)
        s = s / (s.norm() + 1e-7)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        W = (1 - LR * DECAY) * W - LR * scale * up(U @ torch.diag(s) @ Vh, *sides)
        yield W


def mlorc_reference(W: Tensor, grads: list[Tensor], r: int) -> Iterator[Tensor]:
    def compressed(A: Tensor, t: int, name: str) -> Tensor:
        # Without oversampling a randomized SVD is the projection to the range that it found.
        Y = A @ A.T @ A @ random_matrix(A.shape[1], r, seed=0, step=t, name=name, like=A)
        return Y @ torch.linalg.pinv(Y) @ A

    m = v = torch.zeros_like(W)
    for t, G in enumerate(grads, 1):
        if (v < 0).any():
            v = torch.where(v < 0, -v[v < 0].mean(), v)
        step, m, v = adam(G, m, v, t)
        m, v = compressed(m, t, "m"), compressed(v, t, "v")
        W = (1 - LR * DECAY) * W - LR * step
        yield W


def mofasgd_reference(W: Tensor, grads: list[Tensor], r: int) -> Iterator[Tensor]:
    U = V = M = None
    for G in grads:
        if M is not None:
            left, right = U @ U.T, V @ V.T
            M = 0.8 * M + left @ G + G @ right - left @ G @ right
        U, s, Vh = torch.linalg.svd(G if M is None else M)
        U, V = U[:, :r], Vh[:r].T
        M = U @ torch.diag(s[:r]) @ V.T
        W = (1 - LR * DECAY) * W - LR * U @ V.T
        yield W


def ldadam_reference(
    W: Tensor, grads: list[Tensor], r: int, rho: float = BETAS[0], feedback: bool = True
) -> Iterator[Tensor]:
    (b1, b2), tall = BETAS, W.shape[0] > W.shape[1]
    m = v = P = error = torch.zeros(())
    for t, G in enumerate(grads, 1):
        a = (G.T if tall else G) + error
        if t == 1:
            P = torch.linalg.svd(a)[0][:, :r]
            turned_m = turned_v = lost = 0.0
        else:
            old, mhat, vhat = P, m / (1 - b1 ** (t - 1)), v / (1 - b2 ** (t - 1))
            b = rho * old @ mhat + (1 - rho) * a
            P = torch.linalg.qr(b @ b.T @ old)[0]
            Q = P.T @ old
            turned_m = Q @ m
            turned_v = (1 - b2 ** (t - 1)) * abs((Q * Q) @ (vhat - mhat**2) + (Q @ mhat) ** 2)
            lost = old @ m - P @ turned_m
        R = P.T @ a
        error = (a - P @ R + b1 / (1 - b1) * lost) * feedback
        step, m, v = adam(R, turned_m, turned_v, t)
        W = (1 - LR * DECAY) * W - LR * (P @ step).T if tall else (1 - LR * DECAY) * W - LR * P @ step
        yield W


ADAM: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
MUON: dict[str, Any] = {"lr": LR, "beta": 0.8, "weight_decay": DECAY}
METHODS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], Reference]] = {
    "galore": (GaLore, {**ADAM, "update_gap": GAP}, galore_reference),
    "fira": (Fira, {**ADAM, "update_gap": GAP}, fira_reference),
    "galore-muon": (GaLoreMuon, {**MUON, "update_gap": GAP}, galore_muon_reference),
    "mlorc": (MLorc, ADAM, mlorc_reference),
    "mofasgd": (MoFaSGD, MUON, mofasgd_reference),
    "ldadam": (LDAdam, ADAM, ldadam_reference),
    "galore-muon, plain": (
        GaLoreMuon,
        {**MUON, "update_gap": GAP, "nesterov": False, "adjust_lr_fn": "original"},
        partial(galore_muon_reference, plain=True),
    ),
    "ldadam, no error": (
        LDAdam,
        {**ADAM, "rho": 0.3, "error_feedback": False},
        partial(ldadam_reference, rho=0.3, feedback=False),
    ),
}


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
@pytest.mark.parametrize("name", METHODS)
def test_every_step_is_the_papers(name: str, shape: tuple[int, int], rank: int) -> None:
    make, options, reference = METHODS[name]
    W, grads = normals(*shape), list(gradients(shape, 8))
    optimizer = make([nn.Parameter(W.clone())], rank=rank, **options)
    expected = reference(W, grads, rank)
    for t, actual in enumerate(weights_after_each_step(optimizer, grads), 1):
        assert_close(actual, next(expected), 1e-9, f"{name}, step {t}")


@pytest.mark.parametrize("name", METHODS)
def test_groups_carry_their_own_options(name: str) -> None:
    make, options, reference = METHODS[name]
    shape, grads = WIDE, list(gradients(WIDE, 4))
    first, second = nn.Parameter(normals(*shape)), nn.Parameter(normals(*shape))
    groups = [{"params": [("first", first)], "rank": 3}, {"params": [("second", second)], "rank": 1}]
    optimizer = make(groups, **options)
    for G in grads:
        first.grad, second.grad = G, G
        optimizer.step()
    for param, rank in ((first, 3), (second, 1)):
        *_, expected = reference(normals(*shape), grads, rank)
        assert_close(param, expected, 1e-9)


# What the papers claim, beyond their formulas.


@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
def test_mlorc_at_full_rank_is_adamw(shape: tuple[int, int]) -> None:
    W, grads = normals(*shape), list(gradients(shape, 12))
    ours = MLorc([nn.Parameter(W.clone())], rank=min(shape), **ADAM)
    adamw = torch.optim.AdamW([nn.Parameter(W.clone())], **ADAM)
    pairs = zip(weights_after_each_step(ours, grads), weights_after_each_step(adamw, grads), strict=True)
    for actual, expected in pairs:
        assert_close(actual, expected, 1e-8)


def test_mlorc_follows_momentum_exactly_where_the_gradients_have_its_rank() -> None:
    """Without the second moment's part: m of gradients U X_t has the rank of U, and nothing is lost."""
    U = normals(14, 2)
    grads = [U @ normals(2, 6, seed=t) for t in range(10)]
    optimizer = MLorc([nn.Parameter(normals(14, 6))], rank=2, **ADAM)
    m = torch.zeros(14, 6, dtype=torch.float64)
    for G, _ in zip(grads, weights_after_each_step(optimizer, grads), strict=True):
        m = BETAS[0] * m + (1 - BETAS[0]) * G
        (state,) = optimizer.state.values()
        assert_close(state["m_U"] @ torch.diag(state["m_s"]) @ state["m_Vh"], m, 1e-10)


def test_mlorcs_negative_entries_take_their_mean_size_and_others_stay() -> None:
    v = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 0.0, 5.0]])
    assert without_negatives(v).tolist() == [[1.0, 3.0, 3.0], [3.0, 0.0, 5.0]]
    assert without_negatives(v.abs()).tolist() == v.abs().tolist()


def test_oversampling_and_power_iterations_bring_the_randomized_svd_to_the_true_one() -> None:
    A = next(gradients((30, 20), 1))
    U, s, Vh = torch.linalg.svd(A, full_matrices=False)
    best = (A - U[:, :4] * s[:4] @ Vh[:4]).norm()

    def excess(columns: int, power_iterations: int) -> float:
        omega = random_matrix(20, columns, seed=0, step=1, name="m", like=A)
        left, values, right = randomized_svd(A, omega, 4, power_iterations)
        return float((A - left * values @ right).norm() / best) - 1

    assert excess(4, 0) > 2 * excess(4, 1) > 4 * excess(8, 1) > 0
    assert excess(10, 8) < 1e-6


def test_mlorc_draws_anew_at_each_step_and_leaves_the_global_generator_alone() -> None:
    like = torch.zeros(1)
    streams = [(0, 1, "m"), (0, 2, "m"), (1, 1, "m"), (0, 1, "v")]
    draws = [random_matrix(3, 2, seed=seed, step=step, name=name, like=like) for seed, step, name in streams]
    assert all((a != b).all() for i, a in enumerate(draws) for b in draws[:i])
    before = torch.get_rng_state()
    list(weights_after_each_step(MLorc([nn.Parameter(normals(*WIDE))], rank=2), list(gradients(WIDE, 2))))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
def test_mofasgds_step_has_rank_r_and_spectral_norm_lr_whatever_the_gradients_scale(shape: tuple[int, int]) -> None:
    W, grads = normals(*shape), list(gradients(shape, 5))
    steps = []
    for scale in (1.0, 1e-6):
        optimizer = MoFaSGD([nn.Parameter(W.clone())], lr=LR, rank=3)
        *_, before, after = weights_after_each_step(optimizer, [scale * G for G in grads])
        steps.append(before - after)
        s = torch.linalg.svdvals(before - after)
        torch.testing.assert_close(s[:3], torch.full_like(s[:3], LR), rtol=1e-9, atol=0)
        assert s[3:].abs().max() < 1e-12
    assert_close(steps[1], steps[0], 1e-6)


def test_mofasgds_step_leaves_out_directions_that_the_gradient_never_had() -> None:
    grads = [normals(14, 1) @ normals(1, 6, seed=t) for t in range(3)]  # one column space, at most rank one
    optimizer = MoFaSGD([nn.Parameter(normals(14, 6))], lr=LR, rank=4)
    before, after = list(weights_after_each_step(optimizer, grads))[-2:]
    s = torch.linalg.svdvals(before - after)
    torch.testing.assert_close(s, torch.tensor([LR, 0, 0, 0, 0, 0], dtype=s.dtype), rtol=1e-9, atol=1e-12)


def test_mofasgd_follows_momentum_exactly_at_full_rank() -> None:
    grads = list(gradients(WIDE, 6))
    optimizer = MoFaSGD([nn.Parameter(normals(*WIDE))], rank=5, beta=0.8)
    M = torch.zeros(WIDE, dtype=torch.float64)
    for G, _ in zip(grads, weights_after_each_step(optimizer, grads), strict=True):
        M = 0.8 * M + G
        (state,) = optimizer.state.values()
        assert_close(state["U"] @ torch.diag(state["s"]) @ state["V"].T, M, 1e-10)


@pytest.mark.parametrize("name", ["galore", "fira", "mlorc", "ldadam"])
def test_the_adam_likes_do_not_feel_the_gradients_scale(name: str) -> None:
    make, options, _ = METHODS[name]
    weights = []
    for scale in (1.0, 1e4):
        optimizer = make([nn.Parameter(normals(*TALL))], rank=2, **{**options, "eps": 0.0})
        weights.append(list(weights_after_each_step(optimizer, [scale * G for G in gradients(TALL, 7)]))[-1])
    assert_close(weights[1], weights[0], 1e-7)


@pytest.mark.parametrize(
    ("name", "bases"),
    [
        ("galore", ["projection"]),
        ("fira", ["projection"]),
        ("galore-muon", ["projection"]),
        ("mlorc", ["m_U", "m_Vh", "v_U", "v_Vh"]),
        ("mofasgd", ["U", "V"]),
        ("ldadam", ["projection"]),
    ],
)
def test_bases_stay_orthonormal_in_float32(name: str, bases: list[str]) -> None:
    make, options, _ = METHODS[name]
    optimizer = make([nn.Parameter(normals(*TALL).float())], rank=4, **options)
    list(weights_after_each_step(optimizer, list(gradients(TALL, 40))))
    (state,) = optimizer.state.values()
    for basis in bases:
        B = state[basis].mT if basis.endswith("Vh") else state[basis]
        assert (B.mT @ B - torch.eye(4)).abs().max() < 2e-6, basis


def test_ldadams_error_and_projected_steps_add_up_to_the_gradients() -> None:
    """Nothing of the gradients is lost: with beta1 = 0 they are what was projected, plus the last error."""
    grads = list(gradients(WIDE, 9))
    optimizer = LDAdam([nn.Parameter(normals(*WIDE))], rank=2, betas=(0.0, 0.9), rho=0.5)
    projected = torch.zeros(WIDE, dtype=torch.float64)
    for _ in weights_after_each_step(optimizer, grads):
        (state,) = optimizer.state.values()
        projected += state["projection"] @ state["exp_avg"]  # R itself, where beta1 = 0
    assert_close(projected + state["error"], sum(grads, torch.zeros(())), 1e-10)


def test_ldadams_variance_that_turns_negative_takes_its_absolute_value() -> None:
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    m, v = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.1], [0.2]])  # v - m^2 is -0.9 and -3.8
    turned_m, turned_v = turned_moments(turn, m, v, step=5, betas=(0.0, 0.0))
    torch.testing.assert_close(turned_m, torch.tensor([[2.2], [0.4]]))
    first, second = 0.36 * -0.9 + 0.64 * -3.8 + 2.2**2, 0.64 * -0.9 + 0.36 * -3.8 + 0.4**2
    assert first > 0 > second
    torch.testing.assert_close(turned_v, torch.tensor([[first], [-second]]))


def test_newton_schulz_brings_singular_values_near_one_and_turns_nothing() -> None:
    R = normals(4, 9)
    U, _, Vh = torch.linalg.svd(R, full_matrices=False)
    s = torch.diagonal(U.T @ newton_schulz(R, 5) @ Vh.T)
    assert s.min() > 0.65
    assert s.max() < 1.25
    assert_close(U @ torch.diag(s) @ Vh, newton_schulz(R, 5), 1e-10)


def test_galore_muon_is_torchs_muon_on_the_projected_gradient() -> None:
    shape, grads = (16, 48), list(gradients((16, 48), 4))
    ours = GaLoreMuon([nn.Parameter(torch.zeros(shape))], lr=LR, rank=6)
    P = torch.linalg.svd(grads[0].float(), full_matrices=False).U[:, :6]
    small = nn.Parameter(torch.zeros(6, 48))
    muon = torch.optim.Muon([small], lr=LR, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    small_path = weights_after_each_step(muon, [P.T.double() @ G for G in grads])
    for actual, expected in zip(weights_after_each_step(ours, grads), small_path, strict=True):
        assert_close(actual, P @ expected, 0.02)  # torch iterates in bfloat16
