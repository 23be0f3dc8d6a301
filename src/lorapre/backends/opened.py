"""A step between its first look at the gradients and its first change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Opened:
    """A step of some matrices that has changed nothing yet.

    Attributes:
        proceed: makes the changes, once; nothing changes where its argument, a 0-d bool tensor on any of the devices,
            is False. None is True.
        read: the parameters whose gradients have been read, each as often as it has matrices.
        squares: vectors, on their devices, of the sums of G^2 of these matrices in their order: inf or nan where a
            gradient is not finite, or where the sum is beyond float32.
        by_kernels: kernels take part, and the host is not to wait for them.
    """

    proceed: Callable[[Tensor | None], None]
    read: tuple[Tensor, ...] = ()
    squares: tuple[Tensor, ...] = ()
    by_kernels: bool = False
