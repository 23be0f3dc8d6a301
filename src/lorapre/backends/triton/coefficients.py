"""The numbers of a step, one row a matrix, on the device. Imports triton."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorapre import factors
from lorapre.backends.batches import Bucket
from lorapre.backends.eager import AdamHyperparameters
from lorapre.backends.eager_muon import Hyperparameters, MuonHyperparameters
from lorapre.backends.triton import elements
from lorapre.factors import BiasCorrection, Coefficient


@dataclass(frozen=True)
class _Weights:
    """The numbers of one step, in the order of the columns of the coefficients after the first."""

    keep: Coefficient
    cross: Coefficient
    outside: Coefficient
    v_scale: Coefficient
    rate: Coefficient
    decay: Coefficient
    step: Coefficient

    @classmethod
    def of(cls, hyper: Hyperparameters, step: Coefficient, *, factored_v: bool) -> _Weights:
        if isinstance(hyper, MuonHyperparameters):
            return cls._of_sum(hyper, step)
        return cls._of_average(hyper, step, factored_v=factored_v)

    @classmethod
    def _of_average(cls, hyper: AdamHyperparameters, step: Coefficient, *, factored_v: bool) -> _Weights:
        mode: BiasCorrection = hyper.bias_correction if factored_v else "paper"  # only a square lags behind
        keep, inside, outside = factors.average_weights(hyper.beta1, hyper.residual_gain, step)
        return cls(
            keep=keep,
            cross=inside - outside,
            outside=outside,
            v_scale=1.0 / factors.second_moment_correction(hyper.beta2, step, mode),
            rate=hyper.lr * hyper.scale,
            decay=1.0 - hyper.lr * hyper.weight_decay,
            step=step,
        )

    @classmethod
    def _of_sum(cls, hyper: MuonHyperparameters, step: Coefficient) -> _Weights:
        keep, inside, outside = factors.sum_weights(hyper.mu, hyper.nesterov, hyper.residual_gain)
        return cls(
            keep=keep,
            cross=inside - outside,
            outside=outside,
            v_scale=1.0,  # there is no v
            rate=hyper.lr * hyper.scale,
            decay=1.0 - hyper.lr * hyper.weight_decay,
            step=step,
        )

    def columns(self) -> tuple[Coefficient, ...]:
        return self.keep, self.cross, self.outside, self.v_scale, self.rate, self.decay, self.step


def coefficients(buckets: Sequence[Bucket], hyper: Hyperparameters, n: int, device: torch.device) -> Tensor:
    """The (n, 8) table of `lorapre.backends.triton.elements`; neither direction waits between host and device."""
    out = torch.empty((n, elements.COLUMNS), dtype=torch.float32, device=device)
    step, enabled = buckets[0].step, buckets[0].enabled
    if isinstance(step, Tensor):
        step = torch.cat([_each(bucket) for bucket in buckets])
    columns = _Weights.of(hyper, step, factored_v="v_B" in buckets[0].state).columns()
    numbers = [column for column in columns if not isinstance(column, Tensor)]
    if len(numbers) == len(columns):
        masked = enabled is not None
        elements.fill[(math.ceil(n / 128),)](
            out, enabled.view(torch.uint8) if enabled is not None else out, *numbers, n, MASKED=masked
        )
        return out
    for place, value in enumerate((1.0 if enabled is None else enabled, *columns)):
        if isinstance(value, Tensor):
            out.select(1, place).copy_(value)
        else:
            out.select(1, place).fill_(value)
    return out


def _each(bucket: Bucket) -> Tensor:
    """The step of each matrix of a bucket whose counters are on the device."""
    assert isinstance(bucket.step, Tensor)
    step = bucket.step.double()
    return step if bucket.view.batch == 1 else step.repeat_interleave(bucket.view.batch)
