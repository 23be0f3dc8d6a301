"""The step: what is launched for a bucket, in which order. Imports triton."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
import triton.language as tl
from torch import Tensor

from lorapre import factors
from lorapre.backends import batches
from lorapre.backends.batches import Bucket
from lorapre.backends.eager import AdamHyperparameters
from lorapre.backends.triton import elements, kernels, table
from lorapre.backends.triton.bases import orthonormalize
from lorapre.backends.triton.coefficients import coefficients
from lorapre.backends.triton.pointers import Addresses, Place, Pointers, place_of
from lorapre.subspace import carried, right_half

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def step_bucket(bucket: Bucket, hyper: AdamHyperparameters, pointers: Pointers, *, seed: int | None) -> None:
    """Two reads of G, one read and one write of W; besides them multiples of (p + q) r numbers a matrix.

    Launches for a bucket: 6 of ours (coefficients, factors in, G A^T, the left targets, the update, factors out), one
    sum where the rows' loop is split because the bucket is small, and for each of the two bases 3 of ours, 6 products
    and 3 that scale (see `lorapre.backends.triton.bases`; above its largest rank torch's decompositions, some 40
    operations), and 10 between. With counters on the device the coefficients are some 20 operations on n numbers
    instead of one launch.

    Args:
        bucket: matrices that `lorapre.backends.triton.supports`.
        hyper: the options.
        pointers: remembers addresses from step to step.
        seed: of stochastic rounding (bfloat16 weights), 0 to 2^63 - 1; None rounds to nearest. What is drawn
            depends on the seed, the step, the element, the shape, and the matrix's position in the bucket.
    """
    view = bucket.view
    size = max(1, batches.MAX_SCRATCH_NUMEL // (view.batch * (view.p + view.q) * view.rank))
    device = bucket.params[0].device
    with nullcontext() if device.type == "cpu" else torch.accelerator.device_index(device.index):
        for start in range(0, len(bucket.params), size):
            part = slice(start, start + size)
            piece = replace(
                bucket,
                params=bucket.params[part],
                grads=bucket.grads[part],
                state={key: tensors[part] for key, tensors in bucket.state.items()},
                step=bucket.step[part] if isinstance(bucket.step, Tensor) else bucket.step,
            )
            _Step(piece, hyper, pointers, start * view.batch, seed).run()


class _Step:
    """One step of one piece of a bucket; the tensors between its kernels."""

    def __init__(
        self, piece: Bucket, hyper: AdamHyperparameters, pointers: Pointers, first: int, seed: int | None
    ) -> None:
        view, state = piece.view, piece.state
        self.p, self.q, self.r = view.p, view.q, view.rank
        self.n = len(piece.params) * view.batch
        self.hyper, self.first, self.seed = hyper, first, seed
        self.device, self.maximize = piece.params[0].device, piece.maximize
        self.W_dtype, self.G_dtype = piece.params[0].dtype, piece.grads[0].dtype
        self.S_type = _TYPES[state["m_B"][0].dtype]
        places = [place_of(piece.params, view), place_of(piece.grads, view)]
        assert places[0] is not None
        assert places[1] is not None
        self.W_place, self.G_place = places[0], places[1]
        self.addresses = self._addresses(piece, pointers)
        self.coefficients = coefficients(piece.step, hyper, piece.enabled, view.batch, self.n, self.device)

    def _addresses(self, piece: Bucket, pointers: Pointers) -> Addresses:
        state, bytes_each = piece.state, piece.state["m_B"][0].element_size()
        lists: list[Sequence[Tensor]] = [piece.params, piece.grads]
        lists += [state[key] for key in ("m_B", "m_A", "v_row", "v_col")]
        sizes = [self.W_place.batch * self.W_dtype.itemsize, self.G_place.batch * self.G_dtype.itemsize]
        sizes += [numel * bytes_each for numel in (self.p * self.r, self.r * self.q, self.p, self.q)]
        return pointers.table(lists, sizes, piece.view.batch)

    def run(self) -> None:
        gain = 1.0 - self.hyper.beta1
        B, A = self._gather()
        GA, row_sums = self._project(A)
        K, X, scalars = self._combine(B, GA, row_sums)
        del GA
        U = orthonormalize(K)
        del K
        UG, col_sums = self._update(X, A, U, scalars)
        del X
        L = carried(U, B, A, decay=self.hyper.beta1)
        L.add_(UG[:, 0] if UG.shape[1] == 1 else UG.sum(dim=1), alpha=gain)
        del UG
        self._commit(*right_half(U, L, A, orthonormalize), row_sums, col_sums)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty((self.n, *shape), dtype=torch.float32, device=self.device)

    def _gather(self) -> tuple[Tensor, Tensor]:
        B, A = self._empty(self.p, self.r), self._empty(self.r, self.q)
        _, _, B_table, A_table, _, _ = self.addresses.table
        sizes = self.p * self.r, self.r * self.q
        counts = [math.ceil(size / table.ELEMENTS) for size in sizes]
        elements.gather[(self.n * sum(counts),)](
            B_table,
            A_table,
            B,
            A,
            *sizes,
            *counts,
            S_TYPE=self.S_type,
            ALIGNED=self._factors_aligned,
            BLOCK=table.ELEMENTS,
        )
        return B, A

    def _project(self, A: Tensor) -> tuple[Tensor, Tensor]:
        """G A^T (n, parts, p, r) and the row sums of G^2 (n, parts, p)."""
        block = table.blocks(table.PROJECT, self.r, self.G_dtype.itemsize)
        tiles, ranks = math.ceil(self.p / block.rows), math.ceil(self.r / block.rank)
        parts, length = table.splits(self.n * tiles * ranks, self.q, block.cols, self.device)
        GA, row_sums = self._empty(parts, self.p, self.r), self._empty(parts, self.p)
        kernels.project[(self.n * tiles * ranks * parts,)](
            self.addresses.table[1],
            A,
            GA,
            row_sums,
            self.coefficients,
            self.p,
            self.q,
            self.G_place.row,
            self.G_place.col,
            tiles,
            parts,
            length,
            G_TYPE=_TYPES[self.G_dtype],
            R=self.r,
            BLOCK_R=block.rank,
            BLOCK_P=block.rows,
            BLOCK_Q=block.cols,
            NEGATE=self.maximize,
            ALIGNED=self._alignment(self.G_place, self.G_dtype, 1),
            BF16=self._narrow,
            PRECISION=table.PRECISION["project"],
            num_warps=block.warps,
            num_stages=block.stages,
        )
        return GA, row_sums

    def _combine(self, B: Tensor, GA: Tensor, row_sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """K and X (n, p, r), and the scalars (n, 2)."""
        K, X, scalars = self._empty(self.p, self.r), self._empty(self.p, self.r), self._empty(2)
        numel = self.p * self.r
        count = math.ceil(numel / table.ELEMENTS)
        beta1 = self.hyper.beta1
        elements.combine[(self.n * (count + 1),)](
            B,
            GA,
            K,
            X,
            self.addresses.table[4],
            row_sums,
            scalars,
            self.coefficients,
            self.p,
            self.q,
            numel,
            count,
            GA.shape[1],
            beta1,
            1.0 - beta1,
            self.hyper.beta2,
            self.hyper.eps,
            S_TYPE=self.S_type,
            RELATIVE=self.hyper.relative_eps,
            BLOCK=table.ELEMENTS,
        )
        return K, X, scalars

    def _update(self, X: Tensor, A: Tensor, U: Tensor, scalars: Tensor) -> tuple[Tensor, Tensor]:
        """W in place; U^T G (n, parts, r, q) and the column sums of G^2 (n, parts, q)."""
        block = table.blocks(table.UPDATE, self.r, max(self.G_dtype.itemsize, self.W_dtype.itemsize))
        tiles, ranks = math.ceil(self.q / block.cols), math.ceil(self.r / block.rank)
        parts, length = table.splits(self.n * tiles * ranks, self.p, block.rows, self.device)
        UG, col_sums = self._empty(parts, self.r, self.q), self._empty(parts, self.q)
        W_table, G_table, _, _, row_table, col_table = self.addresses.table
        kernels.update[(self.n * tiles * ranks * parts,)](
            W_table,
            G_table,
            row_table,
            col_table,
            X,
            A,
            U,
            UG,
            col_sums,
            scalars,
            self.coefficients,
            self.p,
            self.q,
            self.W_place.row,
            self.W_place.col,
            self.G_place.row,
            self.G_place.col,
            tiles,
            parts,
            length,
            self.hyper.beta2,
            factors.update_bound(self.hyper.beta2),
            self.first,
            # Buckets number their matrices alike: the shape tells their streams apart.
            (self.p * 2_654_435_761 + self.q) % 2**31,
            0 if self.seed is None else self.seed,
            W_TYPE=_TYPES[self.W_dtype],
            G_TYPE=_TYPES[self.G_dtype],
            S_TYPE=self.S_type,
            R=self.r,
            BLOCK_R=block.rank,
            BLOCK_P=block.rows,
            BLOCK_Q=block.cols,
            NEGATE=self.maximize,
            RELATIVE=self.hyper.relative_eps,
            BOUNDED=self.hyper.bounded,
            STOCHASTIC=self.seed is not None,
            ROUNDS=table.PHILOX_ROUNDS,
            W_ALIGNED=self._alignment(self.W_place, self.W_dtype, 0),
            G_ALIGNED=self._alignment(self.G_place, self.G_dtype, 1),
            BF16=self._narrow,
            MOMENTUM_PRECISION=table.PRECISION["momentum"],
            LEFT_PRECISION=table.PRECISION["left"],
            num_warps=block.warps,
            num_stages=block.stages,
        )
        return UG, col_sums

    def _commit(self, B: Tensor, A: Tensor, row_sums: Tensor, col_sums: Tensor) -> None:
        sizes = self.p * self.r, self.r * self.q
        counts = [math.ceil(size / table.ELEMENTS) for size in (*sizes, self.p, self.q)]
        elements.commit[(self.n * sum(counts),)](
            *self.addresses.table[2:],
            B.contiguous(),
            A.contiguous(),
            row_sums,
            col_sums,
            self.coefficients,
            self.p,
            self.q,
            *sizes,
            *counts,
            row_sums.shape[1],
            col_sums.shape[1],
            self.hyper.beta2,
            S_TYPE=self.S_type,
            ALIGNED=self._factors_aligned,
            BLOCK=table.ELEMENTS,
        )

    def _alignment(self, place: Place, dtype: torch.dtype, row: int) -> int:
        return place.alignment(dtype.itemsize, self.addresses.aligned[row])

    @property
    def _factors_aligned(self) -> bool:
        return all(self.addresses.aligned[2:4])

    @property
    def _narrow(self) -> bool:
        return table.BF16_DOT and self.G_dtype == torch.bfloat16
