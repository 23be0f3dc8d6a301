"""Which backend steps a bucket."""

from __future__ import annotations

import logging
from typing import Literal, TypeAlias

from lorapre.backends import eager, triton
from lorapre.backends.batches import Bucket
from lorapre.backends.eager import AdamHyperparameters
from lorapre.backends.triton import Pointers

Backend: TypeAlias = Literal["auto", "eager", "triton"]

_logger = logging.getLogger(__name__)
_said: set[str] = set()


def lorapre_adamw(bucket: Bucket, hyper: AdamHyperparameters, backend: Backend, pointers: Pointers) -> None:
    """One step of LoRA-Pre Adam for a bucket of matrices, in place, by the kernels or by batched torch.

    Args:
        bucket: the matrices.
        hyper: the options.
        backend: "auto" takes the kernels on a GPU wherever they can step the bucket, and logs the reason once where
            they cannot.
        pointers: of the kernels, kept from step to step.

    Raises:
        ValueError: ``backend`` is "triton", and the kernels cannot step this bucket.
    """
    if backend == "eager" or (backend == "auto" and not _on_gpu(bucket)):
        eager.lorapre_adamw(bucket, hyper)
        return
    reason = triton.supports(bucket, hyper)
    if reason is None:
        triton.lorapre_adamw(bucket, hyper, pointers)
    elif backend == "triton":
        raise ValueError(
            f"backend='triton' cannot step matrices of shape {tuple(bucket.params[0].shape)}: {reason}. Use "
            "backend='auto', which steps such matrices in plain torch."
        )
    else:
        _say_once(f"Matrices of shape {tuple(bucket.params[0].shape)} are stepped in plain torch: {reason}.")
        eager.lorapre_adamw(bucket, hyper)


def _on_gpu(bucket: Bucket) -> bool:
    return bucket.params[0].device.type != "cpu"


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        _logger.info(message)
