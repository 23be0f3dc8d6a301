"""What SGD and Lion share: one momentum, factored for matrices and in full for everything else."""

from __future__ import annotations

import torch
from torch import Tensor

from lorapre.backends.batches import Bucket, Piece
from lorapre.factors import Coefficient
from lorapre.optim.base import FactoredOptimizer, Group
from lorapre.optim.gathering import by_shape
from lorapre.routing import MatrixView


class MomentumOptimizer(FactoredOptimizer):
    """A `FactoredOptimizer` whose dense parameters take the same update with a ``momentum_buffer`` of their size."""

    def _init_param_state(self, param: Tensor, view: MatrixView | None, group: Group, key: str) -> dict[str, Tensor]:
        step = self._new_step(param, group)
        if view is not None:
            return {"step": step, **self._init_momentum(param, view, group, key, "m")}
        buffer = torch.zeros_like(param, dtype=self._state_dtype(param, group), memory_format=torch.preserve_format)
        return {"step": step, "momentum_buffer": buffer}

    def _step_piece(self, piece: Piece, group: Group, lr: Coefficient) -> None:
        """Update part of a bucket, whose gradients are those to descend along."""
        raise NotImplementedError

    def _step_bucket(self, bucket: Bucket, group: Group) -> None:
        lr = self._lr(group, bucket.params[0].device)
        for piece in bucket.pieces():
            self._step_piece(piece, group, lr)

    def _step_dense(self, params: list[Tensor], group: Group, mask: Tensor | None) -> None:
        rows = [(MatrixView(1, 1, shape.numel(), 0, stacked=False), alike) for shape, alike in by_shape(params).items()]
        self._step_matrices(rows, group, mask)
