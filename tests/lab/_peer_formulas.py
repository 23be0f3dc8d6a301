"""The rivals' updates as their papers give them: one matrix, one step, plain float64 torch.

Each formula is called as ``formula(W, G, state, t, lr, run)`` with W and G of shape (p, q) and t from 1, and returns
the new W. ``state`` is its own dictionary, empty at first; ``run`` holds betas, weight decay, rank and the like.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]


@dataclass
class Run:
    """Options of a test, the same for the optimizer and its formula."""

    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    rank: int = 3
    #: Steps between two projections; lowered, so that a short test crosses several.
    gap: int = 3
    #: Rows of a query or key matrix that make one head.
    head_dim: int = 0
    seed: int = 0
    #: The projection that a random one drew for this step.
    drawn: Tensor | None = None


Formula = Callable[[Tensor, Tensor, State, int, float, Run], Tensor]


def ema(state: State, name: str, value: Tensor, beta: float) -> Tensor:
    state[name] = beta * state.get(name, torch.zeros_like(value)) + (1 - beta) * value
    average: Tensor = state[name]
    return average


def adam(G: Tensor, state: State, t: int, run: Run, beta1: float | None = None, correct: bool = True) -> Tensor:
    """Adam's direction, eps 1e-8; not ``correct``: as the BERT-style packages leave it, m / (sqrt(v) + eps)."""
    beta1 = run.beta1 if beta1 is None else beta1
    m, v = ema(state, "m", G, beta1), ema(state, "v", G * G, run.beta2)
    if not correct:
        return m / (v.sqrt() + 1e-8)
    return (m / (1 - beta1**t)) / ((v / (1 - run.beta2**t)).sqrt() + 1e-8)


def adamw(W: Tensor, G: Tensor, state: State, t: int, lr: float, run: Run) -> Tensor:
    return (1 - lr * run.weight_decay) * W - lr * adam(G, state, t, run)


def stable_adamw(W: Tensor, G: Tensor, state: State, t: int, lr: float, run: Run) -> Tensor:
    update = adam(G, state, t, run)
    lr /= max(1.0, rms(G / (state["v"] / (1 - run.beta2**t)).sqrt()))
    return (1 - lr * run.weight_decay) * W - lr * update


def adam_beta1_0(W: Tensor, G: Tensor, state: State, t: int, lr: float, run: Run) -> Tensor:
    v = ema(state, "v", G * G, run.beta2) / (1 - run.beta2**t)
    return (1 - lr * run.weight_decay) * W - lr * G / (v.sqrt() + 1e-8)


def muon(W: Tensor, G: Tensor, state: State, t: int, lr: float, run: Run) -> Tensor:
    """Momentum as an average, Nesterov, five quintic Newton-Schulz steps, RMS matched to AdamW's (arXiv 2502.16982).

    The iteration is chaotic enough for bfloat16 to matter, so that this rounds where torch does.
    """

    def rounded(X: Tensor) -> Tensor:
        return X.bfloat16().float()

    m = ema(state, "m", G, 0.95)
    X = rounded(0.05 * G + 0.95 * m)
    X = X.mT if X.shape[0] > X.shape[1] else X
    X = rounded(X / rounded(X.norm()))
    for _ in range(5):
        S = rounded(X @ X.mT)
        X = rounded(3.4445 * X + rounded(-4.7750 * S + 2.0315 * S @ S) @ X)
    X = X.mT if W.shape[0] > W.shape[1] else X
    return (1 - lr * run.weight_decay) * W - lr * 0.2 * math.sqrt(max(W.shape)) * X.double()


def rms(X: Tensor) -> float:
    return float(X.square().mean().sqrt())


def adafactor(W: Tensor, G: Tensor, state: State, t: int, lr: float, run: Run) -> Tensor:
    """arXiv 1804.04235, algorithm 4, the step size bounded by lr in place of 0.01."""
    beta2 = 1 - t**-0.8
    row = ema(state, "row", G.square().mean(1), beta2)
    column = ema(state, "column", G.square().mean(0), beta2)
    U = G / (torch.outer(row, column) / row.mean()).sqrt()
    U = U / max(1.0, rms(U))
    return (1 - lr * run.weight_decay) * W - max(1e-3, rms(W)) * min(lr, t**-0.5) * U


def sgd(W: Tensor, G: Tensor, state: State, t: int, lr: float, run: Run) -> Tensor:
    state["m"] = 0.9 * state.get("m", torch.zeros_like(W)) + G + run.weight_decay * W
    return W - lr * state["m"]


def _project(G: Tensor, P: Tensor) -> Tensor:
    return G @ P if G.shape[0] >= G.shape[1] else P.mT @ G


