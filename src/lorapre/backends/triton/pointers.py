"""Where the matrices of a bucket are: tables of addresses on the device, kept while the tensors stay in place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorapre.routing import MatrixView


@dataclass(frozen=True)
class Place:
    """How the tensors of one list hold their matrices: element (i, j) of matrix k is at k batch + i row + j col."""

    batch: int
    row: int
    col: int

    def alignment(self, itemsize: int, bases_aligned: bool) -> int:
        """1 where every row of every matrix starts at a multiple of 16 bytes, 2 where every column does, else 0."""
        if not bases_aligned:
            return 0
        if self.col == 1:
            return 1 if self.row * itemsize % 16 == 0 else 0
        return 2 if self.row == 1 and self.col * itemsize % 16 == 0 else 0


def place_of(tensors: Sequence[Tensor], view: MatrixView) -> Place | None:
    """The strides that all ``tensors`` share as (batch, p, q), or None: they differ, or no strides describe it."""
    strides = tensors[0].stride()
    if any(tensor.stride() != strides for tensor in tensors):
        return None
    try:
        return Place(*tensors[0].view(view.batch, view.p, view.q).stride())
    except RuntimeError:
        return None


@dataclass(frozen=True)
class Addresses:
    """``table`` (k, n), int64, on the device: the address of every matrix, one row a list of tensors.

    ``aligned`` says of each list whether all of its addresses are multiples of 16.
    """

    table: Tensor
    aligned: tuple[bool, ...]
    host: Tensor


class Pointers:
    """Tables of addresses by what they hold, at most ``limit`` of them, the least recently used dropped first.

    A table that a CUDA graph reads is never dropped, since the graph reads it again at each replay. Tables stay
    out of copies and pickles: addresses mean nothing elsewhere.
    """

    def __init__(self, limit: int = 64) -> None:
        self.limit = limit
        self._tables: OrderedDict[tuple[Any, ...], Addresses] = OrderedDict()
        self._captured: dict[tuple[Any, ...], Addresses] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Pointers, (self.limit,)

    def __len__(self) -> int:
        return len(self._tables) + len(self._captured)

    def table(self, lists: Sequence[Sequence[Tensor]], strides: Sequence[int], batch: int) -> Addresses:
        """The addresses of all matrices: each tensor of ``lists[i]`` is ``batch`` of them, ``strides[i]`` bytes apart.

        The tensors are on one device. Nothing is copied to it while they stay where they are.
        """
        bases = tuple(tuple(tensor.data_ptr() for tensor in tensors) for tensors in lists)
        device = lists[0][0].device
        key = (device, batch, tuple(strides) if batch > 1 else (), bases)
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        found = self._tables.get(key)
        if capturing:
            # A table made here is written when the graph is replayed, not before: no other step may read it.
            found = found or self._captured.get(key) or self._upload(bases, strides, batch, device)
            self._captured[key] = found
            return found
        if found is None:
            found = self._tables[key] = self._upload(bases, strides, batch, device)
            if len(self._tables) > self.limit:
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        return found

    @staticmethod
    def _upload(
        bases: tuple[tuple[int, ...], ...], strides: Sequence[int], batch: int, device: torch.device
    ) -> Addresses:
        rows = [
            [base + i * stride for base in row for i in range(batch)]
            for row, stride in zip(bases, strides, strict=True)
        ]
        aligned = tuple(all(address % 16 == 0 for address in row) for row in rows)
        host = torch.tensor(rows, dtype=torch.int64)
        if device.type != "cpu":
            host = host.pin_memory()
        return Addresses(host.to(device, non_blocking=True), aligned, host)
