"""LoRA-Pre in plain batched torch: every matrix of one shape at once, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorapre import factors
from lorapre.factors import BiasCorrection, Coefficient, DampingMode
from lorapre.routing import MatrixView

#: Largest batch of p x q scratch, in numbers (256 MiB in float32); larger buckets are updated in pieces. Three
#: such buffers live at once: the gradients, m and v.
MAX_SCRATCH_NUMEL = 2**26


@dataclass(frozen=True)
class AdamHyperparameters:
    """What all matrices of a bucket share. ``lr`` may be a 0-d tensor on their device."""

    lr: Coefficient
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    scale: float
    damping: float
    damping_mode: DampingMode
    bias_correction: BiasCorrection
    maximize: bool


@dataclass(frozen=True)
class AdamBucket:
    """Matrices of one shape, dtype and device, as lists with one entry a parameter; updated in place.

    Where the second moment is factored, ``v_Bs`` and ``v_As`` are given, otherwise ``exp_avg_sqs``.
    """

    view: MatrixView
    params: list[Tensor]
    grads: list[Tensor]
    m_Bs: list[Tensor]
    m_As: list[Tensor]
    v_Bs: list[Tensor]
    v_As: list[Tensor]
    exp_avg_sqs: list[Tensor]

    def pieces(self) -> Sequence[AdamBucket]:
        """The bucket in parts whose p x q scratch stays below ``MAX_SCRATCH_NUMEL`` (or is one parameter)."""
        size = max(1, MAX_SCRATCH_NUMEL // self.params[0].numel())
        if size >= len(self.params):
            return (self,)
        return [
            AdamBucket(
                self.view,
                *(
                    tensors[start : start + size]
                    for tensors in (
                        self.params,
                        self.grads,
                        self.m_Bs,
                        self.m_As,
                        self.v_Bs,
                        self.v_As,
                        self.exp_avg_sqs,
                    )
                ),
            )
            for start in range(0, len(self.params), size)
        ]


def gather(tensors: list[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A contiguous batch of ``shape`` (n, ...) in ``dtype``, copied from ``n`` or fewer equal parts of it."""
    batch = torch.empty((len(tensors), *tensors[0].shape), dtype=dtype, device=tensors[0].device)
    torch._foreach_copy_(list(batch.unbind(0)), tensors)
    return batch.view(shape)


def scatter(batch: Tensor, tensors: list[Tensor]) -> None:
    """The inverse of `gather`, into existing tensors, in their dtype."""
    torch._foreach_copy_(tensors, list(batch.reshape(len(tensors), *tensors[0].shape).unbind(0)))


def lorapre_adamw(
    bucket: AdamBucket, hyper: AdamHyperparameters, *, step: Coefficient, enabled: Tensor | None = None
) -> None:
    """One step of Algorithm 1 for a bucket of matrices, equations (1) to (7), in place.

    Args:
        bucket: parameters, gradients and factors; gradients are read only.
        hyper: the coefficients.
        step: number t of this step, from 1: a float, or a tensor with one entry a parameter.
        enabled: a 0-d bool tensor on the device; where False, nothing changes (the gradients are not finite).
    """
    for piece, piece_step in _with_steps(bucket, step):
        _lorapre_adamw_piece(piece, hyper, piece_step, enabled)


def _with_steps(bucket: AdamBucket, step: Coefficient) -> list[tuple[AdamBucket, Coefficient]]:
    pieces = bucket.pieces()
    if not isinstance(step, Tensor):
        return [(piece, step) for piece in pieces]
    parts = torch.split(step, [len(piece.params) for piece in pieces])
    # One coefficient a matrix, to broadcast over its rows and columns.
    return [
        (piece, part.repeat_interleave(bucket.view.batch)[:, None, None])
        for piece, part in zip(pieces, parts, strict=True)
    ]


def _lorapre_adamw_piece(
    bucket: AdamBucket, hyper: AdamHyperparameters, step: Coefficient, enabled: Tensor | None
) -> None:
    view = bucket.view
    n = len(bucket.params) * view.batch
    dtype = torch.promote_types(torch.promote_types(bucket.params[0].dtype, bucket.m_As[0].dtype), torch.float32)
    if isinstance(step, Tensor):
        step = step.to(dtype)
    on: Coefficient = 1.0 if enabled is None else enabled.to(dtype)

    G = gather(bucket.grads, (n, view.p, view.q), dtype)
    if enabled is not None:
        G = torch.where(enabled, G, 0.0)
    if hyper.maximize:
        G.neg_()
    m_B = gather(bucket.m_Bs, (n, view.p, view.rank), dtype)
    m_A = gather(bucket.m_As, (n, view.rank, view.q), dtype)
    m = factors.first_moment(m_B, m_A, G, hyper.beta1)  # (n, p, q)
    m_B, m_A = factors.advance(
        m_B,
        m_A,
        G,
        rate=on * factors.first_moment_rate(hyper.beta1),
        damping=hyper.damping,
        mode=hyper.damping_mode,
    )
    scatter(m_B, bucket.m_Bs)
    scatter(m_A, bucket.m_As)

    if bucket.exp_avg_sqs:
        v = gather(bucket.exp_avg_sqs, (n, view.p, view.q), dtype)
        v.mul_(1.0 - on * (1.0 - hyper.beta2)).addcmul_(G, G, value=1.0 - hyper.beta2)
        scatter(v, bucket.exp_avg_sqs)
        v_correction: Coefficient = 1.0 - hyper.beta2**step
    else:
        v_B = gather(bucket.v_Bs, (n, view.p, view.rank), dtype)
        v_A = gather(bucket.v_As, (n, view.rank, view.q), dtype)
        v = factors.second_moment(v_B, v_A, G, hyper.beta2)  # (n, p, q)
        v_B, v_A = factors.advance(
            v_B,
            v_A,
            G.abs_(),
            rate=on * factors.second_moment_rate(hyper.beta2),
            damping=hyper.damping,
            mode=hyper.damping_mode,
        )
        scatter(v_B, bucket.v_Bs)
        scatter(v_A, bucket.v_As)
        v_correction = factors.second_moment_correction(hyper.beta2, step, hyper.bias_correction)
    del G

    denominator = v.div_(v_correction).sqrt_().add_(hyper.eps)
    step_size = on * hyper.lr * hyper.scale / factors.first_moment_correction(hyper.beta1, step)
    m.div_(denominator).mul_(-step_size)
    if enabled is not None:
        m.masked_fill_(~enabled, 0.0)  # 0 / 0 where eps is 0, which no factor of 0 repairs
    _apply(bucket.params, m, 1.0 - on * hyper.lr * hyper.weight_decay, scratch=denominator)


def _apply(params: list[Tensor], update: Tensor, decay: Coefficient, scratch: Tensor) -> None:
    """params <- decay * params + update, rounded once where the weights are narrower than ``update``."""
    parts = list(update.view(len(params), *params[0].shape).unbind(0))
    if params[0].dtype == update.dtype:
        if isinstance(decay, Tensor) or decay != 1.0:
            torch._foreach_mul_(params, decay)
        torch._foreach_add_(params, parts)
        return
    wide = scratch.view(len(params), *params[0].shape)
    torch._foreach_copy_(list(wide.unbind(0)), params)
    wide.mul_(decay).add_(update.view_as(wide))
    scatter(wide, params)
