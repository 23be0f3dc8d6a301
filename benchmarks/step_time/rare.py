"""Steps that do more once in a while: GaLore's and Fira's SVD, APOLLO's new projection, shared out over `GAP` steps.

A full SVD of every matrix of a large model takes minutes, and time does not depend on values. So the plain steps are
taken with projections that nobody computed, and the rare step on some layers alone, whose time is multiplied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor
from torch.optim import Optimizer

from lorapre.lab.optimizers.hybrid import parts_of
from step_time.clock import each_step, middle
from step_time.contestants import GAP, Contestant
from step_time.weights import Matrices


@dataclass(frozen=True)
class Amortised:
    """A mean step.

    Attributes:
        plain_ms: a step without the rare work.
        rare_ms: what a step with it takes more, for all layers.
    """

    plain_ms: float
    rare_ms: float

    @property
    def share_ms(self) -> float:
        """The rare work's share of every step."""
        return self.rare_ms / GAP

    @property
    def step_ms(self) -> float:
        """Mean over `GAP` steps."""
        return self.plain_ms + self.share_ms


def extrapolated(with_ms: float, without_ms: float, measured: int, layers: int) -> float:
    """Rare work of ``layers`` layers, of which ``measured`` took ``with_ms`` with it and ``without_ms`` without."""
    return max(0.0, with_ms - without_ms) * layers / measured


@contextlib.contextmanager
def without_svd() -> Iterator[None]:
    """``torch.linalg.svd`` gives random factors of the right shapes at once."""

    def stand_in(matrix: Tensor, full_matrices: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        (p, q), k = matrix.shape, min(matrix.shape)
        left, right = (p, q) if full_matrices else (k, k)
        return matrix.new_empty(p, left).normal_(), matrix.new_ones(k), matrix.new_empty(right, q).normal_()

    with patch.object(torch.linalg, "svd", stand_in):
        yield


def make_rare_now(optimizer: Optimizer) -> None:
    """Set all counters so that the next step is one with the rare work.

    Raises:
        RuntimeError: there are no such counters.
    """
    states = [state for part in parts_of(optimizer) for state in part.state.values() if "projector" in state]
    if not states:
        raise RuntimeError(f"{type(optimizer).__name__} has no state with a projector")
    for state in states:
        state["step"] = GAP


def rare_ms(
    contestant: Contestant,
    rank: int | None,
    *,
    model: str,
    layers: int,
    measured: int,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """What a step with the rare work takes more for ``layers`` layers, measured on ``measured`` of them."""
    module = Matrices(model, measured, dtype, device)
    optimizer = contestant.make(module, rank)
    with without_svd():
        without = middle([each_step(optimizer.step, 3, device)])
    torch.linalg.svd(torch.randn(64, 64, device=device), full_matrices=False)  # the library's handles
    for _ in range(2 if contestant.rare == "projection" else 1):  # a cheap one is taken twice: the first is warming up
        make_rare_now(optimizer)
        found = _one(optimizer, device)
    return extrapolated(found, without, measured, layers)


def _one(optimizer: Optimizer, device: torch.device) -> float:
    """Milliseconds of the very next step."""
    first = True

    def step() -> None:
        nonlocal first
        if not first:  # the step that is not timed is left out: it would take the rare work away
            optimizer.step()
        first = False

    return each_step(step, 1, device)[0]
