"""Where matrices of several shapes lie: one table on the device for all of them, kept while they stay in place.

Grids are lists of work, (matrix, tile) for each program, so that one launch serves every shape of a model.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from lorapre.backends.batches import Bucket
from lorapre.routing import MatrixView

T = TypeVar("T")

#: Columns of the table of matrices (n, COLUMNS), int64: addresses of W, G, m_B, m_A, v_row and v_col; sizes; strides
#: in numbers; where the matrix begins in scratch of a left factor (r, p up to a multiple of 16), a right one (r, q),
#: rows (p) and columns (q) a matrix; its number in its parameter, and the parameter's stream (both for stochastic
#: rounding alone); strides of a v in full; where it begins in scratch of q up to a multiple of 16 a matrix.
(W, G, B, A, V_ROW, V_COL, P, Q, W_ROW, W_COL, G_ROW, G_COL, LEFT, RIGHT, ROWS, COLS, NUMBER, STREAM) = range(18)
(FULL_ROW, FULL_COL, LINES) = range(18, 21)
COLUMNS = 21

#: Which numbers of a matrix are neighbours, and whether 16 bytes of them may be read at once; see `Place.order`.
STRIDED, ROWS_ALIGNED, COLUMNS_ALIGNED, IN_ROWS, IN_COLUMNS = range(5)

#: State in the order of its addresses in the table; v's two factors take the place of its row and column means, and v
#: in full takes both. So does the one average of Muon's updates, and m_A where there is none: nobody reads it there.
STATE = ("m_B", "m_A", "v_row", "v_col")
FACTORS = ("m_B", "m_A", "v_B", "v_A")
ALONE = ("exp_avg_sq", "u_row", "u_col", "m_A")


@dataclass(frozen=True)
class Place:
    """How the tensors of one list hold their matrices: element (i, j) of matrix k is at k batch + i row + j col."""

    batch: int
    row: int
    col: int

    def order(self, view: MatrixView, bases_aligned: bool) -> int:
        """What the kernels may take for granted: `ROWS_ALIGNED`, `COLUMNS_ALIGNED`, `IN_ROWS`, `IN_COLUMNS`, `STRIDED`.

        Aligned are matrices that begin at a multiple of 16 bytes, and whose rows, or columns, are a multiple of 8
        numbers long and apart: the kernels round lengths and strides down to that (`elements.whole`).
        """
        if self.col == 1:
            return ROWS_ALIGNED if bases_aligned and self.row % 8 == 0 and view.q % 8 == 0 else IN_ROWS
        if self.row == 1:
            return COLUMNS_ALIGNED if bases_aligned and self.col % 8 == 0 and view.p % 8 == 0 else IN_COLUMNS
        return STRIDED


def place_of(tensors: Sequence[Tensor], view: MatrixView) -> Place | None:
    """The strides that all ``tensors`` share as (batch, p, q), or None: they differ, or no strides describe it."""
    if len(set(map(Tensor.stride, tensors))) > 1:
        return None
    try:
        return Place(*tensors[0].view(view.batch, view.p, view.q).stride())
    except RuntimeError:
        return None


@dataclass(frozen=True)
class Matrices:
    """The matrices of some buckets, in their order.

    Attributes:
        table: (n, COLUMNS), int64, on the device.
        p: of each matrix.
        q: of each matrix.
        kinds: of each matrix, `Place.order` of its W, of its G and of a v in full (`STRIDED` where there is none):
            launches that read them differ by these.
        left: numbers of scratch for all left factors.
        right: for all right ones.
        wide: of scratch of q up to a multiple of 16 a matrix.
        aligned: each m_A begins at a multiple of 16 bytes, and its lines are a multiple of 8 numbers long.
        left_aligned: each m_B begins at a multiple of 16 bytes.
    """

    table: Tensor
    p: tuple[int, ...]
    q: tuple[int, ...]
    kinds: tuple[tuple[int, int, int], ...]
    left: int
    right: int
    wide: int
    aligned: bool
    left_aligned: bool

    @property
    def n(self) -> int:
        return len(self.p)

    @cached_property
    def by_kind(self) -> tuple[tuple[tuple[int, int, int], tuple[bool, ...]], ...]:
        """The different ``kinds``, each with which matrices are of it: none is said where that is all of them."""
        kinds = sorted(set(self.kinds))
        return tuple((kind, tuple(one == kind for one in self.kinds) if len(kinds) > 1 else ()) for kind in kinds)


@dataclass(frozen=True)
class Work:
    """Tiles of some side of all matrices.

    Attributes:
        items: (programs, 2), int32: matrix and tile of each program.
        starts: (n + 1), int32: how many tiles the matrices before this one have.
        programs: their number.
        tiles: of all matrices, of which ``items`` may hold a part.
    """

    items: Tensor
    starts: Tensor
    programs: int
    tiles: int

    def part(self, counts: Sequence[int], at: slice) -> Work:
        """The same of the matrices ``at`` alone, of all of which ``counts`` are the tiles."""
        first, programs = sum(counts[: at.start]), sum(counts[at])
        return Work(self.items[first : first + programs], self.starts, programs, self.tiles)


class Layouts:
    """Tables and work lists by what they say, at most ``limit`` of them, the least recently used dropped first.

    One that a CUDA graph reads is never dropped, since the graph reads it again at each replay. They stay out of
    copies and pickles: addresses mean nothing elsewhere.
    """

    def __init__(self, limit: int = 256) -> None:
        self.limit = limit
        self._made: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._captured: dict[tuple[Any, ...], Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Layouts, (self.limit,)

    def __len__(self) -> int:
        return len(self._made) + len(self._captured)

    def matrices(self, buckets: Sequence[Bucket]) -> Matrices:
        """The table of all matrices of ``buckets``, which are on one device, of one rank and of one dtype each.

        `lorapre.backends.triton.supports` has said that dtype and strides of a bucket's first tensors are those of all.
        """
        addresses = tuple(
            tuple(
                tuple(map(Tensor.data_ptr, tensors))
                for tensors in (bucket.params, bucket.grads, *(bucket.state[key] for key in state_of(bucket)))
            )
            for bucket in buckets
        )
        shapes = tuple((bucket.view, _streams(bucket), _forms(bucket), _numels(bucket)) for bucket in buckets)
        device = buckets[0].params[0].device
        return self._kept(("matrices", device, shapes, addresses), device, lambda: _matrices(buckets, addresses))

    def work(self, sizes: tuple[int, ...], block: int, device: torch.device, chosen: tuple[bool, ...] = ()) -> Work:
        """Tiles of ``block`` along a side that is ``sizes`` long; of the ``chosen`` matrices alone, if any is said."""
        return self._kept(("work", device, sizes, block, chosen), device, lambda: _work(sizes, block, device, chosen))

    def _kept(self, key: tuple[Any, ...], device: torch.device, make: Callable[[], T]) -> T:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # What is made here is written when the graph is replayed, not before: no other step may read it.
            found: T | None = self._made.get(key, self._captured.get(key))
            if found is None:
                found = self._captured[key] = make()
            return found
        # Out and in again, as the latest: a key of all addresses is not to be compared more often than once.
        found = self._made.pop(key, None)
        self._made[key] = kept = make() if found is None else found
        if len(self._made) > self.limit:
            self._made.popitem(last=False)
        return kept


def state_of(bucket: Bucket) -> tuple[str, ...]:
    """The keys of a bucket's state in the table's order."""
    for keys in (STATE, FACTORS):
        if keys[-1] in bucket.state:
            return keys
    key = next(key for key in ALONE if key in bucket.state)
    return "m_B", "m_A", key, key


def _numels(bucket: Bucket) -> tuple[int, ...]:
    """Numbers of each kind of state that one matrix has."""
    return tuple(bucket.state[key][0].numel() // bucket.view.batch for key in state_of(bucket))


def _streams(bucket: Bucket) -> tuple[int, ...]:
    """Of stochastic rounding, one for each parameter; zeros where nothing is drawn."""
    return (0,) * len(bucket.params) if bucket.rounding is None else bucket.rounding.streams


def _with_strides(bucket: Bucket) -> list[list[Tensor]]:
    """Weights, gradients and a v in full, if there is one; all else is contiguous."""
    return [bucket.params, bucket.grads, *(tensors for key, tensors in bucket.state.items() if key == "exp_avg_sq")]


def _forms(bucket: Bucket) -> tuple[tuple[torch.dtype, tuple[int, ...]], ...]:
    """What the table's distances and strides come from; the dtypes of a state are one."""
    return tuple((tensors[0].dtype, tensors[0].stride()) for tensors in (*_with_strides(bucket), bucket.state["m_B"]))


