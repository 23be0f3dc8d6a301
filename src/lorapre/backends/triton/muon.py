"""The step of Muon: what is launched, with Newton-Schulz by torch between the kernels. Imports triton."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from lorapre import factors
from lorapre.backends import rounding
from lorapre.backends.batches import Bucket
from lorapre.backends.eager_muon import MuonHyperparameters, shape_factor
from lorapre.backends.triton import muon_pass, table
from lorapre.backends.triton.layout import Layouts
from lorapre.backends.triton.step import TYPES
from lorapre.backends.triton.subspace_step import SubspaceStep
from lorapre.orthogonal import quintic


@dataclass(frozen=True)
class _Batch:
    """Matrices of one shape, one order of their numbers and one kind of average, behind each other in the table.

    Attributes:
        first: the first one.
        count: how many.
        p: rows.
        q: columns.
        orders: of the numbers of W and of G.
        key: of the state's average, None where updates are not normalised.
    """

    first: int
    count: int
    p: int
    q: int
    orders: tuple[int, int]
    key: str | None

    @property
    def numel(self) -> int:
        """Numbers of scratch of all its momenta."""
        return self.count * table.eights(self.p) * table.eights(self.q)


class MuonStep(SubspaceStep):
    """One step of LoRA-Pre Muon, equations (8) to (10), with NorMuon's averages.

    Two reads of G, one read and one write of W. Besides multiples of (p + q) r numbers a matrix, the iterates of
    Newton-Schulz, two of a matrix's size in its own dtype, for as many matrices of one shape at a time as
    `lorapre.backends.triton.table.scratch_limit` has room for.

    Launches: 18 for the factors, as under Adam; and for each batch of one shape the momentum, its norm, the averages
    of the update, the weights, and Newton-Schulz's three products a step, with two copies.
    """

    def __init__(self, buckets: Sequence[Bucket], hyper: MuonHyperparameters, layouts: Layouts) -> None:
        keep, inside, outside = factors.sum_weights(hyper.mu, hyper.nesterov, hyper.residual_gain)
        ordered = sorted(buckets, key=lambda bucket: (bucket.view.p, bucket.view.q))
        super().__init__(ordered, hyper, layouts, decay=hyper.mu, gain=1.0, ahead=1.0 if hyper.nesterov else 0.0)
        self.hyper = hyper
        self.weight = max(keep, inside, abs(outside))
        self.M_dtype = hyper.iterates_in(buckets[0].params[0]) or torch.float32

    def _update(self, C: Tensor | None) -> None:
        assert C is not None  # every step of Muon sweeps
        batches = list(self._batches())
        M, spare = (self._empty(max(batch.numel for batch in batches), self.M_dtype) for _ in range(2))
        sizes = torch.empty_like(self.sizes)
        for batch in batches:
            shape = batch.count, table.eights(batch.p), table.eights(batch.q)
            self._turn(batch, self._orthogonal(batch, C, sizes, *(x[: batch.numel].view(shape) for x in (M, spare))))
        self.sizes = sizes  # those of K were read by every batch

    def _batches(self) -> Iterator[_Batch]:
        """All matrices, in parts whose iterates stay below the limit, or that are one matrix."""
        keys = [
            next((key for key in ("u_row", "u_col") if key in bucket.state), None)
            for bucket in self.buckets
            for _ in range(len(bucket.params) * bucket.view.batch)
        ]
        limit = table.scratch_limit(sum(bucket.weight_bytes for bucket in self.buckets))
        first = 0
        kinds = [kind[:2] for kind in self.matrices.kinds]
        for (p, q, orders, key), run in groupby(zip(self.matrices.p, self.matrices.q, kinds, keys, strict=True)):
            total = sum(1 for _ in run)
            room = max(1, limit // table.orthogonal_bytes(p, q, self.M_dtype))
            size = math.ceil(total / math.ceil(total / room))  # batches of one size, not a rest at the end
            for start in range(0, total, size):
                yield _Batch(first + start, min(size, total - start), p, q, orders, key)
            first += total

    def _orthogonal(self, batch: _Batch, C: Tensor, sizes: Tensor, M: Tensor, spare: Tensor) -> Tensor:
        """The orthogonalised momenta, in the place of ``M`` or of ``spare``; L of these matrices and its ``sizes``."""
        block = self.update_blocks
        tiles = math.ceil(batch.q / block.cols)
        parts = self._empty(batch.count * tiles)
        muon_pass.momentum[(batch.count * tiles,)](
            self.matrices.table,
            self.coefficients,
            self.U,
            self.X,
            self.L,
            C,
            self.squares,
            self.sizes,
            sizes,
            parts,
            M,
            batch.first,
            tiles,
            self.gain,
            self.weight,
            -1.0 if self.maximize else 1.0,
            G_TYPE=TYPES[self.G_dtype],
            S_TYPE=TYPES[self.S_dtype],
            M_TYPE=TYPES[self.M_dtype],
            R=self.r,
            BLOCK_R=block.rank,
            BLOCK_P=block.rows,
            BLOCK_Q=block.cols,
            X_IN_STATE=self.X_in_state,
            X_ALIGNED=self.matrices.left_aligned,
            L_IN_STATE=self.L_in_state,
            ORDER=batch.orders[1],
            MOMENTUM_PRECISION=table.PRECISION["momentum"],
            LEFT_PRECISION=table.PRECISION["left"],
            **table.launch(block),
        )
        numel = M[0].numel()
        muon_pass.normalize[(batch.count * math.ceil(numel / table.ELEMENTS),)](
            M, parts, tiles, numel, M_TYPE=TYPES[self.M_dtype], BLOCK=table.ELEMENTS
        )
        for _ in range(self.hyper.ns_steps):
            if batch.p > batch.q:
                quintic(M.mT, out=spare.mT)
            else:
                quintic(M, out=spare)
            M, spare = spare, M
        return M

    def _turn(self, batch: _Batch, O: Tensor) -> None:  # noqa: E741  (the paper's name)
        """The weights along ``O``, each by its average."""
        block, by_row = table.MUON_LENGTHS, batch.key == "u_row"
        size = batch.p if by_row else batch.q
        tiles = math.ceil(size / block.rows)
        inverses = parts = self.sizes  # where nobody reads them
        if batch.key is not None:
            inverses, parts = self._empty(batch.count * size), self._empty(batch.count * tiles * 2)
            muon_pass.lengths[(batch.count * tiles,)](
                self.matrices.table,
                self.coefficients,
                O,
                inverses,
                parts,
                batch.first,
                tiles,
                self.beta2,
                S_TYPE=TYPES[self.S_dtype],
                BLOCK=block.rows,
                OTHER=block.cols,
                BY_ROW=by_row,
                **table.launch(block),
            )
        block = table.MUON_WEIGHTS
        row_tiles, col_tiles = math.ceil(batch.p / block.rows), math.ceil(batch.q / block.cols)
        muon_pass.turn[(batch.count * row_tiles * col_tiles,)](
            self.matrices.table,
            self.coefficients,
            O,
            inverses,
            parts,
            batch.first,
            tiles,
            row_tiles,
            col_tiles,
            shape_factor(self.hyper.shape_scale, batch.p, batch.q),
            0 if self.seed is None else self.seed,
            W_TYPE=TYPES[self.W_dtype],
            BLOCK_P=block.rows,
            BLOCK_Q=block.cols,
            NORMALIZED=batch.key is not None,
            BY_ROW=by_row,
            STOCHASTIC=self.seed is not None,
            ROUNDS=rounding.ROUNDS,
            ORDER=batch.orders[0],
            **table.launch(block),
        )
