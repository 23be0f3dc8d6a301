"""LoRA-Pre Muon in plain batched torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lorapre import factors
from lorapre.backends.batches import Bucket, Piece
from lorapre.backends.eager import AdamHyperparameters, momentum
from lorapre.factors import Coefficient, Regressor
from lorapre.orthogonal import newton_schulz

ShapeScale: TypeAlias = Literal["original", "match_rms_adamw"]
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
    beta2: float
    ns_steps: int
    ns_dtype: torch.dtype | None
    shape_scale: ShapeScale
    weight_decay: float
    scale: float

    def iterates_in(self, weight: Tensor) -> torch.dtype | None:
        """The dtype of Newton-Schulz for ``weight``; None is that of the momentum, which is float32 or wider."""
        if self.ns_dtype is None and weight.device.type != "cpu" and weight.dtype != torch.float64:
            return torch.bfloat16
        return self.ns_dtype


#: The options of whatever the kernels step.
Hyperparameters: TypeAlias = AdamHyperparameters | MuonHyperparameters


def shape_factor(kind: ShapeScale, p: int, q: int) -> float:
    """The two usual scales of Muon: sqrt(max(1, p/q)), or 0.2 sqrt(max(p, q)), whose updates have AdamW's RMS."""
    return math.sqrt(max(1.0, p / q)) if kind == "original" else 0.2 * math.sqrt(max(p, q))


def lorapre_muon(bucket: Bucket, hyper: MuonHyperparameters) -> None:
    """One step of LoRA-Pre Muon for a bucket of matrices, equations (8) to (10), in place."""
    factor = hyper.scale * shape_factor(hyper.shape_scale, bucket.view.p, bucket.view.q)
    dtype = hyper.iterates_in(bucket.params[0])
    for piece in bucket.pieces():
        _muon_piece(piece, hyper, factor, dtype)


def _muon_piece(piece: Piece, hyper: MuonHyperparameters, factor: float, dtype: torch.dtype | None) -> None:
    keep, inside, outside = factors.sum_weights(hyper.mu, hyper.nesterov, hyper.residual_gain)
    m = momentum(piece, hyper.regressor, keep=keep, inside=inside, outside=outside, decay=hyper.mu, gain=1.0)
    update = newton_schulz(m, hyper.ns_steps, dtype)  # equations (8) and (10)
    del m
    for key, side in (("u_row", -1), ("u_col", -2)):
        if key in piece:
            _normalize(update, piece, key, side, hyper.beta2)
    update.mul_(-piece.on * hyper.lr * factor)
    piece.apply(update, 1.0 - piece.on * hyper.lr * hyper.weight_decay)


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
