r"""The heart: how momentum factors are created, advanced and read. Pure functions on batches of matrices.

Equation numbers are those of :mod:`lorapre.reference`. Shapes: a batch holds ``n`` matrices of one shape,
``G`` is (n, p, q), left factors ``B`` are (n, p, r), right factors ``A`` are (n, r, q). A coefficient is a
float, or a tensor that broadcasts against (n, 1, 1) where the matrices are at different steps.
"""

from __future__ import annotations

import hashlib
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Coefficient: TypeAlias = float | Tensor
DampingMode: TypeAlias = Literal["absolute", "relative"]
BiasCorrection: TypeAlias = Literal["paper", "exact"]

#: Mean square of a right factor's rows under which `advance` rescales the pair, long before float32 underflows.
_VANISHING = 1e-20

#: Standard deviation of the right factors at the start (Algorithm 1); the left factors start at zero.
INIT_STD = 0.02


def first_moment_rate(beta1: float) -> float:
    """Equation (3): gamma_1 = 1 - beta1^(1/2), the rate of each factor of m."""
    return float(1.0 - beta1**0.5)


def second_moment_rate(beta2: float) -> float:
    """Equation (3): gamma_2 = 1 - beta2^(1/4), the rate of each factor of sqrt(v)."""
    return float(1.0 - beta2**0.25)


def first_moment_correction(beta1: float, step: Coefficient) -> Coefficient:
    """Equation (6): 1 - beta1^t, the divisor of m_t."""
    correction: Coefficient = 1.0 - beta1**step
    return correction


def second_moment_correction(beta2: float, step: Coefficient, mode: BiasCorrection) -> Coefficient:
    """The divisor of v_t: 1 - beta2^t as printed (``paper``), or the share that has arrived (``exact``).

    A constant gradient makes v_B v_A reach (1 - beta2^((t-1)/2)) |g| when it enters step t, and it enters
    squared: beta2 (1 - beta2^((t-1)/2))^2 + (1 - beta2) is the whole weight of g^2 in v_t.
    """
    if mode == "paper":
        correction: Coefficient = 1.0 - beta2**step
    else:
        correction = beta2 * (1.0 - beta2 ** ((step - 1) / 2)) ** 2 + (1.0 - beta2)
    return correction


def initial_right_factor(
    shape: torch.Size | tuple[int, ...], *, seed: int, key: str, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Draw A ~ N(0, 0.02^2) of ``shape`` (..., r, q) (Algorithm 1) from a generator of its own.

    The stream depends on ``seed`` and ``key`` (parameter name or index, and which factor) alone, and is drawn
    on the CPU in float32 whatever ``dtype`` and ``device`` are: every rank and every process gets the same
    bits, and no global generator is advanced.
    """
    if device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    values = torch.randn(shape, generator=generator, dtype=torch.float32) * INIT_STD
    return values.to(device=device, dtype=dtype)


def damped_cholesky(gram: Tensor, damping: float, mode: DampingMode, coming: Tensor | None = None) -> Tensor:
    """Cholesky factor (n, r, r) of a float64 Gram matrix (n, r, r) plus damping (Appendix C.1), in place.

    ``relative`` damping is a share of the Gram matrix's mean diagonal, so that scaling the gradient scales
    the step's result and nothing else; a matrix of zeros (the left factor before the first step) gets the
    identity instead, as any positive matrix maps its zero projection to zero. ``coming`` (n, 1) is the mean
    diagonal that the step is about to bring: where it is larger, it counts, for a left factor that a pause of
    the gradient has shrunk must not be inverted.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)  # (n, r), a view
    mean_diagonal = diagonal.mean(dim=-1, keepdim=True)
    if mode == "absolute":
        shift = torch.full_like(mean_diagonal, damping)
    else:
        size = mean_diagonal if coming is None else torch.maximum(mean_diagonal, coming)
        shift = torch.where(mean_diagonal > 0, damping * size, 1.0)
    # What float64 itself rounds away, so that even a factor of condition 1e8 stays decomposable.
    rounding = 4 * gram.shape[-1] * torch.finfo(torch.float64).eps
    diagonal.add_(torch.maximum(shift, rounding * mean_diagonal))
    lower: Tensor = torch.linalg.cholesky_ex(gram).L
    return lower


def advance(
    B: Tensor,
    A: Tensor,
    G: Tensor,
    *,
    rate: Coefficient,
    damping: float,
    mode: DampingMode,
) -> tuple[Tensor, Tensor]:
    """Equations (1) and (2): the factors of step t from those of step t - 1, simultaneously.

    Both right-hand sides read the old factors; a sequential update (A reading the new B) is another algorithm
    and explodes at high rank when damping is small. Returns new tensors (n, p, r) and (n, r, q) in G's dtype.

    The Gram matrices and their solves are in float64 whatever G is: a Gram matrix squares the condition
    number, and the paper's absolute damping of 1e-6 lies below float32's rounding of it, so that a float32
    Cholesky decomposition fails on factors that training does produce.
    """
    GA = torch.bmm(G, A.mT)  # (n, p, r)
    BG = torch.bmm(B.mT, G)  # (n, r, q)
    A64, B64 = A.double(), B.double()
    A_gram, B_gram = A64 @ A64.mT, B64.mT @ B64  # (n, r, r)
    A_size = A_gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None]  # (n, 1, 1)
    A_chol = damped_cholesky(A_gram, damping, mode)
    B_target = torch.cholesky_solve(GA.mT.double(), A_chol).mT
    coming = (rate * B_target).square().sum(dim=-2).mean(dim=-1, keepdim=True)  # (n, 1)
    B_chol = damped_cholesky(B_gram, damping, mode, coming)
    B_target = B_target.to(G.dtype)
    A_target = torch.cholesky_solve(BG.double(), B_chol).to(G.dtype)
    new_B, new_A = torch.lerp(B, B_target, rate), torch.lerp(A, A_target, rate)
    if mode == "relative":
        # Zero gradients (an expert that no token reaches) shrink both factors until float32 has no more of
        # them, and a pair of zeros never learns again. Only the product means anything: move the size over.
        vanishing = (A_size < _VANISHING) & (A_size > 0)
        if isinstance(rate, Tensor):  # a step that is left out changes nothing
            vanishing &= rate > 0
        gauge = torch.where(vanishing, A_size.rsqrt(), 1.0).to(G.dtype)
        new_B, new_A = new_B / gauge, new_A * gauge
    return new_B, new_A


def first_moment(B: Tensor, A: Tensor, G: Tensor, beta1: float) -> Tensor:
    """Equation (4): m_t = beta1 m_B m_A + (1 - beta1) G, (n, p, q), from the factors of step t - 1."""
    return torch.baddbmm(G, B, A, beta=1.0 - beta1, alpha=beta1)


def second_moment(B: Tensor, A: Tensor, G: Tensor, beta2: float) -> Tensor:
    """Equation (5): v_t = beta2 (v_B v_A)^2 + (1 - beta2) G^2, (n, p, q), from the factors of step t - 1."""
    v = torch.bmm(B, A)
    return v.square_().mul_(beta2).addcmul_(G, G, value=1.0 - beta2)
