"""Which backend steps which bucket."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lorapre.backends import eager, eager_muon, triton
from lorapre.backends.batches import Bucket
from lorapre.backends.eager_muon import Hyperparameters, MuonHyperparameters
from lorapre.backends.opened import Opened
from lorapre.backends.triton import Layouts

Backend: TypeAlias = Literal["auto", "eager", "triton"]

#: What "auto" steps by the kernels, under Adam, under Adam with the paper's regression and under Muon: platforms, each
#: with the largest rank at which a measurement has shown them ahead of batched torch (benchmarks/step_time). On an
#: H100, Llama-1B's matrices in float32: Adam at r = 64 in 12 ms instead of 131, at 512 in 114 instead of 370, Muon at
#: r = 128 in 138 instead of 446. "cuda" is NVIDIA's alone; AMD's is "hip" here, which nobody has measured.
MEASURED: dict[Literal["adamw", "newton", "muon"], dict[str, int]] = {
    "adamw": {"cuda": 512},
    "newton": {"cuda": 128},
    "muon": {"cuda": 128},
}

_logger = logging.getLogger(__name__)
_said: set[str] = set()


@dataclass(frozen=True)
class Job:
    """Buckets on one device, their options, and who is to step them.

    ``backend`` "auto" takes the kernels where `MEASURED` says so and they can step the bucket, and logs the reason once
    where they cannot.
    """

    buckets: Sequence[Bucket]
    hyper: Hyperparameters
    backend: Backend


def open_step(jobs: Sequence[Job], layouts: Layouts) -> Opened:
    """Begin one step of LoRA-Pre Adam or Muon for all matrices of an optimizer, by the kernels or by batched torch.

    Args:
        jobs: the matrices.
        layouts: of the kernels, kept from step to step.

    Raises:
        ValueError: ``backend`` is "triton", and the kernels cannot step one of the buckets. Nothing has changed then.
    """
    parted = [(job, *_parted(job)) for job in jobs]
    work = [(by_kernels, job.hyper) for job, by_kernels, _ in parted if by_kernels]
    opened = triton.open_step(work, layouts, supported=True) if work else None

    def proceed(enabled: Tensor | None) -> None:
        if opened is not None:
            opened.proceed(enabled)
        for job, _, in_torch in parted:
            for bucket in in_torch:
                _step_in_torch(bucket.where(enabled), job.hyper)

    return Opened(proceed) if opened is None else replace(opened, proceed=proceed)


def _step_in_torch(bucket: Bucket, hyper: Hyperparameters) -> None:
    if isinstance(hyper, MuonHyperparameters):
        eager_muon.lorapre_muon(bucket, hyper)
    else:
        eager.lorapre_adamw(bucket, hyper)


def _parted(job: Job) -> tuple[list[Bucket], list[Bucket]]:
    """The buckets for the kernels, and those for batched torch."""
    by_kernels, in_torch = [], []
    for bucket in job.buckets:
        backend = job.backend
        if backend == "auto":
            rank, most = bucket.view.rank, _most_measured(job.hyper, bucket.params[0].device.type)
            if rank > most:
                backend = "eager"
                if most:
                    _say_once(
                        f"Matrices at rank {rank} are stepped in plain torch: up to rank {most} the kernels were "
                        "measured to be ahead of it here. backend='triton' takes them nevertheless."
                    )
        if backend == "eager":
            in_torch.append(bucket)
            continue
        reason = triton.supports(bucket, job.hyper)
        if reason is None:
            by_kernels.append(bucket)
        elif backend == "triton":
            raise ValueError(
                f"backend='triton' cannot step matrices of shape {tuple(bucket.params[0].shape)}: {reason}. Use "
                "backend='auto', which steps such matrices in plain torch."
            )
        else:
            _say_once(f"Matrices of shape {tuple(bucket.params[0].shape)} are stepped in plain torch: {reason}.")
            in_torch.append(bucket)
    return by_kernels, in_torch


def foreseen(bucket: Bucket, hyper: Hyperparameters, backend: Backend, device_type: str) -> bool:
    """Whether the kernels will step such a bucket, of plain tensors, on such a device, which need not be here."""
    if backend == "auto":
        measured = triton.installed() and bucket.view.rank <= _most_measured(hyper, device_type)
        return measured and triton.unsupported_option(bucket, hyper) is None
    return backend == "triton"


def _most_measured(hyper: Hyperparameters, device_type: str) -> int:
    """The largest rank that "auto" leaves to the kernels there; 0 for none."""
    by_newton = hyper.regressor.regression == "newton"
    largest = MEASURED["muon" if isinstance(hyper, MuonHyperparameters) else "newton" if by_newton else "adamw"]
    platform = "hip" if device_type == "cuda" and torch.version.hip is not None else device_type
    return largest.get(platform, 0)


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        _logger.info(message)
