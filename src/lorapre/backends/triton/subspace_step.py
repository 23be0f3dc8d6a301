"""What the steps of Adam and Muon by the subspace regression share: pass 1 and both bases. Imports triton."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorapre import subspace
from lorapre.backends.batches import Bucket
from lorapre.backends.eager import AdamHyperparameters
from lorapre.backends.eager_muon import Hyperparameters
from lorapre.backends.triton import bases, cholesky, elements, first_pass, table
from lorapre.backends.triton.layout import Layouts, Work
from lorapre.backends.triton.step import TYPES, Step, on_device_of, turns

#: Passes of Cholesky QR.
_PASSES = 3


def turns_of(buckets: Sequence[Bucket], hyper: Hyperparameters) -> Iterator[tuple[list[Bucket], int]]:
    """The buckets in parts that are stepped one after the other, each with the bytes of its scratch."""
    sketched = isinstance(hyper, AdamHyperparameters) and hyper.spectral_clipping is not None

    def scratch(bucket: Bucket) -> int:
        dtype = bucket.state["m_B"][0].dtype
        return table.scratch_bytes(bucket.view, dtype, sketched=sketched, sweeps=bucket.sweeps)

    high = buckets[0].view.rank > table.KERNEL_RANK
    for turn in turns(buckets, scratch, table.high_rank_limit if high else table.scratch_limit):
        yield turn, sum(scratch(bucket) * len(bucket.params) for bucket in turn)


class SubspaceStep(Step):
    """One step of some buckets whose momentum M moves to decay M + gain G; the tensors between its kernels.

    Until `proceed` no weight and no state changes: whether G is finite is known when `read` has gone through it. What
    subclasses add is the second pass, `_update`: the weights, and the right factors L = C A + gain U^T G.

    Args:
        buckets: matrices that `lorapre.backends.triton.supports`, of one device and rank, of one dtype each of
            weights, gradients and state, and rounded with one seed. Their mask, if they have one, holds from the
            beginning.
        hyper: the options.
        layouts: remembers addresses from step to step.
        decay: weight of the old momentum.
        gain: weight of the gradient in the new one.
        ahead: how much more than that of the gradient counts inside: see `lorapre.backends.triton.elements.carry`.
    """

    #: What the first pass gathers of v, as its arguments.
    _gathered: Mapping[str, bool] = {"CLIP": False, "SPECTRAL": False, "WHOLE": False, "FULL": False}

    def __init__(
        self,
        buckets: Sequence[Bucket],
        hyper: Hyperparameters,
        layouts: Layouts,
        *,
        decay: float,
        gain: float,
        ahead: float = 0.0,
    ) -> None:
        super().__init__(buckets, hyper, layouts)
        self.buckets = buckets
        self.decay, self.gain, self.ahead, self.beta2 = decay, gain, ahead, hyper.beta2
        self.r = buckets[0].view.rank
        self.full = "exp_avg_sq" in buckets[0].state
        self.blocks = table.blocks(table.PROJECT, self.r, self.G_dtype.itemsize)
        self.by_torch = self.r > table.KERNEL_RANK
        widest = max(self.G_dtype.itemsize, self.W_dtype.itemsize)
        self.update_blocks = table.given_blocks() if self.by_torch else table.blocks(table.UPDATE, self.r, widest)
        self.sweeps = buckets[0].sweeps
        # m_B's place takes X, and m_A's takes L, where they can: nobody else needs them any more.
        narrow = self.S_dtype != torch.float32
        self.X_in_state = self.sweeps and not narrow and not self.by_torch  # else m_B holds the new one, or the old
        self.L_in_state = not self.sweeps or not narrow
        p = self.matrices.p
        self.U = self._empty(self.matrices.left)
        alone = self.X_in_state or not self.sweeps
        self.X = self.U if alone else self._empty(self.matrices.left)
        self.L = self.U if self.L_in_state or self.by_torch else self._empty(self.matrices.right)
        self.row_sums = self._empty(sum(p))
        self.sizes = self._empty(self.n)
        self.squares = self._empty(self.n)  # sums of G^2, after `read`
        self.surprises = self._empty(self.n)
        squares = 0 if self.by_torch or not self.sweeps else self.n
        self.T, self.triangles, self.lower = (self._squares(squares) for _ in range(3))
        self.project_rows = self._work(p, self.blocks.rows)
        self.project_parts = math.ceil(self.r / self.blocks.rank)
        self.parts = self._empty(self.project_rows.tiles * self.project_parts * elements.PART.value)
        # S, A S in parts and where they begin, and what comes of them; where nobody asks for them, anything.
        self.signs = self.rights = self.sketches = self.surprises
        self.sign_starts = self.project_rows.starts

    @property
    def matrix_params(self) -> list[Tensor]:
        """The parameter of each of them."""
        return [param for bucket in self.buckets for param in bucket.params for _ in range(bucket.view.batch)]

    def read(self) -> None:
        """The first pass."""
        with on_device_of(self.buckets):
            self._project()
            self._totals()

    def proceed(self, enabled: Tensor | None) -> None:
        """Everything else; nothing changes where ``enabled`` (0-d bool, on the device) is False."""
        with on_device_of(self.buckets):
            self._mask(enabled)
            if not self.sweeps:
                self.left_factors()
                self._update(None)
                self.advance_v_row()
                return
            C = self._carried(self._left_basis())
            self._update(C)
            self._right_basis()
            self._finish()

    def _mask(self, enabled: Tensor | None) -> None:
        if enabled is not None:
            self.coefficients.select(1, elements.ON.value).copy_(enabled)

    def _squares(self, count: int) -> Tensor:
        return torch.empty((count, self.r, self.r), dtype=torch.float32, device=self.device)

    def _project(self) -> None:
        block = self.blocks
        for (_, order, V_order), work in self._kinds(self.matrices.p, block.rows):
            first_pass.project[(work.programs * self.project_parts,)](
                self.matrices.table,
                work.items,
                work.starts,
                self.coefficients,
                self.U,
                self.row_sums,
                self.parts,
                self.signs,
                self.sign_starts,
                self.rights,
                self.sketches,
                self.decay,
                self.gain,
                self.beta2,
                G_TYPE=TYPES[self.G_dtype],
                S_TYPE=TYPES[self.S_dtype],
                R=self.r,
                BLOCK_R=block.rank,
                BLOCK_P=block.rows,
                BLOCK_Q=block.cols,
                NEGATE=self.maximize,
                **self._gathered,
                SWEEPS=self.sweeps,
                ORDER=order,
                V_ORDER=V_order,
                PRECISION=table.PRECISION["project"],
                **table.launch(block),
            )

    def _totals(self) -> None:
        elements.totals[(self.n,)](
            self.parts,
            self.project_rows.starts,
            self.squares,
            self.surprises,
            self.sizes,
            PARTS=self.project_parts,
        )

    def _left_basis(self) -> tuple[Work, Tensor]:
        """U in the place of K; the products U^T X of its chunks."""
        side = _Side(self, right=False)
        products = side.first_products()
        for number in range(_PASSES):
            side.decompose(products, number)
            products = side.multiply(products, number, gram=number < _PASSES - 1, carry=number == _PASSES - 1)
        return side.work, products

    def _right_basis(self) -> None:
        """The rows of L up to the last factor of the new basis, which `_finish` multiplies by."""
        side = _Side(self, right=True)
        products = side.first_products()
        for number in range(_PASSES):
            side.decompose(products, number)
            if number < _PASSES - 1:
                products = side.multiply(products, number, gram=True)

    def _carried(self, found: tuple[Work, Tensor]) -> Tensor:
        work, products = found
        C = self._squares(self.n)
        count = math.ceil(self.r * self.r / table.ELEMENTS)
        elements.carry[(self.n * count,)](
            products,
            work.starts,
            self.triangles,
            self.coefficients,
            C,
            self.gain,
            self.ahead,
            R=self.r,
            BLOCK=table.ELEMENTS,
        )
        return C

    def _update(self, C: Tensor | None) -> None:
        """Write W and, with ``C``, L and the size of L's rows to `sizes`."""
        raise NotImplementedError

    def left_factors(self) -> None:
        """X, and K: the next m_B in a step that does not sweep, else scaled, in the place of G A^T."""
        block = table.left_blocks(self.r)
        work = self._work(self.matrices.p, block.rows)
        bases.left_factors[(work.programs * math.ceil(self.r / block.rank),)](
            self.matrices.table,
            work.items,
            self.coefficients,
            self.U,
            self.X,
            self.sizes,
            self.decay,
            self.gain,
            S_TYPE=TYPES[self.S_dtype],
            R=self.r,
            BLOCK_R=block.rank,
            BLOCK=block.rows,
            SWEEPS=self.sweeps,
            **table.launch(block),
        )

    def advance_v_row(self) -> None:
        """v_row one step on, if there is one, after all that reads the old one."""
        if "v_row" in self.buckets[0].state:
            work = self._work(self.matrices.p, table.CHUNK)
            bases.advance_v_row[(work.programs,)](
                self.matrices.table,
                work.items,
                self.coefficients,
                self.row_sums,
                self.beta2,
                S_TYPE=TYPES[self.S_dtype],
                BLOCK=table.CHUNK,
            )

    def _finish(self) -> None:
        block = table.finish_blocks(self.r)
        right, left = (self._work(sizes, block.rows) for sizes in (self.matrices.q, self.matrices.p))
        bases.finish[(right.programs + left.programs,)](
            self.matrices.table,
            right.items,
            left.items,
            right.programs,
            self.coefficients,
            self.U,
            self.L,
            self.T,
            self.triangles,
            self.row_sums,
            self.beta2,
            S_TYPE=TYPES[self.S_dtype],
            R=self.r,
            BLOCK_R=table.padded(self.r),
            BLOCK=block.rows,
            OUT=block.cols,
            INNER=block.rank,
            L_IN_STATE=self.L_in_state,
            V_ROWS="v_row" in self.buckets[0].state,
            PRECISION=table.PRECISION["bases"],
            **table.launch(block),
        )


