"""The step of LoRA-Pre Adam by the subspace regression: what is launched, in which order. Imports triton."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from lorapre import factors
from lorapre import spectral as sketch
from lorapre.backends import rounding
from lorapre.backends.batches import Bucket
from lorapre.backends.eager import AdamHyperparameters
from lorapre.backends.triton import high_rank, second_pass, spectral, table
from lorapre.backends.triton.layout import ROWS_ALIGNED, Layouts, Work, lines
from lorapre.backends.triton.step import TYPES, on_device_of
from lorapre.backends.triton.subspace_step import SubspaceStep


class AdamStep(SubspaceStep):
    """One step of LoRA-Pre Adam.

    Two reads of G, one read and one write of W; besides them multiples of (p + q) r numbers a matrix. A second moment
    in full takes one more read and write of v, and, with clipping or a relative eps, one more read.

    Launches, whatever the number of shapes: coefficients, pass 1, its sums, 7 for the left basis, what it carries over,
    pass 2, 6 for the right basis, the new state: 19; one more with spectral clipping, and one where a mask arrives
    after the first pass. The two passes are launched once for each order of the numbers of W, G and v. With counters on
    the device the coefficients are some 20 operations on n numbers instead of one launch. Beyond
    `lorapre.backends.triton.table.FUSED_RANK` there are 5 more, and beyond ``KERNEL_RANK`` batched products take over
    after the first pass: see `lorapre.backends.triton.high_rank`.
    """

    def __init__(self, buckets: Sequence[Bucket], hyper: AdamHyperparameters, layouts: Layouts) -> None:
        super().__init__(buckets, hyper, layouts, decay=hyper.beta1, gain=1.0 - hyper.beta1)
        self.hyper = hyper
        # Else nobody asks for a v in full in the first pass.
        full = self.full and (hyper.update_clipping or hyper.relative_eps)
        self.spectral = hyper.spectral_clipping is not None
        whole = self.spectral and not self.by_torch
        self._gathered = {"CLIP": hyper.update_clipping, "SPECTRAL": self.spectral, "WHOLE": whole, "FULL": full}
        if whole and self.project_parts > 1:
            raise ValueError(f"table.PROJECT cuts rank {self.r}: a sketch needs all ranks in one program")
        if self.spectral:
            K, q = sketch.COLUMNS, self.matrices.q
            self.sign_columns = lines(max(q)) if self.by_torch else table.SIGNS
            self.sign_work = self._work(q, self.sign_columns)
            self.sign_starts = self.sign_work.starts
            self.signs = self._empty(K * self.matrices.wide)
            self.rights = self._empty(self.sign_work.tiles * self.r * K)
            self.sketches = self._empty(K * (K * self.project_rows.tiles if whole else sum(self.matrices.p)))

    def proceed(self, enabled: Tensor | None) -> None:
        """As of its base; see there."""
        if not self.by_torch:
            super().proceed(enabled)
            return
        with on_device_of(self.buckets):
            self._mask(enabled)
            high_rank.proceed(self)

    def _project(self) -> None:
        if self.spectral:
            block = table.SKETCH
            ranks = min(block.rank, table.padded(self.r))
            spectral.signs[(self.sign_work.programs * math.ceil(self.r / ranks),)](
                self.matrices.table,
                self.sign_work.items,
                self.signs,
                self.rights,
                self.sign_columns,
                S_TYPE=TYPES[self.S_dtype],
                R=self.r,
                BLOCK_R=ranks,
                BLOCK_Q=block.cols,
                PRECISION=table.PRECISION["project"],
                **table.launch(block),
            )
        super()._project()

    def _totals(self) -> None:
        if not self._gathered["WHOLE"]:
            super()._totals()
            return
        spectral.totals[(self.n,)](
            self.matrices.table,
            self.parts,
            self.project_rows.starts,
            self.squares,
            self.surprises,
            self.sizes,
            self.sketches,
            self.hyper.spectral_clipping,
            PARTS=self.project_parts,
            CLIP=self.hyper.update_clipping,
        )

    def divide(self) -> None:
        """`surprises` from sketches of whole updates, over the weight of what is outside."""
        block = table.SKETCH
        spectral.divide[(self.n,)](
            self.matrices.table,
            self.coefficients,
            self.sketches,
            self.row_sums,
            self.surprises,
            self.beta2,
            self.hyper.spectral_clipping,
            S_TYPE=TYPES[self.S_dtype],
            BLOCK_P=block.rows,
            CLIP=self.hyper.update_clipping,
            PRECISION=table.PRECISION["project"],
            **table.launch(block),
        )

    def _update(self, C: Tensor | None) -> None:
        block = self.update_blocks
        for orders, work in self._kinds(self.matrices.q, block.cols):
            self._launch_update(work, orders, block, self.r, (self.U, self.X, self.L, self.U if C is None else C))

    def update_given(self, M: Tensor, at: slice) -> None:
        """The weights, and v, of the matrices ``at`` whose momenta X A are ``M``; one launch.

        ``M`` is (n, p, q), both up to the multiple of 16 of `lorapre.backends.triton.layout.lines`. In a step that
        sweeps it becomes G, as float32.
        """
        block = self.update_blocks
        work = self._work(self.matrices.q, block.cols).part([math.ceil(q / block.cols) for q in self.matrices.q], at)
        self._launch_update(work, self.matrices.kinds[at.start], block, block.rank, (M, M, M, M), at.start)

    def _launch_update(
        self,
        work: Work,
        orders: tuple[int, int, int],
        block: table.Blocks,
        r: int,
        factors_of: tuple[Tensor, Tensor, Tensor, Tensor],
        given: int | None = None,
    ) -> None:
        """The second pass; ``given`` is the first matrix whose momentum is given."""
        hyper = self.hyper
        W_order, G_order, V_order = orders
        aligned = W_order == G_order == ROWS_ALIGNED
        second_pass.update[(work.programs,)](
            self.matrices.table,
            work.items,
            self.coefficients,
            *factors_of,
            self.row_sums,
            self.squares,
            self.surprises,
            self.sizes,
            1.0 - hyper.beta1,
            hyper.beta2,
            hyper.eps,
            factors.update_bound(hyper.beta2),
            0 if self.seed is None else self.seed,
            -1.0 if self.maximize else 1.0,
            given or 0,
            W_TYPE=TYPES[self.W_dtype],
            G_TYPE=TYPES[self.G_dtype],
            S_TYPE=TYPES[self.S_dtype],
            R=r,
            BLOCK_R=block.rank,
            BLOCK_P=block.rows,
            BLOCK_Q=block.cols,
            RELATIVE=hyper.relative_eps,
            BOUNDED=hyper.bounded,
            CLIP=hyper.update_clipping or self.spectral,
            FULL=self.full,
            GIVEN=given is not None,
            LEAVE_G=self.sweeps and given is not None,
            SWEEPS=self.sweeps and given is None,
            ASYNC=given is None and table.asynchronous(r, self.W_dtype.itemsize, aligned=aligned),
            STOCHASTIC=self.seed is not None,
            ROUNDS=rounding.ROUNDS,
            X_IN_STATE=self.X_in_state and given is None,
            X_ALIGNED=self.matrices.left_aligned,
            L_IN_STATE=self.L_in_state and given is None,
            W_ORDER=W_order,
            G_ORDER=G_order,
            V_ORDER=V_order,
            MOMENTUM_PRECISION=table.PRECISION["momentum"],
            LEFT_PRECISION=table.PRECISION["left"],
            **table.launch(block),
        )
