"""LoFT against AdamW of the weight with projections written as matrices, in float64, and against torch's AdamW."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from _lora import (
    SCALING,
    P,
    Q,
    R,
    backpropagated,
    check_bfloat16_rounds_float32,
    check_it_moves_the_pairs_of_a_peft_model,
    check_refusals,
    check_resume_has_the_same_bits,
    factors,
    measured_state_bytes,
    products_after_each_step,
    weight_gradients,
)
from torch import Tensor, nn

from _support import assert_close
from lorapre.lab.baselines.loft import LoFT

LR, DECAY, BETAS, EPS = 0.03, 0.2, (0.8, 0.9), 1e-6
OPTIONS: dict[str, Any] = {"lr": LR, "weight_decay": DECAY, "betas": BETAS, "eps": EPS}


def make(params: Any, **options: Any) -> LoFT:
    scaling = options.pop("scaling", None)
    groups = params if scaling is None else [{"params": params, "scaling": scaling}]
    return LoFT(groups, **options)


class ProjectedAdam:
    """Adam of a matrix (n, k) whose rows are seen through projections that change: nothing of rank r is kept.

    Each row has its second moment as a (k, k) matrix, so that a projection can act on both sides of it.
    """

    def __init__(self, n: int, k: int) -> None:
        self.m, self.second = torch.zeros(n, k, dtype=torch.float64), torch.zeros(n, k, k, dtype=torch.float64)

    def advance(self, G: Tensor, projection: Tensor, t: int) -> Tensor:
        seen = G @ projection
        self.m = BETAS[0] * self.m @ projection + (1 - BETAS[0]) * seen
        carried = projection @ self.second @ projection
        self.second = BETAS[1] * carried + (1 - BETAS[1]) * torch.einsum("ni,nj->nij", seen, seen)
        v = torch.diagonal(self.second, dim1=1, dim2=2).clamp(min=0) / (1 - BETAS[1] ** t)
        return (self.m / (1 - BETAS[0] ** t) / (v**0.5 + EPS)) @ projection


def reference(A: Tensor, B: Tensor, grads: list[Tensor]) -> Iterator[Tensor]:
    """The weight s B A after each step; the factors serve as the spans of their rows and columns."""
    W = SCALING * B @ A
    rows, columns = ProjectedAdam(P, Q), ProjectedAdam(Q, P)
    for t, G in enumerate(grads, 1):
        onto_rows, onto_columns = torch.linalg.pinv(A) @ A, B @ torch.linalg.pinv(B)
        step_B, step_A = rows.advance(G, onto_rows, t), columns.advance(G.T, onto_columns, t).T
        W = (1 - LR * DECAY) * W - LR * (step_B if t % 2 else step_A)
        if t % 2:
            B = W @ torch.linalg.pinv(A) / SCALING
        else:
            A = torch.linalg.pinv(B) @ W / SCALING
        yield W


def test_the_weight_takes_adams_steps_seen_through_one_factor_at_a_time() -> None:
    A, B = factors()
    grads = weight_gradients(7)
    expected = reference(A.detach().clone(), B.detach().clone(), grads)
    optimizer = make([A, B], scaling=SCALING, delta=0.0, **OPTIONS)
    for t, ((a, b), W) in enumerate(zip(products_after_each_step(optimizer, grads), expected, strict=True)):
        assert_close(SCALING * b @ a, W, 1e-8, f"weight after step {t + 1}")


def test_at_full_rank_the_weight_moves_as_under_torch_adamw() -> None:
    A, B = factors((5, 5, 5))
    W = nn.Parameter((SCALING * B @ A).detach())
    peer = torch.optim.AdamW([W], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    optimizer = make([A, B], scaling=SCALING, delta=0.0, **OPTIONS)
    grads = weight_gradients(8, (5, 5))
    for t, ((a, b), G) in enumerate(zip(products_after_each_step(optimizer, grads), grads, strict=True)):
        W.grad = G
        peer.step()
        assert_close(SCALING * b @ a, W, 1e-7, f"weight after step {t + 1}")


def test_odd_steps_move_b_and_even_ones_a() -> None:
    A, B = factors()
    before = [A.detach().clone(), B.detach().clone()]
    optimizer = make([A, B], scaling=SCALING, **OPTIONS)
    for t, now in enumerate(products_after_each_step(optimizer, weight_gradients(4)), 1):
        moved = [not torch.equal(old, new) for old, new in zip(before, now, strict=True)]
        assert moved == ([False, True] if t % 2 else [True, False])
        before = list(now)


def test_from_a_zero_b_the_weight_moves_at_the_first_step_as_adam_in_the_row_space_of_a() -> None:
    A, B = factors()
    nn.init.zeros_(B)
    (G,) = weight_gradients(1)
    optimizer = make([A, B], scaling=SCALING, lr=LR, betas=BETAS, eps=EPS)
    ((a, b),) = products_after_each_step(optimizer, [G])
    onto_rows = torch.linalg.pinv(a) @ a
    seen = G @ onto_rows
    assert_close(SCALING * b @ a, -LR * seen / (seen.abs() + EPS) @ onto_rows, 1e-6)


def test_the_scaling_cancels() -> None:
    grads = weight_gradients(6)
    (A, B), (A2, B2) = factors(), factors()
    B2.data *= SCALING
    scaled = products_after_each_step(make([A, B], scaling=SCALING, delta=0.0, **OPTIONS), grads)
    plain = products_after_each_step(make([A2, B2], scaling=1.0, delta=0.0, **OPTIONS), grads)
    for (a, b), (a2, b2) in zip(scaled, plain, strict=True):
        assert_close(SCALING * b @ a, b2 @ a2, 1e-9)


def test_clipping_measures_the_projected_gradients_of_all_weights_together() -> None:
    def run(limit: float | None, factor: float) -> list[Tensor]:
        pairs = [factors(seed=seed) for seed in (3, 4)]
        optimizer = LoFT(
            [{"params": list(pair), "scaling": s} for pair, s in zip(pairs, (1.0, 2.0), strict=True)],
            max_grad_norm=limit,
            **OPTIONS,
        )
        for G in weight_gradients(1):
            for (A, B), s in zip(pairs, (1.0, 2.0), strict=True):
                A.grad, B.grad = (factor * grad for grad in backpropagated(A.detach(), B.detach(), G, s))
            optimizer.step()
        return [optimizer.state[B]["exp_avg_B"] for _, B in pairs]

    (G,) = weight_gradients(1)
    spans = [torch.linalg.pinv(A.detach()) @ A.detach() for A, _ in (factors(seed=3), factors(seed=4))]
    norm = float(sum((G @ span).square().sum() for span in spans) ** 0.5)  # step 1 moves B: seen through A
    limit = 0.4 * norm
    for clipped, expected in zip(run(limit, 1.0), run(None, limit / (norm + 1e-6)), strict=True):
        assert_close(clipped, expected, 1e-6)
    for untouched, expected in zip(run(2 * norm, 1.0), run(None, 1.0), strict=True):
        assert torch.equal(untouched, expected)


def test_the_state_is_momentum_products_and_both_factors() -> None:
    assert measured_state_bytes(make) == 4 * ((R**2 + 2 * R) * (P + Q) + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_has_the_same_bits(dtype: torch.dtype) -> None:
    def made(params: Any, **options: Any) -> LoFT:
        return make(params, **OPTIONS, **options)

    check_resume_has_the_same_bits(made, dtype)


def test_bfloat16_factors_are_the_float32_step_rounded() -> None:
    def made(params: Any, **options: Any) -> LoFT:
        return make(params, **OPTIONS, **options)

    check_bfloat16_rounds_float32(made)


def test_it_moves_the_pairs_of_a_peft_model() -> None:
    # A coarse eps: the gradients of autograd and of the formula differ by rounding, which Adam would blow up to signs.
    def made(params: Any, **options: Any) -> LoFT:
        return make(params, lr=0.1, eps=1e-2, **options)

    check_it_moves_the_pairs_of_a_peft_model(made)


def test_what_is_no_pair_or_out_of_range_is_refused() -> None:
    check_refusals(make)
    with pytest.raises(ValueError, match="max_grad_norm"):
        make(list(factors()), max_grad_norm=0.0)
