"""Variants of LoRAPreAdamW that the study compares with it and the library does not have."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorapre import LoRAPreAdamW, factors
from lorapre.backends.batches import Piece
from lorapre.backends.eager import AdamHyperparameters
from lorapre.backends.opened import Opened
from lorapre.optim.base import Work

#: Growth of the residual's norm from one step to the next at most (Fira's gamma, arXiv 2410.01623).
MOST_GROWTH = 1.01


class FiraScaled(LoRAPreAdamW):
    """The gradient's part outside the subspace is scaled by Fira's ratio of norms instead of divided by sqrt(v).

    The ratio is that of a column (of the longer side) of the tracked momentum divided by sqrt(v) to the same column of
    P(G); Fira's limiter holds the growth of the scaled part's norm (arXiv 2410.01623). ``residual_gain`` multiplies it,
    1 being Fira, and divides the whole above 1 as it does in LoRAPreAdamW. Spectral clipping is for another update
    and has to be off.
    """

    def _open(self, work: Work) -> Opened:
        norms: dict[tuple[int, int], Tensor] = self.__dict__.setdefault("_residual_norms", {})

        def proceed(enabled: Tensor | None) -> None:
            for buckets, group in work:
                hyper = self._hyperparameters(group, buckets[0].params[0].device)
                for bucket in buckets:
                    for number, piece in enumerate(bucket.where(enabled).pieces()):
                        key = id(bucket.params[0]), number
                        norms[key] = fira_scaled_step(piece, hyper, norms.get(key))

        return Opened(proceed)


def fira_scaled_step(piece: Piece, hyper: AdamHyperparameters, before: Tensor | None) -> Tensor:
    """An enabled step of `FiraScaled`; the norms (n, 1, 1) of the scaled residuals, ``before`` those of the last."""
    G, beta1, gain = piece.G, hyper.beta1, hyper.residual_gain  # (n, p, q)
    if hyper.spectral_clipping is not None:
        raise ValueError("Fira's scaling is compared without spectral clipping: give spectral_clipping=None.")
    v, piece["v_row"], piece["v_col"] = factors.rank1_second_moment(
        piece["v_row"], piece["v_col"], G, hyper.beta2, 1.0 - hyper.beta2, 1.0 - hyper.beta2**piece.step
    )
    tiny, denominator = torch.finfo(v.dtype).tiny, v.sqrt()
    surprise = (G / denominator.clamp(min=tiny)).square().mean(dim=(-2, -1), keepdim=True).sqrt()
    denominator = denominator + hyper.eps * v.mean(dim=(-2, -1), keepdim=True).sqrt()
    denominator = denominator.clamp(min=tiny)
    B, A = piece["m_B"], piece["m_A"]
    left = hyper.regressor.project(A, G)
    projected = torch.bmm(left, A)
    whole = factors.first_moment_correction(beta1, piece.step)
    tracked = torch.bmm(B * (beta1 / whole) + left * ((1.0 - beta1) / whole), A) / denominator
    limit = factors.update_bound(hyper.beta2)
    tracked = tracked.clamp(-limit, limit)
    side = -2 if G.shape[-2] <= G.shape[-1] else -1
    ratio = _norm(tracked, side) / _norm(projected, side).clamp(min=tiny)
    residual = (G - projected) * ratio
    norm = _norm(residual, (-2, -1))
    if before is not None:
        allowed = torch.where(before > 0, before * MOST_GROWTH, norm)
        residual = residual * (allowed / norm.clamp(min=tiny)).clamp(max=1.0)
        norm = torch.minimum(norm, allowed)
    piece["m_B"], piece["m_A"] = hyper.regressor.advance(B, A, G, left, decay=beta1, gain=1.0 - beta1)
    update = (tracked + residual * gain) / max(1.0, gain)
    if hyper.update_clipping:
        update = update / surprise.clamp(min=1.0)
    piece.apply(update * (-hyper.lr * hyper.scale), 1.0 - hyper.lr * hyper.weight_decay)
    return norm


def _norm(X: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    return torch.linalg.vector_norm(X, dim=dim, keepdim=True)


#: By the names that stand after `study.profiles.AS`.
PROTOTYPES: Mapping[str, type[LoRAPreAdamW]] = {
    "fira-scaled": FiraScaled,
}
