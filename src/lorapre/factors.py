"""The heart: how momentum factors are created, advanced and read. Pure functions on batches of matrices.

Equation numbers are those of `lorapre.reference`. Shapes: a batch holds ``n`` matrices of one shape,
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


def damped_inverse(
    gram: Tensor, damping: float, mode: DampingMode, dtype: torch.dtype, coming: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The inverse of a float64 Gram matrix (n, r, r) plus damping (Appendix C.1), without its size.

    Returns ``(inverse, root)`` of shapes (n, r, r) and (n, 1, 1) in ``dtype``; the inverse itself is
    ``inverse / root**2``. Apart, both stay in float32's range however small the factors are.

    ``relative`` damping is a share of the Gram matrix's mean diagonal, so that scaling the gradient scales
    the step's result and nothing else. ``coming`` (n, 1, 1) is the mean diagonal that the step is about to
    bring: where it is larger, it counts, for a left factor that a pause of the gradient has shrunk must not be
    inverted. A Gram matrix of zeros is invertible too: its projection is zero, and zero comes out.
    """
    mean_diagonal = gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None]  # (n, 1, 1)
    if mode == "absolute":
        size = torch.ones_like(mean_diagonal)
    else:
        size = mean_diagonal if coming is None else torch.maximum(mean_diagonal, coming)
        size = size.clamp(min=_VANISHING**3)
    # What float64 itself rounds away, so that even a factor of condition 1e8 stays decomposable.
    rounding = 4 * gram.shape[-1] * torch.finfo(torch.float64).eps
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    shift = (rounding * mean_diagonal / size).clamp(min=damping)
    lower = torch.linalg.cholesky_ex(gram / size + shift * identity).L
    # Not cholesky_solve: on CUDA it synchronises, so that no graph can be captured, and everywhere two triangular
    # solves with p or q right-hand sides take longer than one product with the small inverse.
    lower_inverse = torch.linalg.solve_triangular(lower, identity.expand_as(gram), upper=False)
    return (lower_inverse.mT @ lower_inverse).to(dtype), size.sqrt().to(dtype)


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

    The Gram matrices and their inverses are computed in float64 whatever G is: a Gram matrix squares the condition
    number, and the paper's absolute damping of 1e-6 lies below float32's rounding of it, so that a float32
    Cholesky decomposition fails on factors that training does produce.
    """
    A64, B64 = A.double(), B.double()
    A_gram, B_gram = A64 @ A64.mT, B64.mT @ B64  # (n, r, r)
    del A64, B64
    inverse, root = damped_inverse(A_gram, damping, mode, G.dtype)
    B_target = torch.bmm(torch.bmm(G, A.mT) / root, inverse) / root  # (n, p, r)
    coming = None
    if mode == "relative":
        coming = (rate * B_target.double()).square().sum(dim=(-2, -1), keepdim=True) / B.shape[-1]  # (n, 1, 1)
    inverse, root = damped_inverse(B_gram, damping, mode, G.dtype, coming)
    A_target = torch.bmm(inverse, torch.bmm(B.mT, G) / root) / root  # (n, r, q)
    new_B, new_A = torch.lerp(B, B_target, rate), torch.lerp(A, A_target, rate)
    if mode == "relative":
        # Zero gradients (an expert that no token reaches) shrink both factors until float32 has no more of
        # them, and a pair of zeros never learns again. Only the product means anything: move the size over.
        A_size = A_gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None]  # (n, 1, 1)
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
