"""LoRA-Pro against the two least-squares problems that define it, solved with pseudo-inverses in float64."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from _lora import (
    SCALING,
    P,
    Q,
    R,
    adapted,
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
from torch import Tensor

from _support import assert_close
from lorapre.lab.baselines.lora_pairs import lora_pair_groups
from lorapre.lab.baselines.lora_pro import LoRAPro

LR, DECAY, BETAS, EPS = 0.03, 0.2, (0.8, 0.9), 1e-6
OPTIONS: dict[str, Any] = {"lr": LR, "weight_decay": DECAY, "betas": BETAS, "eps": EPS}


def make(params: Any, **options: Any) -> LoRAPro:
    scaling = options.pop("scaling", None)
    groups = params if scaling is None else [{"params": params, "scaling": scaling}]
    return LoRAPro(groups, **options)


def equivalent(A: Tensor, B: Tensor, s: float) -> Tensor:
    """The matrix that takes (g_A, g_B), flattened and joined, to s B g_A + s g_B A, flattened."""
    p, q, r = B.shape[0], A.shape[1], A.shape[0]
    eye_p, eye_q = torch.eye(p, dtype=A.dtype), torch.eye(q, dtype=A.dtype)
    of_A, of_B = torch.kron(B, eye_q), torch.kron(eye_p, A.T.contiguous())
    assert of_A.shape == (p * q, r * q)
    return s * torch.cat([of_A, of_B], dim=1)


def defined(A: Tensor, B: Tensor, G: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """Of all (g_A, g_B) whose equivalent gradient is closest to G, those closest to LoRA's own gradients."""
    L = equivalent(A, B, s)
    own = torch.cat([g.flatten() for g in backpropagated(A, B, G, s)])
    z = own + torch.linalg.pinv(L) @ (G.flatten() - L @ own)
    return z[: A.numel()].reshape(A.shape), z[A.numel() :].reshape(B.shape)


def adam(g: Tensor, m: Tensor, v: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
    m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g**2
    return m / (1 - BETAS[0] ** t) / ((v / (1 - BETAS[1] ** t)) ** 0.5 + EPS), m, v


def factors_reference(A: Tensor, B: Tensor, grads: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    mA = vA = mB = vB = torch.zeros(())
    for t, G in enumerate(grads, 1):
        gA, gB = defined(A, B, G, SCALING)
        dA, mA, vA = adam(gA, mA, vA, t)
        dB, mB, vB = adam(gB, mB, vB, t)
        A, B = (1 - LR * DECAY) * A - LR * dA, (1 - LR * DECAY) * B - LR * dB
        yield A, B


def full_reference(A: Tensor, B: Tensor, grads: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    m = v = torch.zeros(())
    for t, G in enumerate(grads, 1):
        L = equivalent(A, B, SCALING)
        g = (L @ torch.linalg.pinv(L) @ G.flatten()).reshape(G.shape)
        step, m, v = adam(g, m, v, t)
        dA, dB = defined(A, B, step, SCALING)
        kept = (1 - LR * DECAY) ** 0.5
        A, B = kept * A - LR * dA, kept * B - LR * dB
        yield A, B


@pytest.mark.parametrize(("moments", "reference"), [("factors", factors_reference), ("full", full_reference)])
def test_each_step_is_adamw_of_the_gradients_that_the_paper_defines(moments: Any, reference: Any) -> None:
    A, B = factors()
    grads = weight_gradients(6)
    expected = reference(A.detach().clone(), B.detach().clone(), grads)
    optimizer = make([A, B], scaling=SCALING, moments=moments, delta=0.0, **OPTIONS)
    for t, (found, wanted) in enumerate(zip(products_after_each_step(optimizer, grads), expected, strict=True)):
        for name, value, reference_value in zip("AB", found, wanted, strict=True):
            assert_close(value, reference_value, 1e-8, f"{name} after step {t + 1}")


@pytest.mark.parametrize("moments", ["factors", "full"])
def test_from_a_zero_b_the_first_step_moves_b_alone(moments: Any) -> None:
    A, B = factors()
    before = A.detach().clone()
    torch.nn.init.zeros_(B)
    (G,) = weight_gradients(1)
    optimizer = make([A, B], scaling=SCALING, moments=moments, lr=LR, betas=BETAS, eps=EPS)
    ((a, b),) = products_after_each_step(optimizer, [G])
    assert torch.equal(a, before)
    # g_A is zero and so is X: B gets G A^+ / s, which under "full" is Adam's step of the gradient's row space.
    g = G @ torch.linalg.pinv(before) / SCALING
    if moments == "full":
        step = SCALING * g @ before
        expected = step / (step.abs() + EPS) @ torch.linalg.pinv(before) / SCALING
    else:
        expected = g / (g.abs() + EPS)
    assert_close(b, -LR * expected, 1e-6)


@pytest.mark.parametrize(
    ("moments", "numbers"), [("factors", 2 * R * (P + Q)), ("full", 2 * P * Q)], ids=["factors", "full"]
)
def test_the_state_has_the_size_of_adamws_on_the_factors_or_on_the_weight(moments: Any, numbers: int) -> None:
    assert measured_state_bytes(partial(make, moments=moments)) == 4 * (numbers + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments", ["factors", "full"])
def test_a_resumed_run_has_the_same_bits(moments: Any, dtype: torch.dtype) -> None:
    check_resume_has_the_same_bits(partial(make, moments=moments, **OPTIONS), dtype)


@pytest.mark.parametrize("moments", ["factors", "full"])
def test_bfloat16_factors_are_the_float32_step_rounded(moments: Any) -> None:
    check_bfloat16_rounds_float32(partial(make, moments=moments, **OPTIONS))


@pytest.mark.parametrize("moments", ["factors", "full"])
def test_it_moves_the_pairs_of_a_peft_model(moments: Any) -> None:
    # A coarse eps: the gradients of autograd and of the formula differ by rounding, which Adam would blow up to signs.
    check_it_moves_the_pairs_of_a_peft_model(partial(make, moments=moments, lr=0.1, eps=1e-2))


def test_what_is_no_pair_or_out_of_range_is_refused() -> None:
    check_refusals(make)
    with pytest.raises(ValueError, match="moments"):
        make(list(factors()), moments="some")
    with pytest.raises(ValueError, match="below 1"):
        make(list(factors()), moments="full", lr=1.0, weight_decay=2.0)


def test_groups_have_the_scaling_of_their_adapters() -> None:
    groups = lora_pair_groups(adapted(rank_pattern={"narrow": 4}))
    assert [(group["scaling"], len(group["params"])) for group in groups] == [(4.0, 2), (2.0, 2)]
    stable = lora_pair_groups(adapted(use_rslora=True))
    assert [group["scaling"] for group in stable] == [pytest.approx(8 / 2**0.5)]
    names = [name for name, _ in stable[0]["params"]]
    assert names == [
        f"base_model.model.{layer}.lora_{side}.default.weight" for layer in ("wide", "narrow") for side in "AB"
    ]


def test_adapters_that_are_no_product_of_two_trained_factors_are_refused() -> None:
    with pytest.raises(ValueError, match="no trained LoRA pair"):
        lora_pair_groups(adapted(), adapter="other")
    with pytest.raises(ValueError, match="use_dora"):
        lora_pair_groups(adapted(use_dora=True))
    model = adapted()
    model.base_model.model.wide.lora_A["default"].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="only one of the two"):
        lora_pair_groups(model)
