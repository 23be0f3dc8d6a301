"""LoRA-Pre Muon in plain batched torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lorapre import factors
from lorapre.backends.batches import Bucket, Piece
from lorapre.backends.eager import momentum
from lorapre.factors import Coefficient, Regressor
from lorapre.orthogonal import newton_schulz

ShapeScale: TypeAlias = Literal["original", "match_rms_adamw"]
Orthogonalization: TypeAlias = Literal["newton_schulz", "factors"]
Normalization: TypeAlias = Literal["none", "rows", "longer_side"]


@dataclass(frozen=True)
class MuonHyperparameters:
    """What all matrices of a bucket share. ``lr`` may be a 0-d tensor on their device.

    Whether updates are normalised, and along which side, their state says: it then has ``u_row`` or ``u_col``.
    """

    lr: Coefficient
    mu: float
    nesterov: bool
    residual_gain: float | None
    regressor: Regressor
    orthogonalization: Orthogonalization
    beta2: float
    ns_steps: int
    ns_dtype: torch.dtype | None
    shape_scale: ShapeScale
    weight_decay: float
    scale: float


def shape_factor(kind: ShapeScale, p: int, q: int) -> float:
    """The two usual scales of Muon: sqrt(max(1, p/q)), or 0.2 sqrt(max(p, q)), whose updates have AdamW's RMS."""
    return math.sqrt(max(1.0, p / q)) if kind == "original" else 0.2 * math.sqrt(max(p, q))


def lorapre_muon(bucket: Bucket, hyper: MuonHyperparameters) -> None:
    """One step of LoRA-Pre Muon for a bucket of matrices, equations (8) to (10), in place."""
    factor = hyper.scale * shape_factor(hyper.shape_scale, bucket.view.p, bucket.view.q)
    for piece in bucket.pieces():
        _muon_piece(piece, hyper, factor)


def _muon_piece(piece: Piece, hyper: MuonHyperparameters, factor: float) -> None:
    direction = _whole if hyper.orthogonalization == "newton_schulz" else _through_the_factors
    update = direction(piece, hyper)
    for key, side in (("u_row", -1), ("u_col", -2)):
        if key in piece:
            _normalize(update, piece, key, side, hyper.beta2)
    update.mul_(-piece.on * hyper.lr * factor)
    piece.apply(update, 1.0 - piece.on * hyper.lr * hyper.weight_decay)


def _whole(piece: Piece, hyper: MuonHyperparameters) -> Tensor:
    """Equations (8) and (10): Newton-Schulz on the momentum with its residual, p x q as it is."""
    keep, inside, outside = factors.sum_weights(hyper.mu, hyper.nesterov, hyper.residual_gain)
    m = momentum(piece, hyper.regressor, keep=keep, inside=inside, outside=outside, decay=hyper.mu, gain=1.0)
    return newton_schulz(m, hyper.ns_steps, hyper.ns_dtype)


def _through_the_factors(piece: Piece, hyper: MuonHyperparameters) -> Tensor:
    """Muon without a product of p x q by p x q: the polar factor of the tracked part, the rest element by element.

    The momentum inside the subspace is X A with orthonormal rows of A, so that its polar factor is that of X (p x r)
    times A. The rest, G - P(G), takes Adam's treatment without momentum: divided by the root of its own rank-1 second
    moment, it has elements of mean square 1, hence singular values around sqrt(max(p, q)), and is scaled to 1.
    """
    keep, inside, _ = factors.sum_weights(hyper.mu, hyper.nesterov, hyper.residual_gain)
    B, A, G = piece["m_B"], piece["m_A"], piece.G
    left = hyper.regressor.project(A, G)
    head = newton_schulz(B * keep + left * inside, hyper.ns_steps, hyper.ns_dtype)  # (n, p, r)
    piece["m_B"], piece["m_A"] = hyper.regressor.advance(B, A, G, left, decay=hyper.mu, gain=1.0, on=piece.enabled)
    rest = G.baddbmm_(left, A, alpha=-1.0)  # (n, p, q)
    row, col = piece["v_row"], piece["v_col"]
    rate = piece.on * (1.0 - hyper.beta2)
    v, piece["v_row"], piece["v_col"] = factors.rank1_second_moment(row, col, rest, hyper.beta2, rate)
    rest.div_(v.div_(1.0 - hyper.beta2**piece.step).sqrt_().clamp_(min=torch.finfo(v.dtype).tiny))
    assert hyper.residual_gain is not None
    weight = hyper.residual_gain / max(G.shape[-2:]) ** 0.5
    return torch.baddbmm(rest, head, A, beta=weight)


def _normalize(update: Tensor, piece: Piece, key: str, side: int, beta2: float) -> None:
    """NorMuon (arXiv 2510.05491): each row, or column, by the root of its average mean square, in place.

    An orthogonal matrix has rows of one length only along its shorter side: the rows of a tall one, the neurons, may
    differ by orders of magnitude. The whole keeps the norm that it had, so that no other rate fits.
    """
    tiny = torch.finfo(update.dtype).tiny
    norm = torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True)
    now = torch.linalg.vector_norm(update, dim=side, keepdim=True).square_() / update.shape[side]
    piece[key] = average = torch.lerp(piece[key], now, piece.on * (1.0 - beta2))
    update.div_(average.sqrt_().clamp_(min=tiny))
    update.mul_(norm / torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True).clamp_(min=tiny))
