"""Which parameters are compressed, and as matrices of which shape. Decided from shapes and options alone.

The optimizers, ``param_groups`` and the memory estimate all ask here, so that they cannot disagree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

View3D: TypeAlias = Literal["stack", "flatten"]


@dataclass(frozen=True)
class MatrixView:
    """A parameter seen as ``batch`` matrices of shape (``p``, ``q``), factored at ``rank``."""

    batch: int
    p: int
    q: int
    rank: int
    stacked: bool

    @property
    def left_shape(self) -> tuple[int, ...]:
        """Shape of a left factor: (p, r), or (batch, p, r) for a stack of matrices."""
        return (self.batch, self.p, self.rank) if self.stacked else (self.p, self.rank)

    @property
    def right_shape(self) -> tuple[int, ...]:
        """Shape of a right factor: (r, q), or (batch, r, q) for a stack of matrices."""
        return (self.batch, self.rank, self.q) if self.stacked else (self.rank, self.q)

    @property
    def factor_numel(self) -> int:
        """Numbers in one factored moment: (p + q) r a matrix, against p q for a dense one."""
        return self.batch * (self.p + self.q) * self.rank


def check_rank(rank: int | float, name: str = "rank") -> None:
    """Raise ``ValueError`` unless ``rank``, the option ``name``, is an integer >= 1 or a fraction between 0 and 1."""
    valid = not isinstance(rank, bool) and (
        (isinstance(rank, int) and rank >= 1) or (isinstance(rank, float) and 0 < rank < 1)
    )
    if not valid:
        raise ValueError(
            f"Invalid {name}: {rank!r}. Give an integer >= 1, or a float between 0 and 1 for a fraction of "
            f"each matrix's smaller side ({name}=0.25 is a quarter)."
        )


def resolve_rank(rank: int | float, p: int, q: int) -> int:
    """The rank of a (p, q) matrix: ``rank`` itself, or that fraction of min(p, q), at least 1."""
    return rank if isinstance(rank, int) else max(1, int(rank * min(p, q)))


def with_rank(view: MatrixView, rank: int | float) -> MatrixView:
    """``view`` at another rank, at most min(p, q)."""
    return replace(view, rank=min(resolve_rank(rank, view.p, view.q), view.p, view.q))


def matrix_view(shape: torch.Size | tuple[int, ...], rank: int | float, view_3d: View3D = "stack") -> MatrixView | None:
    """How a parameter of ``shape`` is compressed at ``rank``; None if it is dense.

    Two dimensions are a matrix. Three are a stack of matrices (the experts of a mixture), or, with
    ``view_3d="flatten"``, a 1-D convolution. Four and more are convolutions: (out, in, *kernel) becomes
    (out, in * kernel). Vectors, and matrices with min(p, q) <= rank, are dense: factors would save nothing.
    """
    if len(shape) < 2 or 0 in shape:
        return None
    if len(shape) == 3 and view_3d == "stack":
        batch, p, q = shape
        stacked = True
    else:
        batch, p, q = 1, shape[0], math.prod(shape[1:])
        stacked = False
    r = resolve_rank(rank, p, q)
    return MatrixView(batch, p, q, r, stacked) if min(p, q) > r else None


def state_dtype_of(param_dtype: torch.dtype, state_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a parameter's state: the option's, else the parameter's own but at least float32.

    bfloat16 keeps 8 bits of mantissa: an average that decays by 0.95 a step stops moving in it.
    """
    return state_dtype if state_dtype is not None else torch.promote_types(param_dtype, torch.float32)


def refuse_unsupported(param: Tensor, label: str) -> None:
    """Raise ``TypeError`` for a parameter that this library would get wrong: complex, flattened, sharded."""
    if param.is_complex():
        raise TypeError(
            f"{label} is complex ({param.dtype}), which is not supported. Optimize torch.view_as_real of it, "
            "or give it to torch.optim.AdamW."
        )
    if not param.is_floating_point():
        raise TypeError(f"{label} has dtype {param.dtype}; only floating-point parameters can be optimized.")
    if type(param).__name__ == "FlatParameter":
        raise TypeError(
            f"{label} is an FSDP1 FlatParameter: matrices are flattened away and nothing could be compressed. "
            "Train with DDP instead."
        )
    if hasattr(param, "ds_id"):
        raise TypeError(f"{label} is partitioned by DeepSpeed ZeRO-3, which flattens matrices. Train with DDP instead.")
    if type(param).__name__ == "DTensor" or type(param.data).__name__ == "DTensor":
        raise TypeError(
            f"{label} is a DTensor (FSDP2 or tensor parallelism), which this version cannot update. "
            "Train with DDP, or give it to torch.optim.AdamW."
        )
