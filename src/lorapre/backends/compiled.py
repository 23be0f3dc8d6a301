"""Batched torch whose element-wise passes torch.compile fuses: three functions, compiled once for all shapes."""

from __future__ import annotations

import functools

import torch

from lorapre.backends import eager
from lorapre.backends.batches import Bucket
from lorapre.backends.eager import AdamHyperparameters, Passes


def lorapre_adamw(bucket: Bucket, hyper: AdamHyperparameters) -> None:
    """`eager.lorapre_adamw` with compiled passes. `prepare` comes before it."""
    eager.lorapre_adamw(bucket, hyper, _passes())


@functools.cache
def _passes() -> Passes:
    return Passes(
        torch.compile(eager.rank1_roots, dynamic=True),
        torch.compile(eager.roots, dynamic=True),
        torch.compile(eager.divide, dynamic=True),
    )


@functools.cache
def prepare(device: torch.device) -> None:
    """See that torch can compile for ``device``, before anything is changed.

    Raises:
        RuntimeError: it cannot, for want of a compiler for instance.
    """
    try:
        v = torch.ones(2, 3, 4, device=device)
        _passes().roots(v, v.clone(), True, torch.empty_like(v))
    except Exception as error:  # torch's own exceptions differ by version and by what is missing
        raise RuntimeError(
            f"backend='compiled': torch.compile fails on {device}, where it needs a compiler (C++ on a CPU, Triton on "
            f"a GPU): {error}. Use backend='eager'."
        ) from error
