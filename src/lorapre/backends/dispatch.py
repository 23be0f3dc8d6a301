"""Which backend steps which bucket."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, TypeAlias

from lorapre.backends import eager, triton
from lorapre.backends.batches import Bucket
from lorapre.backends.eager import AdamHyperparameters
from lorapre.backends.triton import Layouts

Backend: TypeAlias = Literal["auto", "eager", "triton"]

#: What "auto" steps by the kernels: types of devices, each with the largest rank at which a measurement has shown them
#: ahead of batched torch (benchmarks/step_time). None has yet, and so "auto" is batched torch everywhere.
MEASURED: dict[str, int] = {}

_logger = logging.getLogger(__name__)
_said: set[str] = set()


def lorapre_adamw(buckets: Sequence[Bucket], hyper: AdamHyperparameters, backend: Backend, layouts: Layouts) -> None:
    """One step of LoRA-Pre Adam for some buckets of matrices, in place, by the kernels or by batched torch.

    Args:
        buckets: the matrices, on one device.
        hyper: the options.
        backend: "auto" takes the kernels where `MEASURED` says so and they can step the bucket, and logs the reason
            once where they cannot.
        layouts: of the kernels, kept from step to step.

    Raises:
        ValueError: ``backend`` is "triton", and the kernels cannot step one of the buckets. Nothing has changed then.
    """
    by_kernels, in_torch = [], []
    for bucket in buckets:
        if backend == "eager" or (backend == "auto" and not _measured(bucket)):
            in_torch.append(bucket)
            continue
        reason = triton.supports(bucket, hyper)
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
    if by_kernels:
        triton.lorapre_adamw(by_kernels, hyper, layouts)
    for bucket in in_torch:
        eager.lorapre_adamw(bucket, hyper)


def _measured(bucket: Bucket) -> bool:
    return bucket.view.rank <= MEASURED.get(bucket.params[0].device.type, 0)


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        _logger.info(message)
