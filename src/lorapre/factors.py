"""The heart: how momentum factors are created, advanced and read. Pure functions on batches of matrices.

Equation numbers are those of `lorapre.reference`. Shapes: a batch holds ``n`` matrices of one shape,
``G`` is (n, p, q), left factors ``B`` are (n, p, r), right factors ``A`` are (n, r, q). A coefficient is a
float, or a tensor that broadcasts against (n, 1, 1) where the matrices are at different steps.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lorapre.subspace import orthonormalize, sweep, tangent_step

Coefficient: TypeAlias = float | Tensor
DampingMode: TypeAlias = Literal["absolute", "relative"]
BiasCorrection: TypeAlias = Literal["paper", "exact"]
Regression: TypeAlias = Literal["newton", "subspace", "tangent"]

#: Mean square of a right factor's rows under which `advance` rescales the pair, long before float32 underflows.
_VANISHING = 1e-20

#: Standard deviation of the right factors at the start (Algorithm 1); the left factors start at zero.
INIT_STD = 0.02


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
    shape: torch.Size | tuple[int, ...],
    *,
    seed: int,
    key: str,
    dtype: torch.dtype,
    device: torch.device,
    orthonormal: bool = False,
) -> Tensor:
    """Draw A ~ N(0, 0.02^2) of ``shape`` (..., r, q) (Algorithm 1) from a generator of its own.

    With ``orthonormal`` its rows are replaced by an orthonormal basis of what they span.

    The stream depends on ``seed`` and ``key`` (parameter name or index, and which factor) alone, and is drawn
    on the CPU in float32 whatever ``dtype`` and ``device`` are: every rank and every process gets the same
    bits, and no global generator is advanced.
    """
    if device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    values = torch.randn(shape, generator=generator, dtype=torch.float32) * INIT_STD
    if orthonormal:
        values = orthonormalize(values.double().view(-1, *shape[-2:]).mT).mT.reshape(shape).float()
    return values.contiguous().to(device=device, dtype=dtype)


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


@dataclass(frozen=True)
class Regressor:
    """How factors follow a stream of matrices: which regression, and what makes its inverses safe.

    ``newton`` is Theorem 3.1 (equations (1) and (2)), ``subspace`` and ``tangent`` are `lorapre.subspace`, where
    nothing is inverted and ``damping`` means nothing.
    """

    regression: Regression
    damping: float
    damping_mode: DampingMode

    def project(self, A: Tensor, G: Tensor) -> Tensor:
        """The coefficients C (n, p, r) of P(G) = C A, the part of G (n, p, q) in the row space of A (n, r, q)."""
        if self.regression != "newton":
            return torch.bmm(G, A.mT)
        return left_target(A, G, self.damping, self.damping_mode)

    def advance(
        self, B: Tensor, A: Tensor, G: Tensor, left: Tensor, *, decay: float, gain: float, on: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The factors (B, A) of step t, in G's dtype, from those of step t - 1: M moves to decay M + gain G.

        Args:
            B: (n, p, r).
            A: (n, r, q).
            G: (n, p, q).
            left: what `project` gave for this A and G.
            decay: weight of the old momentum, beta of an average and mu of a sum.
            gain: weight of the gradient, 1 - beta of an average and 1 of a sum.
            on: a 0-d bool tensor; where False the factors stay as they are.
        """
        if self.regression == "newton":
            new_B, new_A = newton_step(
                B, A, G, left, decay=decay, gain=gain, damping=self.damping, mode=self.damping_mode
            )
        elif self.regression == "subspace":
            new_B, new_A = sweep(B, A, G, left, decay=decay, gain=gain)
        else:
            new_B, new_A = tangent_step(B, A, G, left, decay=decay, gain=gain)
        if on is None:
            return new_B, new_A
        return torch.where(on, new_B, B), torch.where(on, new_A, A)


def left_target(A: Tensor, G: Tensor, damping: float, mode: DampingMode) -> Tensor:
    """Equation (1)'s least-squares left factor G A^T (A A^T + delta I)^-1, (n, p, r), inverted in float64."""
    A64 = A.double()
    inverse, root = damped_inverse(A64 @ A64.mT, damping, mode, G.dtype)
    return torch.bmm(torch.bmm(G, A.mT) / root, inverse) / root


def newton_step(
    B: Tensor,
    A: Tensor,
    G: Tensor,
    left: Tensor,
    *,
    decay: float,
    gain: float,
    damping: float,
    mode: DampingMode,
) -> tuple[Tensor, Tensor]:
    """Equations (1) and (2), or (9): the factors of step t from those of step t - 1, simultaneously.

    Two factors share the momentum's decay, hence its square root; a target's weight is that of the momentum's
    steady state, gain / (1 - decay), which is 1 for an average. Both right-hand sides read the old factors; a
    sequential update (A reading the new B) is another algorithm and explodes at high rank when damping is small.

    The Gram matrices and their inverses are computed in float64 whatever G is: a Gram matrix squares the condition
    number, and the paper's absolute damping of 1e-6 lies below float32's rounding of it, so that a float32
    Cholesky decomposition fails on factors that training does produce.
    """
    rate = 1.0 - decay**0.5  # equation (3); v's factors come with decay = sqrt(beta2)
    weight = gain / (1.0 - decay)
    B64 = B.double()
    B_gram = B64.mT @ B64  # (n, r, r)
    del B64
    coming = None
    if mode == "relative":
        coming = (rate * weight * left.double()).square().sum(dim=(-2, -1), keepdim=True) / B.shape[-1]  # (n, 1, 1)
    inverse, root = damped_inverse(B_gram, damping, mode, G.dtype, coming)
    right = torch.bmm(inverse, torch.bmm(B.mT, G) / root) / root  # (n, r, q)
    new_B, new_A = torch.lerp(B, left * weight, rate), torch.lerp(A, right * weight, rate)
    if mode == "relative":
        # Zero gradients (an expert that no token reaches) shrink both factors until float32 has no more of
        # them, and a pair of zeros never learns again. Only the product means anything: move the size over.
        A_size = A.double().square().mean(dim=(-2, -1), keepdim=True) * A.shape[-1]  # (n, 1, 1)
        gauge = torch.where((A_size < _VANISHING) & (A_size > 0), A_size.rsqrt(), 1.0).to(G.dtype)
        new_B, new_A = new_B / gauge, new_A * gauge
    return new_B, new_A


