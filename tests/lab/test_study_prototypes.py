"""The study's prototypes against the formulas that their docstrings name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorapre import LoRAPreAdamW

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from study.prototypes import MOST_GROWTH, FiraScaled

P, Q, RANK = 12, 20, 3


def gradients(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(P, Q, generator=generator, dtype=torch.float64) for _ in range(count)]


def stepped(kind: type[LoRAPreAdamW], grads: list[Tensor], **options: Any) -> tuple[list[Tensor], list[Any]]:
    """The updates of each step in units of the rate, and the state after each."""
    weight = nn.Parameter(torch.zeros(P, Q, dtype=torch.float64))
    optimizer = kind([weight], lr=1.0, rank=RANK, weight_decay=0.0, spectral_clipping=None, **options)
    updates, states = [], []
    for grad in grads:
        before, weight.grad = weight.detach().clone(), grad
        optimizer.step()
        updates.append(before - weight.detach())
        states.append({key: value.clone() for key, value in optimizer.state[weight].items()})
    return updates, states


def test_without_a_residual_fira_scaled_is_lorapre_adamw() -> None:
    ours, _ = stepped(LoRAPreAdamW, gradients(5), residual_gain=0.0, sweep_interval=1)
    theirs, _ = stepped(FiraScaled, gradients(5), residual_gain=0.0, sweep_interval=1)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gain", [1.0, 4.0])
@pytest.mark.parametrize("growth", [1.0, 5.0])
def test_fira_scales_the_residual_by_the_ratio_of_column_norms_and_limits_its_growth(
    gain: float, growth: float
) -> None:
    first, second = gradients(2)
    second = second * growth
    options = {"residual_gain": gain, "update_clipping": False, "eps": 0.0}
    with_residual, states = stepped(FiraScaled, [first, second], **options)
    without, _ = stepped(FiraScaled, [first, second], **{**options, "residual_gain": 0.0})
    _, initial = stepped(LoRAPreAdamW, [torch.zeros(P, Q, dtype=torch.float64)])
    norm = None
    for G, A, whole, tracked in zip(
        (first, second), (initial[0]["m_A"], states[0]["m_A"]), with_residual, without, strict=True
    ):
        inside = G @ A.mT @ A
        expected = (G - inside) * (tracked.norm(dim=0) / inside.norm(dim=0))
        if norm is not None and expected.norm() > MOST_GROWTH * norm:
            expected = expected * (MOST_GROWTH * norm / expected.norm())
        norm = expected.norm()
        torch.testing.assert_close(whole, (tracked + gain * expected) / gain, rtol=1e-5, atol=1e-6)
