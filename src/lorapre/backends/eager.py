"""LoRA-Pre in plain batched torch: every matrix of one shape at once, on any device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

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


class Passes(NamedTuple):
    """What reads or writes numbers of a matrix's size one by one: `lorapre.backends.compiled` has each in few passes.

    Attributes:
        rank1_roots: `rank1_roots`.
        roots: `roots`.
        divide: `divide`.
    """

    rank1_roots: Callable[..., tuple[Tensor, Tensor, Tensor]]
    roots: Callable[..., Tensor]
    divide: Callable[..., None]


def lorapre_adamw(bucket: Bucket, hyper: AdamHyperparameters, passes: Passes | None = None) -> None:
    """One step of LoRA-Pre Adam for a bucket of matrices, equations (1) to (7), in place.

    The second moment is factored where the state has ``v_B`` and ``v_A``, of rank 1 where it has ``v_row`` and
    ``v_col``, else Adam's own ``exp_avg_sq``. ``passes`` are `PLAIN` unless they are given.
    """
    signs = None
    for piece in bucket.pieces():
        if signs is None and hyper.spectral_clipping is not None:
            signs = spectral.random_signs(bucket.view.q, piece.G.dtype, piece.G.device)
        _adamw_piece(piece, hyper, PLAIN if passes is None else passes, signs)


def _adamw_piece(piece: Piece, hyper: AdamHyperparameters, passes: Passes, signs: Tensor | None) -> None:
    scratch = piece.buffer("scratch") if hyper.update_clipping else None
    second = _second_moment(piece, hyper, passes, scratch)
    eps: Coefficient = hyper.eps
    if hyper.relative_eps:
        eps = second.mean.sqrt_().mul_(hyper.eps)
        eps.clamp_(min=torch.finfo(eps.dtype).tiny)  # a matrix without gradients stays as it is
    divisor = torch.ones((), dtype=second.root.dtype, device=second.root.device)
    if hyper.update_clipping:
        divisor = torch.maximum(divisor, second.surprise / piece.G[0].numel() ** 0.5)  # (n, 1, 1)
    update = _first_moment(piece, hyper)  # (n, p, q), bias-corrected; the gradients are gone
    if signs is not None:
        assert second.means is not None
        assert hyper.spectral_clipping is not None
        limit = hyper.spectral_clipping * spectral.random_norm(*update.shape[1:])
        divisor = torch.maximum(divisor, spectral.norm(update, *second.means, signs) / limit)
    bound = factors.update_bound(hyper.beta2) if hyper.bounded else None
    passes.divide(update, second.root, eps, bound, -piece.on * hyper.lr * hyper.scale / divisor)
    piece.apply(update, 1.0 - piece.on * hyper.lr * hyper.weight_decay, scratch=second.root)


def roots(v: Tensor, G: Tensor, bounded: bool, scratch: Tensor | None) -> Tensor:
    """sqrt(v) in v's place (n, p, q), inf where it is 0 and ``bounded``; the norm (n, 1, 1) of G over it.

    Without ``scratch`` (n, p, q) nobody asks for the norm, and it is 0.
    """
    root = v.sqrt_()
    if bounded:
        torch.threshold_(root, 0.0, math.inf)  # where v is 0 nothing moves; a mask takes three times as long
    if scratch is None:
        return torch.zeros((), dtype=v.dtype, device=v.device)
    whole = root if bounded else root.masked_fill(root == 0, math.inf)
    norm: Tensor = torch.linalg.vector_norm(torch.div(G, whole, out=scratch), dim=(-2, -1), keepdim=True)
    return norm


def rank1_roots(
    row: Tensor,
    col: Tensor,
    G: Tensor,
    beta2: float,
    rate: Coefficient,
    correction: Coefficient,
    bounded: bool,
    scratch: Tensor | None,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`factors.rank1_second_moment` and `roots` of it in ``out``: the means one step on, and the norm."""
    v, new_row, new_col = factors.rank1_second_moment(row, col, G, beta2, rate, correction, out=out)
    return new_row, new_col, roots(v, G, bounded, scratch)


def divide(update: Tensor, root: Tensor, eps: Coefficient, bound: float | None, factor: Tensor) -> None:
    """update <- factor * update / (root + eps), its elements before the factor at most ``bound``; ``root`` is spent."""
    update.div_(root.add_(eps))
    if bound is not None:
        update.clamp_(-bound, bound)
    update.mul_(factor)


PLAIN = Passes(rank1_roots, roots, divide)


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


class _SecondMoment(NamedTuple):
    """Of step t; (n, p, q) or (n, 1, 1).

    Attributes:
        root: sqrt(vhat_t), inf where it is 0 and updates are bounded.
        mean: of vhat_t, where eps is relative to it.
        surprise: norm of G / sqrt(vhat_t), where updates are divided by it.
        means: of v by row and by column, where updates are clipped by their spectrum. Where v is of rank 1 those of the
            columns are of step t - 1, as no others are there yet when a kernel needs them.
    """

    root: Tensor
    mean: Tensor
    surprise: Tensor
    means: tuple[Tensor, Tensor] | None


def _second_moment(piece: Piece, hyper: AdamHyperparameters, passes: Passes, scratch: Tensor | None) -> _SecondMoment:
    """vhat_t from the state of step t - 1, which advances."""
    G, beta2 = piece.G, hyper.beta2
    rate = piece.on * (1.0 - beta2)
    correction: Coefficient = 1.0 - beta2**piece.step
    if "v_row" in piece:
        row, col, v = piece["v_row"], piece["v_col"], piece.buffer("v")
        new_row, piece["v_col"], surprise = passes.rank1_roots(
            row, col, G, beta2, rate, correction, hyper.bounded, scratch, v
        )
        piece["v_row"] = new_row
        rows = new_row / correction
        return _SecondMoment(v, rows.mean(dim=-2, keepdim=True), surprise, (rows, col))
    if "exp_avg_sq" in piece:
        v = piece["exp_avg_sq"]
        v.mul_(1.0 - rate).addcmul_(G, G, value=1.0 - beta2)
        piece["exp_avg_sq"] = v
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
    mean = v.mean(dim=(-2, -1), keepdim=True)
    means = None
    if hyper.spectral_clipping is not None:
        means = v.mean(dim=-1, keepdim=True), v.mean(dim=-2, keepdim=True)
    return _SecondMoment(v, mean, passes.roots(v, G, hyper.bounded, scratch), means)