def _places(bucket: Bucket) -> list[Place]:
    places = []
    for tensors in _with_strides(bucket):
        place = place_of(tensors, bucket.view)
        if place is None:
            raise ValueError("weights, gradients or second moments are no matrices of one place")
        places.append(place)
    return places


def _matrices(buckets: Sequence[Bucket], addresses: Sequence[Sequence[Sequence[int]]]) -> Matrices:
    rows: list[list[int]] = []
    kinds: list[tuple[int, int, int]] = []
    left = right = above = before = wide = 0
    right_aligned = left_aligned = True
    for bucket, lists in zip(buckets, addresses, strict=True):
        view = bucket.view
        p, q, r = view.p, view.q, view.rank
        places = _places(bucket)
        sizes = [bucket.params[0].element_size(), bucket.grads[0].element_size()]
        steps = [place.batch * size for place, size in zip(places[:2], sizes, strict=True)]
        steps += [numel * bucket.state[STATE[0]][0].element_size() for numel in _numels(bucket)]
        if len(places) > 2:
            steps[V_ROW] = steps[V_COL] = places[2].batch * bucket.state["exp_avg_sq"][0].element_size()
        aligned = [
            all((base + step * (view.batch > 1)) % 16 == 0 for base in bases)
            for bases, step in zip(lists, steps, strict=True)
        ]
        right_aligned = right_aligned and aligned[A] and q % 8 == 0
        left_aligned = left_aligned and aligned[B]
        kind = (
            places[0].order(view, aligned[0] and all(aligned[2:])),
            places[1].order(view, aligned[1] and all(aligned[2:])),
            places[2].order(view, all(aligned[2:])) if len(places) > 2 else STRIDED,
        )
        strides = [places[0].row, places[0].col, places[1].row, places[1].col]
        full = [places[2].row, places[2].col] if len(places) > 2 else [0, 0]
        for *bases, stream in zip(*lists, _streams(bucket), strict=True):
            for i in range(view.batch):
                where = [base + i * step for base, step in zip(bases, steps, strict=True)]
                rows.append([*where, p, q, *strides, left, right, above, before, i, stream, *full, wide])
                kinds.append(kind)
                left, right = left + r * lines(p), right + lines(r * q)
                above, before, wide = above + p, before + q, wide + lines(q)
    table = _sent(torch.tensor(rows, dtype=torch.int64), buckets[0].params[0].device)
    sides = tuple(row[P] for row in rows), tuple(row[Q] for row in rows)
    return Matrices(table, *sides, tuple(kinds), left, right, wide, right_aligned, left_aligned)


def lines(numel: int) -> int:
    """``numel`` up to a multiple of 16, where what begins behind it is aligned."""
    return -(-numel // 16) * 16


def _work(sizes: tuple[int, ...], block: int, device: torch.device, chosen: tuple[bool, ...]) -> Work:
    counts = torch.tensor([math.ceil(size / block) for size in sizes])
    starts = torch.zeros(len(sizes) + 1, dtype=torch.int64)
    torch.cumsum(counts, dim=0, out=starts[1:])
    made = counts * torch.tensor(chosen) if chosen else counts
    matrix = torch.repeat_interleave(torch.arange(len(sizes)), made)
    tile = torch.arange(len(matrix)) - (torch.cumsum(made, dim=0) - made)[matrix]
    items = torch.stack([matrix, tile], dim=1).to(torch.int32)
    return Work(_sent(items, device), _sent(starts.to(torch.int32), device), len(items), int(starts[-1]))


def _sent(host: Tensor, device: torch.device) -> Tensor:
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
