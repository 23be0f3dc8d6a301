"""The paper, line by line, for one matrix: the oracle that every faster path is tested against.

"Taming Momentum: Rethinking Optimizer States Through Low-Rank Approximation" (arXiv 2602.24283).
One function is one formula; nothing is batched, fused, guarded or cached, and any floating dtype works
(use float64 to judge others). Nothing in the library calls this module.

The equations, as this project numbers them (in brackets: their place in the paper):

    (1)   m_B <- (1 - gamma) m_B + gamma G m_A^T (m_A m_A^T + delta I)^-1        (Theorem 3.1)
    (2)   m_A <- (1 - gamma) m_A + gamma (m_B^T m_B + delta I)^-1 m_B^T G        (Theorem 3.1)
    (3)   gamma1 = 1 - beta1^(1/2),  gamma2 = 1 - beta2^(1/4)                    (Appendix B.1)
    (4)   m_t = beta1 m_B m_A + (1 - beta1) G                                    (Algorithm 1)
    (5)   v_t = beta2 (v_B v_A)^2 + (1 - beta2) G^2, element-wise                (Algorithm 1)
    (6)   mhat = m_t / (1 - beta1^t),  vhat = v_t / (1 - beta2^t)                (Algorithm 1)
    (7)   W <- W - lr (s mhat / (sqrt(vhat) + eps) + weight_decay W)             (Algorithm 1)
    (8)   m_t = mu m_B m_A + G                                                   (Algorithm 2)
    (9)   (1), (2) with the target's weight gamma replaced by                    (Algorithm 2)
          (1 - sqrt(mu)) / (1 - mu), and the factor's by sqrt(mu)
    (10)  W <- W - lr s(p, q) NewtonSchulz5(m_t)                                 (Algorithm 2)

v_B and v_A follow |G| by (1) and (2) with gamma2. delta is the damping of Appendix C.1.

Beyond the paper:

    (11)  M' = beta m_B m_A + (1 - beta) G,  U = orth(M' m_A^T),  m_B m_A <- U U^T M',  m_A m_A^T = I
    (12)  m_t = (beta1 m_B m_A + (1 - beta1) P + c (G - P)) / max(1, c),  P the part of G in the row space of m_A
    (13)  v_t = beta2 v_r v_c / mean(v_r) + (1 - beta2) G^2,  v_r and v_c averages of G^2's row and column means
    (14)  the update is divided by max(1, RMS(G / sqrt(vhat_t))),  0 / 0 being 0 (StableAdamW, arXiv 2304.13013)
    (15)  ... or by s / (k (sqrt(p) + sqrt(q))) where that is more, s being the largest singular value of
          mhat_t / sqrt(v_r v_c) as `sketched_norm` estimates it

Shapes throughout: ``W``, ``G`` are (p, q); the left factors ``m_B``, ``v_B`` are (p, r); the right factors
``m_A``, ``v_A`` are (r, q).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

#: Polynomial of the quintic Newton-Schulz iteration of Muon (also torch.optim.Muon's default).
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def first_moment_rate(beta1: float) -> float:
    """Equation (3): the rate of each factor of m. Two factors share one decay, hence the square root."""
    return 1.0 - math.sqrt(beta1)


def second_moment_rate(beta2: float) -> float:
    """Equation (3): the rate of each factor of sqrt(v). The square doubles the decay, hence the fourth root."""
    return float(1.0 - beta2**0.25)


def damped_gram(
    gram: Tensor,
    damping: float,
    damping_mode: Literal["absolute", "relative"] = "absolute",
    coming: float = 0.0,
) -> Tensor:
    """The matrix that Theorem 3.1 inverts, made invertible (Appendix C.1).

    ``absolute`` adds ``damping * I``, as in the paper. ``relative`` adds ``damping * mean(diag(gram)) * I``,
    which leaves the step invariant to the gradient's scale; a zero ``gram`` becomes ``I``. ``coming`` is the mean
    diagonal that the step is about to bring; where it is larger, it counts.
    """
    if damping_mode == "absolute":
        shift = damping
    else:
        mean_diagonal = gram.diagonal().mean().item()
        shift = damping * max(mean_diagonal, coming) if mean_diagonal > 0 else 1.0
    return gram + shift * torch.eye(gram.shape[0], dtype=gram.dtype)


def left_target(A: Tensor, G: Tensor, damping: float, damping_mode: Literal["absolute", "relative"]) -> Tensor:
    """The least-squares left factor for a fixed right one, G A^T (A A^T)^-1: (p, r), in equation (1)."""
    gram = damped_gram(A @ A.T, damping, damping_mode)
    target: Tensor = torch.linalg.solve(gram, A @ G.T).T  # the Gram matrix is symmetric
    return target


def right_target(
    B: Tensor, G: Tensor, damping: float, damping_mode: Literal["absolute", "relative"], coming: float = 0.0
) -> Tensor:
    """The least-squares right factor for a fixed left one, (B^T B)^-1 B^T G: (r, q), in equation (2)."""
    gram = damped_gram(B.T @ B, damping, damping_mode, coming)
    target: Tensor = torch.linalg.solve(gram, B.T @ G)
    return target


def advance_factors(
    B: Tensor,
    A: Tensor,
    G: Tensor,
    *,
    keep: float,
    gain: float,
    damping: float,
    damping_mode: Literal["absolute", "relative"],
) -> tuple[Tensor, Tensor]:
    """Equations (1) and (2), simultaneously: both right-hand sides read the old factors.

    ``keep`` is the weight of the old factor and ``gain`` that of its least-squares target: ``1 - gamma`` and
    ``gamma`` for Adam, equation (9) for Muon.
    """
    step_B = gain * left_target(A, G, damping, damping_mode)
    coming = step_B.square().sum(dim=0).mean().item()
    new_B = keep * B + step_B
    new_A = keep * A + gain * right_target(B, G, damping, damping_mode, coming)
    return new_B, new_A


def subspace_sweep(B: Tensor, A: Tensor, G: Tensor, *, keep: float, gain: float) -> tuple[Tensor, Tensor]:
    """Equation (11), one sweep of block least squares on the averaged objective; A's rows are orthonormal.

    Returns the new factors in the basis of the QR decomposition; only their product and A's row space are defined
    by the equation.
    """
    average = keep * (B @ A) + gain * G
    U = torch.linalg.qr(average @ A.T).Q
    L = U.T @ average
    new_A = torch.linalg.qr(L.T).Q.T
    return U @ L @ new_A.T, new_A


def residual_weight(gain: float, step: int) -> float:
    """c of equation (12), bias-corrected as an average of decay 1 - c is: 1 at the first step, then down to c."""
    return gain if gain >= 1 or gain == 0 else gain / (1 - (1 - gain) ** step)


def rank1_second_moment(v_row: Tensor, v_col: Tensor, G: Tensor, beta2: float) -> Tensor:
    """Equation (13): (p, q), from the means of step t - 1, ``v_row`` (p) and ``v_col`` (q)."""
    mean = v_row.mean()
    outer = torch.outer(v_row, v_col) / mean if mean > 0 else torch.zeros_like(G)
    return beta2 * outer + (1 - beta2) * G**2


def first_moment(m_B: Tensor, m_A: Tensor, G: Tensor, beta1: float) -> Tensor:
    """Equation (4): (p, q), from the factors of step t - 1."""
    return beta1 * (m_B @ m_A) + (1 - beta1) * G


def second_moment(v_B: Tensor, v_A: Tensor, G: Tensor, beta2: float) -> Tensor:
    """Equation (5): (p, q), element-wise squares, from the factors of step t - 1."""
    return beta2 * (v_B @ v_A) ** 2 + (1 - beta2) * G**2


def first_moment_correction(beta1: float, step: int) -> float:
    """Equation (6). Exact as well as the paper's: m_B m_A approaches a constant gradient like an EMA does."""
    return 1 - beta1**step