class _Side:
    """Cholesky QR of the left factors of a step, K, or of the right ones, L."""

    def __init__(self, step: SubspaceStep, *, right: bool) -> None:
        self.step, self.right = step, right
        self.chunk = table.chunk_rows(step.r)
        self.work = step._work(step.matrices.q if right else step.matrices.p, self.chunk)
        self.scratch = step.L if right else step.U
        self.in_state = right and step.L_in_state
        self.forms_K = not right  # of which the first pass has left G A^T

    @property
    def _common(self) -> dict[str, Any]:
        return {
            "decay": self.step.decay,
            "gain": self.step.gain,
            "S_TYPE": TYPES[self.step.S_dtype],
            "R": self.step.r,
            "CHUNK": self.chunk,
            "RIGHT_SIDE": self.right,
            "ALIGNED": self.right and self.step.matrices.aligned,
            "X_IN_STATE": self.in_state,
            "PRECISION": table.PRECISION["bases"],
        }

    def first_products(self) -> Tensor:
        """X^T X of each chunk, of X divided by its size."""
        return self._products(scale=True)

    def _products(self, *, scale: bool = False, with_X: bool = False) -> Tensor:
        step, products = self.step, self.step._squares(self.work.tiles)
        block = table.product_blocks(step.r)
        each = bases.product_programs(step.r, block.rank, with_X=with_X)
        bases.product[(self.work.programs * each,)](
            step.matrices.table,
            self.work.items,
            self.work.starts,
            self.scratch,
            step.X,
            step.sizes,
            products,
            BLOCK_R=block.rank,
            BLOCK=block.rows,
            Y_IN_STATE=step.X_in_state,
            SCALE=scale,
            FORM=scale and self.forms_K,
            WITH_X=with_X,
            **table.launch(block),
            **self._common,
        )
        return products

    def decompose(self, products: Tensor, number: int) -> None:
        """``T`` and ``triangles`` of the step from the products of the chunks, in pass ``number``."""
        step, last = self.step, number == _PASSES - 1
        block = table.cholesky_blocks(step.r)
        cholesky.inverse_cholesky[(step.n,)](
            products,
            self.work.starts,
            step.sizes,
            step.T,
            step.triangles,
            step.lower,
            subspace.diagonal_shift(step.r, torch.float32, torch.float32, last=last),
            R=step.r,
            WIDTH_OF_R=table.padded(step.r),
            BLOCK=block.rank,
            FIRST=number == 0,
            LAST=last,
            PRECISION=table.PRECISION["bases"],
            **table.launch(block),
        )

    def multiply(self, products: Tensor, number: int, *, gram: bool = False, carry: bool = False) -> Tensor:
        """X <- X T of pass ``number``; the products of its chunks with itself, or with X of the update.

        ``products`` may be overwritten.
        """
        step = self.step
        fused = step.r <= table.FUSED_RANK
        block = table.apply_blocks(step.r)
        bases.apply[(self.work.programs,)](
            step.matrices.table,
            self.work.items,
            self.work.starts,
            step.coefficients,
            step.sizes,
            self.scratch,
            step.X,
            step.T,
            products,
            BLOCK_R=table.padded(step.r),
            BLOCK=block.rows,
            OUT=block.cols,
            Y_IN_STATE=step.X_in_state,
            SCALE=number == 0,
            FORM=number == 0 and self.forms_K,
            GRAM=gram and fused,
            CARRY=carry and fused,
            **table.launch(block),
            **self._common,
        )
        if fused:
            return products
        return self._products(with_X=carry)
