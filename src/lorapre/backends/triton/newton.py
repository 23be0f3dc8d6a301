"""The step of the paper's regression with both moments factored, Algorithm 1: what is launched. Imports triton."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lorapre import factors
from lorapre.backends import rounding
from lorapre.backends.batches import Bucket
from lorapre.backends.eager import AdamHyperparameters
from lorapre.backends.triton import newton_inverses, newton_kernels, newton_squares, table
from lorapre.backends.triton.layout import Layouts
from lorapre.backends.triton.step import TYPES, Step, on_device_of, turns


def step_buckets(buckets: Sequence[Bucket], hyper: AdamHyperparameters, layouts: Layouts) -> None:
    """Two reads of G, one read and one write of W; besides them multiples of (p + q) r numbers a matrix.

    Launches, whatever the number of shapes: coefficients, Gram matrices, their inverses, pass 1, pass 2, the left
    factors: 6. A relative eps, a relative damping and a residual gain that is not the paper's take 1 or 2 more each.
    What works on r x r matrices is launched once a moment where their ranks differ, and the passes once for each
    order of the numbers of W and of G. Arguments as of `lorapre.backends.triton.subspace_step.SubspaceStep`; buckets
    whose scratch is larger than `lorapre.backends.triton.table.scratch_limit` allows take turns. Whether G is finite is
    for the caller to know before: pass 1 leaves no sums of G^2 unless eps is relative.
    """
    with on_device_of(buckets):
        for turn in turns(buckets, lambda one: table.newton_scratch_bytes(one.view, second_rank(one))):
            _Step(turn, hyper, layouts).run()


def second_rank(bucket: Bucket) -> int:
    """The rank of a factored second moment."""
    return bucket.state["v_A"][0].shape[-2]


class _Step(Step):
    """One step of some buckets; the tensors between its kernels."""

    def __init__(self, buckets: Sequence[Bucket], hyper: AdamHyperparameters, layouts: Layouts) -> None:
        super().__init__(buckets, hyper, layouts)
        self.hyper = hyper
        self.ranks = buckets[0].view.rank, second_rank(buckets[0])
        self.S_type = TYPES[self.S_dtype]
        self.relative = hyper.regressor.damping_mode == "relative"
        self.residual = abs(hyper.residual_gain - (1.0 - hyper.beta1)) > 1e-12
        self.rates = 1.0 - hyper.beta1**0.5, 1.0 - hyper.beta2**0.25  # equation (3)
        rank = max(self.ranks)
        self.project_blocks = table.blocks(table.NEWTON_PROJECT, rank, self.G_dtype.itemsize)
        self.update_blocks = table.blocks(table.NEWTON_UPDATE, rank, max(self.G_dtype.itemsize, self.W_dtype.itemsize))
        self.in_place = rank <= self.update_blocks.rank
        # Both moments behind each other, so that one launch serves them where their ranks are one.
        p, q = sum(self.matrices.p), sum(self.matrices.q)
        self.Y = self._empty(p * sum(self.ranks)).split([p * r for r in self.ranks])
        self.Z = self.Y
        if not self.in_place:
            self.Z = self._empty(q * sum(self.ranks)).split([q * r for r in self.ranks])
        sizes = [2 * self.n * r * r for r in self.ranks]
        self.squares = self._empty(sum(sizes), torch.float64).split(sizes)
        self.scales = self._empty(2 * self.n * 3, torch.float64)
        self.overlaps = self.parts = self.scales  # where nobody reads them
        self.row_work = self._work(self.matrices.p, self.project_blocks.rows)
        if hyper.relative_eps:
            self.overlaps = self._empty(self.n)
            self.parts = self._empty(self.row_work.tiles * self._count(self.project_blocks))

    def run(self) -> None:
        self._grams()
        if self.hyper.relative_eps:
            newton_inverses.overlap[(self.n,)](
                self.squares[1], self.overlaps, R=self.ranks[1], BLOCK=min(1024, table.ELEMENTS)
            )
        self._invert((0,) if self.relative else (0, 1))
        self._project()
        if self.relative or self.residual:
            self._targets()
        if self.relative:
            self._invert((1,))
        self._update()
        self._finish()

    def _moments(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The first moment of a launch that is for both or for each, and what says so."""
        same = self.ranks[0] == self.ranks[1]
        for first in (0,) if same else (0, 1):
            yield first, {"R": self.ranks[first], "FIRST": first, "MOMENTS": 2 if same else 1}

    def _count(self, block: table.Blocks) -> int:
        """Blocks of ranks of a pass."""
        return max(math.ceil(rank / min(block.rank, table.padded(rank))) for rank in self.ranks)

    def _ranks(self, block: table.Blocks) -> dict[str, Any]:
        (RM, RV), (BLOCK_M, BLOCK_V) = self.ranks, (min(block.rank, table.padded(rank)) for rank in self.ranks)
        return {"RM": RM, "RV": RV, "BLOCK_M": BLOCK_M, "BLOCK_V": BLOCK_V, "R_BLOCKS": self._count(block)}

    @property
    def _precision(self) -> str:
        return table.NEWTON_PRECISION["newton_bf16" if self.G_dtype == torch.bfloat16 else "newton"]

    def _grams(self) -> None:
        block = table.NEWTON_GRAM
        for first, moments in self._moments():
            width = min(block.rank, table.padded(self.ranks[first]))
            count = math.ceil(self.ranks[first] / width)
            newton_inverses.gram[(self.n * 2 * moments["MOMENTS"] * (count * (count + 1) // 2),)](
                self.matrices.table,
                self.squares[first],
                self.n,
                S_TYPE=self.S_type,
                BLOCK_R=width,
                BLOCK=block.rows,
                **moments,
                **table.launch(block),
            )

    def _invert(self, sides: tuple[int, ...]) -> None:
        block, rows = table.NEWTON_INVERT, table.square_blocks
        for first, moments in self._moments():
            whole = table.padded(self.ranks[first])
            targets = self.relative and 1 in sides
            work = self._work(self.matrices.p, rows(self.ranks[first]).rows) if targets else self.row_work
            newton_inverses.invert[(self.n * len(sides) * moments["MOMENTS"],)](
                self.squares[first],
                self.scales,
                self.target_parts[first] if targets else self.scales,
                work.starts,
                self.n,
                self.hyper.regressor.damping,
                *self.rates,
                BLOCK=min(block.rows, whole),
                COLS=min(block.cols, whole),
                WIDE=whole,
                FIRST_SIDE=sides[0],
                SIDES=len(sides),
                RELATIVE=self.relative,
                **moments,
                **table.launch(block),
            )

    def _project(self) -> None:
        block = self.project_blocks
        for (_, order, _), work in self._kinds(self.matrices.p, block.rows):
            newton_kernels.project[(work.programs * self._count(block),)](
                self.matrices.table,
                work.items,
                work.starts,
                self.coefficients,
                *self.Y,
                self.parts,
                G_TYPE=TYPES[self.G_dtype],
                S_TYPE=self.S_type,
                BLOCK_P=block.rows,
                BLOCK_Q=block.cols,
                NEGATE=self.maximize,
                SQUARES=self.hyper.relative_eps,
                ORDER=order,
                PRECISION=self._precision,
                **self._ranks(block),
                **table.launch(block),
            )

    def _targets(self) -> None:
        self.target_parts: dict[int, Tensor] = {}
        for first, moments in self._moments():
            block = table.square_blocks(self.ranks[first])
            work = self._work(self.matrices.p, block.rows)
            self.target_parts[first] = self._empty(work.tiles * moments["MOMENTS"], torch.float64)
            newton_squares.targets[(work.programs * moments["MOMENTS"],)](
                self.matrices.table,
                work.items,
                work.starts,
                self.Y[first],
                sum(self.matrices.p) * self.ranks[0],
                self.squares[first],
                self.scales,
                self.target_parts[first],
                self.n,
                BLOCK_R=block.rank,
                BLOCK=block.rows,
                INNER=block.cols,
                PRECISION=table.NEWTON_PRECISION["squares"],
                **moments,
                **table.launch(block),
            )

    def _update(self) -> None:
        block, hyper = self.update_blocks, self.hyper
        for (W_order, G_order, _), work in self._kinds(self.matrices.q, block.cols):
            newton_kernels.update[(work.programs * self._count(block),)](
                self.matrices.table,
                work.items,
                self.row_work.starts,
                self.coefficients,
                self.Y[0],
                *self.Z,
                *self.squares,
                self.scales,
                self.overlaps,
                self.parts,
                self.n,
                *self.rates,
                hyper.beta2,
                hyper.eps,
                factors.update_bound(hyper.beta2),
                0 if self.seed is None else self.seed,
                W_TYPE=TYPES[self.W_dtype],
                G_TYPE=TYPES[self.G_dtype],
                S_TYPE=self.S_type,
                BLOCK_P=block.rows,
                BLOCK_Q=block.cols,
                OUT=table.NEWTON_PARTS[0],
                INNER=table.NEWTON_PARTS[1],
                PARTS=self._count(self.project_blocks),
                NEGATE=self.maximize,
                RESIDUAL=self.residual,
                RELATIVE=hyper.relative_eps,
                BOUNDED=hyper.bounded,
                STOCHASTIC=self.seed is not None,
                ROUNDS=rounding.ROUNDS,
                W_ORDER=W_order,
                G_ORDER=G_order,
                PRECISION=self._precision,
                MOMENT_PRECISION=table.NEWTON_PRECISION["moments"],
                SQUARE_PRECISION=table.NEWTON_PRECISION["squares"],
                **self._ranks(block),
                **table.launch(block),
            )

    def _finish(self) -> None:
        p, q = self.matrices.p, self.matrices.q
        for first, moments in self._moments():
            block = table.square_blocks(self.ranks[first])
            left, right = self._work(p, block.rows), self._work(q, block.rows)
            rights = 0 if self.in_place else right.programs
            newton_squares.finish[((rights + left.programs) * moments["MOMENTS"],)](
                self.matrices.table,
                right.items,
                left.items,
                rights,
                self.coefficients,
                self.Y[first],
                self.Z[first],
                sum(p) * self.ranks[0],
                sum(q) * self.ranks[0],
                self.squares[first],
                self.scales,
                self.n,
                *self.rates,
                S_TYPE=self.S_type,
                BLOCK_R=block.rank,
                BLOCK=block.rows,
                INNER=block.cols,
                RM=self.ranks[0],
                DONE=self.relative or self.residual,
                PRECISION=table.NEWTON_PRECISION["squares"],
                **moments,
                **table.launch(block),
            )
