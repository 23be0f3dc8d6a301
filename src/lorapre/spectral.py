"""The largest singular value of an update, from a sketch of a few columns: equation (15).

No power iteration, which would read the update six times and more: of Y = D S with random signs S (q, k), the products
of two different columns of Y estimate the sum of the fourth powers of D's singular values, in which the largest one
stands out. What a random matrix of D's size has is taken off.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Columns of the sketch. One large singular value is then found within a quarter in three cases of four.
COLUMNS = 16

#: Least mean square of a column, in units of the mean over all, by which its elements are divided: a column that hardly
#: ever has a gradient must not stop the whole matrix when it has one.
LEAST_COLUMN = 1e-2

#: Multipliers of `random_signs`' hash, the finalizer of MurmurHash3.
FIRST_MULTIPLIER, SECOND_MULTIPLIER = 0x85EBCA6B, 0xC2B2AE35
_WORD = 0xFFFFFFFF


def random_signs(q: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The sketch's S, (q, 16) of ones and minus ones: always the same, from a hash of the row's number."""
    x = torch.arange(q, device=device, dtype=torch.int64)
    x = ((x ^ (x >> 16)) * FIRST_MULTIPLIER) & _WORD
    x = ((x ^ (x >> 13)) * SECOND_MULTIPLIER) & _WORD
    x = x ^ (x >> 16)
    bits = (x[:, None] >> torch.arange(COLUMNS, device=device)) & 1
    return (1 - 2 * bits).to(dtype)


def random_norm(p: int, q: int) -> float:
    """Largest singular value that a (p, q) matrix of independent elements of mean square 1 has: sqrt(p) + sqrt(q)."""
    return float(p**0.5 + q**0.5)


def norm(M: Tensor, rows: Tensor, columns: Tensor, signs: Tensor | None = None) -> Tensor:
    """Estimated largest singular value (n, 1, 1) of M (n, p, q) over the root of a second moment of rank 1.

    Args:
        M: what an update is before it is divided by the root of v.
        rows: (n, p, 1), mean squares of the gradient by row.
        columns: (n, 1, q), mean squares by column, of any scale; where they are all 0 they count as equal.
        signs: `random_signs` of M's q, dtype and device, where they are at hand.
    """
    _, p, q = M.shape
    mean = columns.mean(dim=-1, keepdim=True)
    even = torch.where(mean > 0, columns / mean, 1.0).clamp_(min=LEAST_COLUMN)
    signs = random_signs(q, M.dtype, M.device) if signs is None else signs
    weighted = signs * even.rsqrt_().mT  # (n, q, 16)
    scale = torch.where(rows > 0, rows.rsqrt(), 0.0)
    sketch = torch.bmm(M, weighted).mul_(scale)  # (n, p, 16)
    return norm_of_products(torch.bmm(sketch.mT, sketch), p, q)


def norm_of_products(products: Tensor, p: int, q: int) -> Tensor:
    """The estimate (n, 1, 1) from Y^T Y (n, 16, 16) of sketches of (p, q) matrices.

    A random matrix with the sum of squares s has s^2 (p + q) / (p q) as its sum of fourth powers.
    """
    own = products.diagonal(dim1=-2, dim2=-1)
    squares = own.mean(dim=-1)[:, None, None]
    off = products.square().sum(dim=(-2, -1)) - own.square().sum(dim=-1)
    fourth = off[:, None, None] / (COLUMNS * (COLUMNS - 1))
    return (fourth - squares.square() * ((p + q) / (p * q))).clamp_(min=0.0).sqrt_().sqrt_()
