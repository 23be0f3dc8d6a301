"""What the steps of both regressions share: which matrices go together, and what is known of them. Imports triton."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
import triton.language as tl
from torch import Tensor

from lorapre.backends.batches import Bucket
from lorapre.backends.eager_muon import Hyperparameters
from lorapre.backends.triton import table
from lorapre.backends.triton.coefficients import coefficients
from lorapre.backends.triton.layout import Layouts, Work

#: Triton's names of torch's dtypes.
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def on_device_of(buckets: Sequence[Bucket]) -> AbstractContextManager[None]:
    """Kernels are launched on the device of ``buckets``."""
    device = buckets[0].params[0].device
    return nullcontext() if device.type == "cpu" else torch.accelerator.device_index(device.index)


def turns(
    buckets: Sequence[Bucket], scratch: Callable[[Bucket], int], limit_of: Callable[[int], int] | None = None
) -> Iterator[list[Bucket]]:
    """The buckets in parts whose scratch stays below the limit, or that are one parameter, which needs ``scratch``.

    ``limit_of`` the bytes of all weights is the limit, `lorapre.backends.triton.table.scratch_limit` unless given.
    """
    limit_of = limit_of or table.scratch_limit
    limit = limit_of(sum(bucket.weight_bytes for bucket in buckets))
    turn: list[Bucket] = []
    used = 0
    for bucket in buckets:
        each = scratch(bucket)
        start = 0
        while start < len(bucket.params):
            room = (limit - used) // each
            if room <= 0 and turn:
                yield turn
                turn, used = [], 0
                continue
            count = min(max(1, room), len(bucket.params) - start)
            turn.append(_part(bucket, start, start + count))
            used, start = used + count * each, start + count
    if turn:
        yield turn


def _part(bucket: Bucket, start: int, stop: int) -> Bucket:
    if (start, stop) == (0, len(bucket.params)):
        return bucket
    part = slice(start, stop)
    return replace(
        bucket,
        params=bucket.params[part],
        grads=bucket.grads[part],
        state={key: tensors[part] for key, tensors in bucket.state.items()},
        step=bucket.step[part] if isinstance(bucket.step, Tensor) else bucket.step,
        rounding=None if bucket.rounding is None else bucket.rounding.part(part),
    )


class Step:
    """One step of some buckets, of one device, one rank, one dtype each of weights, gradients and state, one rounding.

    Args:
        buckets: the matrices.
        hyper: the options.
        layouts: remembers addresses from step to step.
    """

    def __init__(self, buckets: Sequence[Bucket], hyper: Hyperparameters, layouts: Layouts) -> None:
        first = buckets[0]
        self.layouts = layouts
        self.seed = None if first.rounding is None else first.rounding.seed  # None rounds to nearest
        self.device, self.maximize = first.params[0].device, first.maximize
        self.W_dtype, self.G_dtype = first.params[0].dtype, first.grads[0].dtype
        self.S_dtype = first.state["m_B"][0].dtype
        self.matrices = layouts.matrices(buckets)
        self.n = self.matrices.n
        self.coefficients = coefficients(buckets, hyper, self.n, self.device)

    def _empty(self, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(numel, dtype=dtype, device=self.device)

    def _work(self, sizes: tuple[int, ...], block: int, chosen: tuple[bool, ...] = ()) -> Work:
        return self.layouts.work(sizes, block, self.device, chosen)

    def _kinds(self, sizes: tuple[int, ...], block: int) -> Iterator[tuple[tuple[int, int, int], Work]]:
        """The work of a pass, apart for each order of the numbers of W, of G and of a v in full."""
        for kind, chosen in self.matrices.by_kind:
            yield kind, self._work(sizes, block, chosen)