def residual_weight(gain: float, step: Coefficient) -> Coefficient:
    """The weight of G - P(G) at step t for a ``residual_gain`` of ``gain``, bias correction included.

    An average of decay 1 - gain gives its newest entry gain / (1 - (1 - gain)^t): 1 at the first step, ``gain`` in
    the end. For the paper's gain, 1 - beta1, this is equations (4) and (6); from 1 on it is ``gain`` throughout.
    """
    if gain >= 1.0 or gain == 0.0:
        return gain
    weight: Coefficient = gain / (1.0 - (1.0 - gain) ** step)
    return weight


def average_weights(
    beta1: float, residual_gain: float, step: Coefficient
) -> tuple[Coefficient, Coefficient, Coefficient]:
    """``keep``, ``inside`` and ``outside`` of `read_momentum` for a bias-corrected average, equations (6) and (12).

    A gain above 1 divides everything by itself: what it says is how much less the tracked directions count than the
    rest, and the update keeps its size.
    """
    whole = first_moment_correction(beta1, step) * max(1.0, residual_gain)
    return beta1 / whole, (1.0 - beta1) / whole, residual_weight(residual_gain, step) / max(1.0, residual_gain)


def sum_weights(mu: float, nesterov: bool, residual_gain: float | None) -> tuple[float, float, float]:
    """``keep``, ``inside`` and ``outside`` of `read_momentum` for a momentum that is a sum, M_t = mu M + G.

    Nesterov's look ahead is G + mu M_t. A constant gradient gathers 1 / (1 - mu) inside the subspace, of which the
    residual has the share ``residual_gain``; None gives it the weight of a single gradient, as the paper does.
    """
    keep, inside = (mu * mu, 1.0 + mu) if nesterov else (mu, 1.0)
    return keep, inside, inside if residual_gain is None else residual_gain / (1.0 - mu)


def read_momentum(
    B: Tensor,
    A: Tensor,
    G: Tensor,
    left: Tensor,
    *,
    keep: Coefficient,
    inside: Coefficient,
    outside: Coefficient,
    inplace: bool = False,
) -> Tensor:
    """What enters the weight update, from the factors of step t - 1 and the whole gradient, (n, p, q):

        m = keep B A + inside P(G) + outside (G - P(G)),  P(G) = left A

    Equation (4) is keep = beta1 and inside = outside = 1 - beta1; (8) is mu, 1 and 1. ``inplace`` puts it in G's place.
    """
    if isinstance(inside, float) and isinstance(outside, float) and inside == outside:
        X = B * keep
    else:
        X = B * keep + left * (inside - outside)  # (n, p, r)
    if isinstance(outside, Tensor):
        return (G.mul_(outside) if inplace else G * outside).baddbmm_(X, A)
    return G.baddbmm_(X, A, beta=outside) if inplace else torch.baddbmm(G, X, A, beta=outside)


def second_moment(B: Tensor, A: Tensor, G: Tensor, beta2: float) -> Tensor:
    """Equation (5): v_t = beta2 (v_B v_A)^2 + (1 - beta2) G^2, (n, p, q), from the factors of step t - 1."""
    v = torch.bmm(B, A)
    return v.square_().mul_(beta2).addcmul_(G, G, value=1.0 - beta2)


def rank1_second_moment(
    row: Tensor,
    col: Tensor,
    G: Tensor,
    beta2: float,
    rate: Coefficient,
    correction: Coefficient = 1.0,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """v_t = (beta2 row col / mean(row) + (1 - beta2) G^2) / correction, and the row and column means one step on.

    The outer product is Adafactor's estimate (arXiv 1804.04235); G^2 enters in full, as in equation (5), so that
    |G| / sqrt(v_t) cannot exceed (1 - beta2)^(-1/2). Non-negative by construction.

    Args:
        row: (n, p, 1), averages of the row means of G^2 up to step t - 1.
        col: (n, 1, q), averages of its column means.
        G: (n, p, q).
        beta2: decay rate of v.
        rate: of the means, 1 - beta2, or 0 where nothing is to change.
        correction: of the bias, what v_t (n, p, q) is divided by.
        out: (n, p, q), takes v_t.
    """
    mean = row.mean(dim=-2, keepdim=True)  # (n, 1, 1)
    scaled = torch.where(mean > 0, row / mean, 0.0) * (beta2 / correction)
    squares = torch.mul(G, G, out=out)  # a power is slower
    new_row = torch.lerp(row, squares.mean(dim=-1, keepdim=True), rate)
    new_col = torch.lerp(col, squares.mean(dim=-2, keepdim=True), rate)
    return squares.mul_((1.0 - beta2) / correction).addcmul_(scaled, col), new_row, new_col


def update_bound(beta2: float) -> float:
    """What no element of m / sqrt(v) may exceed: 1 / sqrt(1 - beta2).

    The residual's share is below it by itself, for v holds the newest G^2 in full. The momentum's is not: where v is
    far smaller than around it (a feature that is hardly ever active), what the factors leak there is divided by
    almost nothing.
    """
    return float((1.0 - beta2) ** -0.5)
