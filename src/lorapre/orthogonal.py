"""Newton-Schulz orthogonalisation, the heart of Muon, on batches of matrices."""

from __future__ import annotations

import torch
from torch import Tensor

#: Polynomial of the quintic iteration, as in torch.optim.Muon: it pushes singular values to between 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(M: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Equation (10)'s approximate polar factor U V^T of each M = U S V^T.

    Args:
        M: (n, p, q), of any scale; zeros stay zeros.
        steps: iterations.
        dtype: of the iteration; None is M's own.

    Returns:
        (n, p, q) in M's dtype.
    """
    tall = M.shape[-2] > M.shape[-1]
    # By its largest element first: squares of tiny elements would underflow.
    X = M / M.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(M.dtype).tiny)
    X = X / torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(M.dtype).tiny)
    X = X.to(M.dtype if dtype is None else dtype)
    if tall:
        X = X.mT
    for _ in range(steps):
        X = quintic(X)
    return (X.mT if tall else X).to(M.dtype)


def quintic(X: Tensor, out: Tensor | None = None) -> Tensor:
    """One iteration on each X (n, k, l), k <= l, of norm at most 1 at first; ``out``, like X, takes the result."""
    a, b, c = COEFFICIENTS
    S = torch.bmm(X, X.mT)  # (n, k, k)
    return torch.baddbmm(X, torch.baddbmm(S, S, S, beta=b, alpha=c), X, beta=a, out=out)