def second_moment_correction(beta2: float, step: int, mode: Literal["paper", "exact"]) -> float:
    """The divisor of v_t: equation (6) for ``paper``; for ``exact`` the share of v that has really arrived.

    v_B v_A reaches (1 - beta2^((t-1)/2)) E|g| when it enters step t, and is squared; 1 - beta2^t is what an
    EMA of g^2 would have reached, and makes v too small by a factor of 4 at t = 10 for beta2 = 0.95.
    """
    if mode == "paper":
        return 1 - beta2**step
    return float(beta2 * (1 - beta2 ** ((step - 1) / 2)) ** 2 + (1 - beta2))


@dataclass
class AdamState:
    """What Algorithm 1 remembers of one matrix, with one of three second moments."""

    m_B: Tensor  # (p, r)
    m_A: Tensor  # (r, q)
    v_B: Tensor | None = None  # (p, r), factored
    v_A: Tensor | None = None  # (r, q)
    v_row: Tensor | None = None  # (p,), of rank 1
    v_col: Tensor | None = None  # (q,)
    v: Tensor | None = None  # (p, q), in full
    step: int = 0


def lorapre_adam_step(
    W: Tensor,
    G: Tensor,
    state: AdamState,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    eps_mode: Literal["absolute", "relative"] = "absolute",
    bounded: bool = False,
    update_clipping: bool = False,
    spectral_clipping: float | None = None,
    weight_decay: float = 0.0,
    scale: float = 1.0,
    regression: Literal["newton", "subspace"] = "newton",
    sweeps: bool = True,
    residual_gain: float | None = None,
    damping: float = 1e-6,
    damping_mode: Literal["absolute", "relative"] = "absolute",
    bias_correction: Literal["paper", "exact"] = "paper",
) -> Tensor:
    """Algorithm 1, equations (1) to (7), with the defaults of the paper. Returns the new W; advances ``state``.

    The rest is beyond the paper: ``regression="subspace"`` is equation (11), ``residual_gain`` c of (12), and
    ``state`` may hold the second moment of (13), or Adam's own, in full. A relative ``eps`` is in units of the
    matrix's root mean vhat. ``bounded`` limits |mhat| / sqrt(vhat) to 1 / sqrt(1 - beta2), and to 0 where vhat is 0.
    Without ``sweeps`` the right factor of "subspace" stays, and M' = M_t is projected on its rows: M' A^T A.
    ``update_clipping`` is equation (14), ``spectral_clipping`` (15), both by the divisor that is larger.
    """
    state.step += 1
    correction = first_moment_correction(beta1, state.step)
    if residual_gain is None:
        m_hat = first_moment(state.m_B, state.m_A, G, beta1) / correction
    else:
        target = G @ state.m_A.T if regression == "subspace" else left_target(state.m_A, G, damping, damping_mode)
        inside = target @ state.m_A
        m_hat = (beta1 * (state.m_B @ state.m_A) + (1 - beta1) * inside) / correction
        m_hat = m_hat + residual_weight(residual_gain, state.step) * (G - inside)
        m_hat = m_hat / max(1.0, residual_gain)

    def follow(B: Tensor, A: Tensor, target: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        if regression == "subspace":
            return subspace_sweep(B, A, target, keep=beta, gain=1 - beta)
        gamma = first_moment_rate(beta)
        return advance_factors(B, A, target, keep=1 - gamma, gain=gamma, damping=damping, damping_mode=damping_mode)

    if state.v is not None:
        state.v = beta2 * state.v + (1 - beta2) * G**2
        v_hat = state.v / (1 - beta2**state.step)
    elif state.v_row is not None:
        assert state.v_col is not None
        v_hat = rank1_second_moment(state.v_row, state.v_col, G, beta2) / (1 - beta2**state.step)
        columns = state.v_col
        state.v_row = beta2 * state.v_row + (1 - beta2) * (G**2).mean(dim=1)
        state.v_col = beta2 * state.v_col + (1 - beta2) * (G**2).mean(dim=0)
        rows = state.v_row / (1 - beta2**state.step)
    else:
        assert state.v_B is not None
        assert state.v_A is not None
        v = second_moment(state.v_B, state.v_A, G, beta2)
        v_hat = v / second_moment_correction(beta2, state.step, bias_correction)
        # The square root of v decays by sqrt(beta2), and each of its two factors by the root of that: equation (3).
        state.v_B, state.v_A = follow(state.v_B, state.v_A, G.abs(), math.sqrt(beta2))
    if sweeps:
        state.m_B, state.m_A = follow(state.m_B, state.m_A, G, beta1)
    else:
        state.m_B = (beta1 * (state.m_B @ state.m_A) + (1 - beta1) * G) @ state.m_A.T
    if state.v_row is None:
        rows, columns = v_hat.mean(dim=1), v_hat.mean(dim=0)
    if eps_mode == "relative":
        eps = eps * v_hat.mean().sqrt().item()
    update = m_hat / (v_hat.sqrt() + eps)
    if bounded:
        limit = 1 / math.sqrt(1 - beta2)
        update = torch.where(v_hat > 0, update.clamp(-limit, limit), 0.0)
    divisor = 1.0
    if update_clipping:
        divisor = (G / v_hat.sqrt()).nan_to_num(0.0).square().mean().sqrt().item()
    if spectral_clipping is not None:
        p, q = W.shape
        largest = sketched_norm(m_hat, rows, columns)
        divisor = max(divisor, largest / (spectral_clipping * (math.sqrt(p) + math.sqrt(q))))
    update = update / max(1.0, divisor)
    return W - lr * (scale * update + weight_decay * W)


def sketch_signs(q: int) -> Tensor:
    """Equation (15)'s S, (q, 16): sign k of row j is bit k of MurmurHash3's finalizer of j, 1 for 0 and -1 for 1."""

    def mixed(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
        return x ^ (x >> 16)

    return torch.tensor([[1.0 - 2.0 * (mixed(j) >> k & 1) for k in range(16)] for j in range(q)], dtype=torch.float64)


def sketched_norm(M: Tensor, rows: Tensor, columns: Tensor) -> float:
    """Equation (15)'s estimate of the largest singular value of D, M (p, q) over the root of ``rows`` x ``columns``.

    ``columns`` count in units of their mean, and 1/100 at least; all as 1 where they are 0. Of Y = D S the products of
    different columns estimate the sum of the fourth powers of D's singular values, and the columns' squares that of
    the squares; what a random matrix of that size has is taken off.
    """
    p, q = M.shape
    even = (columns / columns.mean()).clamp(min=0.01) if columns.any() else torch.ones_like(columns)
    D = torch.where(rows[:, None] > 0, M / (rows[:, None] * even).sqrt(), 0.0)
    Y = D @ sketch_signs(q).to(D)
    products = [(Y[:, i] @ Y[:, j]).item() for i in range(16) for j in range(16)]
    off = sum(products[16 * i + j] ** 2 for i in range(16) for j in range(16) if i != j) / 240
    squares = sum(products[17 * i] for i in range(16)) / 16
    return float(max(0.0, off - squares**2 * (p + q) / (p * q)) ** 0.25)


def newton_schulz(M: Tensor, steps: int = 5) -> Tensor:
    """The quintic iteration of Muon: (p, q) to (p, q), singular values pushed towards 1."""
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    X = M.T if M.shape[0] > M.shape[1] else M
    X = X / X.norm().clamp(min=1e-7)
    for _ in range(steps):
        S = X @ X.T
        X = a * X + (b * S + c * S @ S) @ X
    result: Tensor = X.T if M.shape[0] > M.shape[1] else X
    return result


def lorapre_muon_step(
    W: Tensor,
    G: Tensor,
    m_B: Tensor,
    m_A: Tensor,
    *,
    lr: float,
    mu: float = 0.95,
    weight_decay: float = 0.0,
    shape_scale: Literal["original", "match_rms_adamw"] = "original",
    damping: float = 1e-6,
    damping_mode: Literal["absolute", "relative"] = "absolute",
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 2, equations (8) to (10). Returns the new (W, m_B, m_A).

    ``shape_scale`` names the two usual factors s(p, q) as torch.optim.Muon does: sqrt(max(1, p/q)) and
    0.2 sqrt(max(p, q)).
    """
    p, q = W.shape
    m = mu * (m_B @ m_A) + G
    new_B, new_A = advance_factors(
        m_B,
        m_A,
        G,
        keep=math.sqrt(mu),
        gain=(1 - math.sqrt(mu)) / (1 - mu),
        damping=damping,
        damping_mode=damping_mode,
    )
    s = math.sqrt(max(1.0, p / q)) if shape_scale == "original" else 0.2 * math.sqrt(max(p, q))
    return W * (1 - lr * weight_decay) - lr * s * newton_schulz(m), new_B, new_A
