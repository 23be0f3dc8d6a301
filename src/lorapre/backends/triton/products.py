"""Batched products of float32 matrices by torch, at the precisions of the kernels. Imports triton."""

# Triton's decorators and types are untyped where they are not missing (other platforms than Linux).
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorapre.backends.triton import table


@triton.jit
def cut(X, high, low, numel, BLOCK: tl.constexpr):
    """X as a sum: ``high`` is X rounded to TF32, ``low`` what is left of it."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < numel, other=0.0)
    # TF32 keeps 10 of 23 bits: half of the last one is added, and what is below it is cleared.
    h = ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
    tl.store(high + at, h, mask=at < numel)
    tl.store(low + at, x - h, mask=at < numel)


@dataclass(frozen=True)
class Factor:
    """Matrices (n, a, b) as what is multiplied of them: themselves, or two parts whose sum they are."""

    parts: tuple[Tensor, ...]
    precision: str

    @classmethod
    def of(cls, X: Tensor, precision: str) -> Factor:
        """``X`` (n, a, b) for products at a precision of `lorapre.backends.triton.table.PRECISION`."""
        return cls(_parts(X) if precision == "tf32x3" else (X,), precision)

    @property
    def mT(self) -> Factor:
        return Factor(tuple(part.mT for part in self.parts), self.precision)

    def __matmul__(self, other: Factor) -> Tensor:
        if len(self.parts) == 1:
            with precise(self.precision):
                return torch.bmm(self.parts[0], other.parts[0])
        (high, low), (other_high, other_low) = self.parts, other.parts
        with precise("tf32"):
            return torch.bmm(low, other_high).baddbmm_(high, other_low).baddbmm_(high, other_high)


def multiply(X: Tensor, Y: Tensor, precision: str) -> Tensor:
    """X Y of (n, a, b) and (n, b, c)."""
    return Factor.of(X, precision) @ Factor.of(Y, precision)


def gram(X: Tensor, precision: str) -> Tensor:
    """X X^T (n, r, r) of ``X`` (n, r, m), in float64 where that is the ``precision``."""
    if precision == "float64":
        wide = X.double()
        return torch.bmm(wide, wide.mT)
    if precision != "tf32x3":
        factor = Factor.of(X, precision)
        return factor @ factor.mT
    high, low = _parts(X)
    with precise("tf32"):
        mixed = torch.bmm(high, low.mT)  # the other mixed product is its transpose
        return (mixed + mixed.mT).baddbmm_(high, high.mT)


def _parts(X: Tensor) -> tuple[Tensor, Tensor]:
    if not X.is_contiguous() and X.mT.is_contiguous():
        high, low = _parts(X.mT)
        return high.mT, low.mT
    X = X.contiguous()
    high, low = torch.empty_like(X), torch.empty_like(X)
    cut[(triton.cdiv(X.numel(), table.ELEMENTS),)](X, high, low, X.numel(), BLOCK=table.ELEMENTS)
    return high, low


@contextmanager
def precise(precision: str) -> Iterator[None]:
    """Torch's float32 products on a GPU: by tensor cores where that is "tf32", else as they are."""
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        backend.fp32_precision = before
