"""LoRA-Pre in plain batched torch: every matrix of one shape at once, on any device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lorapre import factors, spectral, subspace
from lorapre.backends.batches import Bucket, Piece
from lorapre.factors import BiasCorrection, Coefficient, Regressor


@dataclass(frozen=True)
class AdamHyperparameters:
    """What all matrices of a bucket share. ``lr`` may be a 0-d tensor on their device."""

    lr: Coefficient
    beta1: float
    beta2: float
    eps: float
    relative_eps: bool
    weight_decay: float
    scale: float
    residual_gain: float
    bounded: bool
    update_clipping: bool
    spectral_clipping: float | None
    regressor: Regressor
    bias_correction: BiasCorrection


def lorapre_adamw(bucket: Bucket, hyper: AdamHyperparameters) -> None:
    """One step of LoRA-Pre Adam for a bucket of matrices, equations (1) to (7), in place.

    The second moment is factored where the state has ``v_B`` and ``v_A``, of rank 1 where it has ``v_row`` and
    ``v_col``, else Adam's own ``exp_avg_sq``.
    """
    signs = None
    for piece in bucket.pieces():
        if signs is None and hyper.spectral_clipping is not None:
            signs = spectral.random_signs(bucket.view.q, piece.G.dtype, piece.G.device)
        _adamw_piece(piece, hyper, signs)


def _adamw_piece(piece: Piece, hyper: AdamHyperparameters, signs: Tensor | None) -> None:
    v_hat, means = _second_moment(piece, hyper)  # (n, p, q)
    eps: Coefficient = hyper.eps
    if hyper.relative_eps:
        assert means is not None
        eps = means[0].mean(dim=-2, keepdim=True).sqrt_().mul_(hyper.eps)
        eps.clamp_(min=torch.finfo(eps.dtype).tiny)  # a matrix without gradients stays as it is
    denominator = v_hat.sqrt_()
    if hyper.bounded:
        torch.threshold_(denominator, 0.0, math.inf)  # where v is 0 nothing moves; a mask takes three times as long
    divisor = torch.ones((), dtype=denominator.dtype, device=denominator.device)
    if hyper.update_clipping:
        whole = denominator if hyper.bounded else denominator.masked_fill(denominator == 0, math.inf)
        surprise = torch.div(piece.G, whole, out=piece.buffer("scratch"))
        norm = torch.linalg.vector_norm(surprise, dim=(-2, -1), keepdim=True)
        divisor = torch.maximum(divisor, norm / surprise[0].numel() ** 0.5)  # (n, 1, 1)
    update = _first_moment(piece, hyper)  # (n, p, q), bias-corrected; the gradients are gone
    if hyper.spectral_clipping is not None:
        assert means is not None
        limit = hyper.spectral_clipping * spectral.random_norm(*update.shape[1:])
        divisor = torch.maximum(divisor, spectral.norm(update, *means, signs) / limit)
    update.div_(denominator.add_(eps))
    if hyper.bounded:
        limit = factors.update_bound(hyper.beta2)
        update.clamp_(-limit, limit)
    update.mul_(-piece.on * hyper.lr * hyper.scale / divisor)
    piece.apply(update, 1.0 - piece.on * hyper.lr * hyper.weight_decay, scratch=denominator)


def momentum(
    piece: Piece,
    regressor: Regressor,
    *,
    keep: Coefficient,
    inside: Coefficient,
    outside: Coefficient,
    decay: float,
    gain: float,
) -> Tensor:
    """The factored momentum of any optimizer: what enters the update (n, p, q), and the factors one step on.

    It takes the place of the gradients, which are gone then: a copy of them would cost as much as a product.

    Args:
        piece: matrices with the state ``m_B`` and ``m_A``, or ``momentum_buffer`` in full, which advances.
        regressor: how the factors follow.
        keep: weight of the momentum of step t - 1 in the update.
        inside: weight of the gradient's part in the row space of ``m_A``.
        outside: weight of the rest of the gradient.
        decay: weight of the old momentum in the new one.
        gain: weight of the gradient in it.
    """
    G = piece.G
    if "momentum_buffer" in piece:
        M = piece["momentum_buffer"]
        new = (M * decay).add_(G * gain)
        piece["momentum_buffer"] = new if piece.enabled is None else torch.where(piece.enabled, new, M)
        return G.mul_(inside).add_(M.mul_(keep))
    B, A = piece["m_B"], piece["m_A"]
    left = regressor.project(A, G)
    if piece.sweeps:
        piece["m_B"], piece["m_A"] = regressor.advance(B, A, G, left, decay=decay, gain=gain, on=piece.enabled)
    else:
        new = subspace.on_old_basis(B, left, decay=decay, gain=gain)
        piece["m_B"] = new if piece.enabled is None else torch.where(piece.enabled, new, B)
    return factors.read_momentum(B, A, G, left, keep=keep, inside=inside, outside=outside, inplace=True)


def _first_moment(piece: Piece, hyper: AdamHyperparameters) -> Tensor:
    """mhat_t from the factors of step t - 1, which advance (equations (1), (4), (6))."""
    beta1 = hyper.beta1
    keep, inside, outside = factors.average_weights(beta1, hyper.residual_gain, piece.step)
    return momentum(piece, hyper.regressor, keep=keep, inside=inside, outside=outside, decay=beta1, gain=1.0 - beta1)


def _second_moment(piece: Piece, hyper: AdamHyperparameters) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """vhat_t (n, p, q) from the state of step t - 1, which advances; and its means by row and by column.

    None for the means where nobody asks and they would take two passes over v. Where v is of rank 1 those of the
    columns are of step t - 1, as no others are there yet when a kernel needs them.
    """
    G, beta2 = piece.G, hyper.beta2
    rate = piece.on * (1.0 - beta2)
    correction: Coefficient = 1.0 - beta2**piece.step
    if "exp_avg_sq" in piece:
        v = piece["exp_avg_sq"]
        v.mul_(1.0 - rate).addcmul_(G, G, value=1.0 - beta2)
        piece["exp_avg_sq"] = v
    elif "v_row" in piece:
        row, col = piece["v_row"], piece["v_col"]
        v, new_row, piece["v_col"] = factors.rank1_second_moment(
            row, col, G, beta2, rate, correction, out=piece.buffer("v")
        )
        piece["v_row"] = new_row
        return v, (new_row / correction, col)
    else:
        B, A = piece["v_B"], piece["v_A"]
        v = factors.second_moment(B, A, G, beta2)
        magnitude = torch.abs(G, out=piece.buffer("scratch"))
        left = hyper.regressor.project(A, magnitude)
        decay = beta2**0.5  # of the square root of v
        piece["v_B"], piece["v_A"] = hyper.regressor.advance(
            B, A, magnitude, left, decay=decay, gain=1.0 - decay, on=piece.enabled
        )
        correction = factors.second_moment_correction(beta2, piece.step, hyper.bias_correction)
    v.div_(correction)
    if hyper.spectral_clipping is None and not hyper.relative_eps:
        return v, None
    return v, (v.mean(dim=-1, keepdim=True), v.mean(dim=-2, keepdim=True))