def _project_back(R: Tensor, P: Tensor, like: Tensor) -> Tensor:
    return R @ P.mT if like.shape[0] >= like.shape[1] else P @ R


def _singular_vectors(G: Tensor, state: State, t: int, run: Run) -> Tensor:
    """P (min(p, q), r) of the smaller side, renewed every ``run.gap`` steps. Signs are LAPACK's own, in float32."""
    if (t - 1) % run.gap == 0:
        U, _, Vh = torch.linalg.svd(G.float(), full_matrices=False)
        state["P"] = (Vh[: run.rank].mT if G.shape[0] >= G.shape[1] else U[:, : run.rank]).double()
    projection: Tensor = state["P"]
    return projection


def _corrected(lr: float, t: int, run: Run) -> float:
    return lr * math.sqrt(1 - run.beta2**t) / (1 - run.beta1**t)


def galore(W: Tensor, G: Tensor, state: State, t: int, lr: float, run: Run) -> Tensor:
    """arXiv 2403.03507, algorithm 2: Adam on R = P'G, W <- W - lr 0.25 P N."""
    P = _singular_vectors(G, state, t, run)
    N = adam(_project(G, P), state, t, run, correct=False)
    W = W - _corrected(lr, t, run) * 0.25 * _project_back(N, P, G)
    return (1 - lr * run.weight_decay) * W


def _limit_growth(S: Tensor, state: State) -> Tensor:
    """Fira's equation 7: the norm may grow by 1 % a step."""
    if "norm" in state:
        S = S / max(float(S.norm()) / (state["norm"] + 1e-8) / 1.01, 1.0)
    state["norm"] = float(S.norm())
    return S


def _channel_scale(N: Tensor, R: Tensor, like: Tensor) -> Tensor:
    dim = 1 if like.shape[0] >= like.shape[1] else 0
    return N.norm(dim=dim, keepdim=True) / (R.norm(dim=dim, keepdim=True) + 1e-8)


def fira(W: Tensor, G: Tensor, state: State, t: int, lr: float, run: Run, taken: float = 0.25) -> Tensor:
    """arXiv 2410.01623, algorithm 1, but for ``taken``: the package takes 0.25 P P'G from G where the paper takes 1."""
    P = _singular_vectors(G, state, t, run)
    R = _project(G, P)
    N = adam(R, state, t, run, correct=False)
    S = _channel_scale(N, R, G) * (G - taken * _project_back(R, P, G))
    W = W - _corrected(lr, t, run) * (0.25 * _project_back(N, P, G) + _limit_growth(S, state))
    return (1 - lr * run.weight_decay) * W


def fira_paper(W: Tensor, G: Tensor, state: State, t: int, lr: float, run: Run) -> Tensor:
    return fira(W, G, state, t, lr, run, taken=1.0)


def apollo(W: Tensor, G: Tensor, state: State, t: int, lr: float, run: Run) -> Tensor:
    """arXiv 2412.05270, algorithm 1: the gradient times one scale a channel, from a random projection of it."""
    assert run.drawn is not None
    R = _project(G, run.drawn)
    N = adam(R, state, t, run, correct=False)
    W = W - _corrected(lr, t, run) * _limit_growth(_channel_scale(N, R, G) * G, state)
    return (1 - lr * run.weight_decay) * W


def apollo_mini(W: Tensor, G: Tensor, state: State, t: int, lr: float, run: Run) -> Tensor:
    """The same with rank 1, one scale a matrix, and sqrt(128)."""
    assert run.drawn is not None
    R = _project(G, run.drawn)
    N = adam(R, state, t, run, correct=False)
    S = _limit_growth(N.norm() / (R.norm() + 1e-8) * G, state)
    return (1 - lr * run.weight_decay) * (W - _corrected(lr, t, run) * math.sqrt(128) * S)


