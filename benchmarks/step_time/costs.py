"""What a step cannot do without, matrix by matrix: bytes to and from memory, and operations of its products.

A matrix is p x q; w is the width of weight and gradient in bytes, n = p q. Every tensor of the algorithm is read once
for each pass that needs it and written once if it changes; what lies between (temporaries, iterates) counts nothing,
so that an implementation which moves more shows a lower share of the copy rate. Operations are those of products with
a matrix of size n (a multiplication and an addition each), and of Newton-Schulz; elementwise work and the r x r algebra
are left out, and so are the rare SVDs of GaLore and Fira.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Of one matrix or of many."""

    bytes_moved: float
    flops: float


#: p, q, r (0 where there is none), w.
CostOf = Callable[[int, int, int, int], Cost]

#: Width of the numbers of LoRA-Pre's state: float32 for the dtypes measured here.
_STATE = 4
_NEWTON_SCHULZ = 5
#: A block of 8-bit states has a float32 scale.
_BLOCK = 256


def total(cost_of: CostOf, shapes: Iterable[tuple[int, int]], rank: int | None, width: int) -> Cost:
    """All matrices together."""
    each = [cost_of(p, q, rank or 0, width) for p, q in shapes]
    return Cost(sum(cost.bytes_moved for cost in each), sum(cost.flops for cost in each))


def adamw(p: int, q: int, r: int, w: int) -> Cost:
    """Read W, G, m, v; write W, m, v."""
    return Cost(7 * w * p * q, 0)


def sgd(p: int, q: int, r: int, w: int) -> Cost:
    """Read W, G; write W."""
    return Cost(3 * w * p * q, 0)


def muon(p: int, q: int, r: int, w: int) -> Cost:
    """Read W, G, m; write W, m."""
    return Cost(5 * w * p * q, newton_schulz(p, q))


def adamw_8bit(p: int, q: int, r: int, w: int) -> Cost:
    """Read W, G, write W; read and write two moments of a byte a number, and their scales."""
    return Cost((3 * w + 2 * 2 * (1 + 4 / _BLOCK)) * p * q, 0)


def lorapre_adamw(p: int, q: int, r: int, w: int) -> Cost:
    """Read G twice and W, write W; read and write the factors of m, and v's row and column.

    Products: G m_A^T, the update's with m_A, and U^T G.
    """
    return Cost(4 * w * p * q + 2 * _STATE * (p + q) * (r + 1), 6 * p * q * r)


def sweeping(interval: int) -> CostOf:
    """`lorapre_adamw` that sweeps once in ``interval`` steps: else no product U^T G, and m_A is not written."""

    def cost_of(p: int, q: int, r: int, w: int) -> Cost:
        every = lorapre_adamw(p, q, r, w)
        spared = 1 - 1 / interval
        return Cost(every.bytes_moved - spared * _STATE * q * r, every.flops - spared * 2 * p * q * r)

    return cost_of


def lorapre_adamw_paper(p: int, q: int, r: int, w: int) -> Cost:
    """Read W, G, write W (all regressions read the old factors); read and write the factors of m and v.

    Products, for each moment: that of its factors, and the gradient's with either.
    """
    return Cost(3 * w * p * q + 2 * _STATE * 2 * (p + q) * r, 12 * p * q * r)


def lorapre_muon(p: int, q: int, r: int, w: int) -> Cost:
    """As `lorapre_adamw`, with one average along the longer side, and Newton-Schulz."""
    state = 2 * _STATE * ((p + q) * r + max(p, q))
    return Cost(4 * w * p * q + state, 6 * p * q * r + newton_schulz(p, q))


def galore(p: int, q: int, r: int, w: int) -> Cost:
    """Read W, G, the projection; write W; read and write two moments of max(p, q) r. Products: there and back."""
    return Cost(3 * w * p * q + _projected(p, q, r, w), 4 * p * q * r)


def fira(p: int, q: int, r: int, w: int) -> Cost:
    """As GaLore, and G once more: its part outside the subspace is scaled by what comes out inside."""
    return Cost(4 * w * p * q + _projected(p, q, r, w), 4 * p * q * r)


def apollo(p: int, q: int, r: int, w: int) -> Cost:
    """As Fira, with a product there alone."""
    return Cost(4 * w * p * q + _projected(p, q, r, w), 2 * p * q * r)


def newton_schulz(p: int, q: int) -> float:
    """Five times X X^T, its square, and their product with X, for the smaller side on the left."""
    small, large = min(p, q), max(p, q)
    return _NEWTON_SCHULZ * (4 * small**2 * large + 2 * small**3)


def _projected(p: int, q: int, r: int, w: int) -> int:
    return w * r * (min(p, q) + 4 * max(p, q))