def _gaussian(shape: tuple[int, int], seed: int, right: bool) -> Tensor:
    largest = torch.iinfo(torch.int64).max
    seeds = torch.randint(0, largest, (2,), generator=torch.Generator().manual_seed(seed)).tolist()
    generator = torch.Generator().manual_seed(seeds[int(right)])
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def flora(W: Tensor, G: Tensor, state: State, t: int, lr: float, run: Run) -> Tensor:
    """arXiv 2402.03293, algorithm 2, around Adafactor: the momentum is kept as M A', A Gaussian with variance 1 / r."""
    p, q = G.shape
    seed = state.setdefault("seed", run.seed + 1)

    def projection(seed: int) -> Tensor:  # (min side, r)
        if p < q:
            return _gaussian((run.rank, p), seed, right=False).mT / math.sqrt(run.rank)
        return _gaussian((q, run.rank), seed, right=True) / math.sqrt(run.rank)

    beta2 = 1 - t**-0.8
    squared = G.square() + 1e-30
    row, column = ema(state, "row", squared.mean(1), beta2), ema(state, "column", squared.mean(0), beta2)
    U = G / (torch.outer(row, column) / row.mean()).sqrt()
    whole = max(p, q) > 4 * min(p, q)
    if whole:
        state["m"] = run.beta1 * state.get("m", torch.zeros_like(U)) + (1 - run.beta1) * U
        update = state["m"]
    else:
        A = projection(seed)
        m = state.get("m", torch.zeros_like(_project(U, A)))
        update = (1 - run.beta1) * U + run.beta1 * _project_back(m, A, U)
        if t % run.gap == 0:
            largest = torch.iinfo(torch.int64).max
            state["seed"] = torch.randint(0, largest, (15,), generator=torch.Generator().manual_seed(seed)).tolist()[-1]
            renewed = projection(state["seed"])
            m, A = _project(_project_back(m, A, U), renewed), renewed
        state["m"] = run.beta1 * m + (1 - run.beta1) * _project(U, A)
    rate = lr * max(1e-3, rms(W))
    return (1 - rate * run.weight_decay) * W - rate * update / max(1.0, rms(update))


def adam_mini(W: Tensor, G: Tensor, state: State, t: int, lr: float, run: Run) -> Tensor:
    """arXiv 2406.16793, algorithm 1: one v a head of a query or key (``run.head_dim`` rows), one a row elsewhere."""
    rows = run.head_dim or 1
    blocks = G.reshape(-1, rows * G.shape[1])
    m = ema(state, "m", G, run.beta1) / (1 - run.beta1**t)
    v = ema(state, "v", blocks.square().mean(1), run.beta2) / (1 - run.beta2**t)
    scale = (v.sqrt() + 1e-8).repeat_interleave(rows)[:, None]
    return (1 - lr * run.weight_decay) * W - lr * m / scale


def came(W: Tensor, G: Tensor, state: State, t: int, lr: float, run: Run) -> Tensor:
    """arXiv 2307.02047, algorithm 2."""

    def factored(name: str, X: Tensor, beta: float) -> Tensor:
        row, column = ema(state, f"{name} row", X.mean(1), beta), ema(state, f"{name} column", X.mean(0), beta)
        return torch.outer(row, column) / row.mean()

    U = G / factored("v", G.square() + 1e-30, run.beta2).sqrt()
    U = U / max(1.0, rms(U))
    m = ema(state, "m", U, run.beta1)
    S = factored("instability", (U - m).square() + 1e-16, 1 - (1 - run.beta2) / 10)
    return (1 - lr * run.weight_decay) * W - lr * m / S.sqrt()


def lora_rite(
    A: Tensor, B: Tensor, gA: Tensor, gB: Tensor, state: State, t: int, lr: float, run: Run
) -> tuple[Tensor, Tensor]:
    """arXiv 2410.20625, algorithm 1, without escaped mass: A (r, q), B (p, r) and their gradients."""
    factors = {"A": A.mT, "B": B}
    bases = {name: torch.linalg.qr(factor) for name, factor in factors.items()}
    other = {"A": "B", "B": "A"}
    inverse = {name: torch.linalg.pinv(basis.R) for name, basis in bases.items()}
    unmagnified = {name: G @ inverse[other[name]] for name, G in (("A", gA.mT), ("B", gB))}
    norm = math.sqrt(sum(float(G.square().sum()) for G in unmagnified.values()))
    new = {}
    for name, factor in factors.items():
        G = unmagnified[name] * min(1.0, 1 / norm)
        r = G.shape[1]
        Q = bases[other[name]].Q
        turn = Q.mT @ state.get(f"{name} basis", torch.zeros_like(Q))

        def decay(beta: float) -> float:
            return beta * (1 - beta ** (t - 1)) / (1 - beta**t)

        V = turn @ state.get(f"{name} v", torch.zeros(r, r, dtype=G.dtype)) @ turn.mT
        V = decay(run.beta2) * V + (1 - decay(run.beta2)) * G.mT @ G / G.shape[0]
        values, vectors = torch.linalg.eigh(V)
        root = vectors @ torch.diag(1 / ((values.clamp(min=0) + 1e-12).sqrt() + 1e-6)) @ vectors.mT
        m = state.get(f"{name} m", torch.zeros_like(G)) @ turn.mT
        m = decay(run.beta1) * m + (1 - decay(run.beta1)) * G @ root
        new[name] = factor - lr * (m @ inverse[other[name]].mT + run.weight_decay * factor)
        state[f"{name} v"], state[f"{name} m"], state[f"{name} basis"] = V, m, Q
    return new["A"].mT, new["B"]
