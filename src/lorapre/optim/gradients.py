"""May this step be taken? Every gradient must be dense and finite."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("lorapre")


class NonFiniteGradientError(RuntimeError):
    """A gradient holds inf or nan and ``nonfinite`` is "raise". The step has changed nothing."""


def check_gradients(owner: str, items: list[tuple[str, Tensor, dict[str, Any]]], *, unread: bool) -> Tensor | bool:
    """Whether this step may be taken: every gradient is dense and finite.

    Args:
        owner: the optimizer's name, for messages.
        items: label, parameter and group of every parameter that has a gradient.
        unread: leave the answer on the device; a graph cannot wait for the host.

    Returns:
        A 0-d bool tensor on the device where ``unread``; else True, or False for a step to be skipped.

    Raises:
        RuntimeError: a gradient is sparse.
        NonFiniteGradientError: one is not finite in a group whose ``nonfinite`` is "raise".
    """
    for label, param, _ in items:
        if param.grad is not None and param.grad.layout != torch.strided:
            raise RuntimeError(
                f"{owner} does not support sparse gradients (parameter {label!r}). Build its nn.Embedding with "
                "sparse=False, or give the parameter to torch.optim.SparseAdam."
            )
    grads = [param.grad for _, param, _ in items if param.grad is not None and param.grad.numel() > 0]
    if not grads:
        return True
    finite = all_finite(grads)
    if unread:
        return finite
    if finite:
        return True
    for label, param, group in items:
        if param.grad is None or bool(param.grad.isfinite().all()):
            continue
        message = f"the gradient of parameter {label!r} holds inf or nan"
        if (group["nonfinite"] or ("skip" if group["capturable"] else "raise")) == "raise":
            raise NonFiniteGradientError(
                f"{owner}: {message}. Nothing was changed. Look for the overflow, clip, or use nonfinite='skip' to "
                "leave such steps out."
            )
        logger.warning("%s skips a step: %s", owner, message)
        break
    return False


def all_finite(tensors: list[Tensor]) -> Tensor:
    """A 0-d bool tensor on the first tensor's device: no host synchronisation."""
    device = tensors[0].device
    # A maximum norm takes one launch on a GPU, and ten times as long as both extremes on a CPU; nan is an extreme.
    extremes = [extreme for tensor in tensors if tensor.device.type == "cpu" for extreme in torch.aminmax(tensor)]
    if elsewhere := [tensor for tensor in tensors if tensor.device.type != "cpu"]:
        extremes += torch._foreach_norm(elsewhere, float("inf"))
    # float16 and bfloat16 widen without loss; a large float64 must not become inf by narrowing.
    widest = torch.float64 if any(value.dtype == torch.float64 for value in extremes) else torch.float32
    return torch.stack([value.to(device, widest) for value in extremes]).isfinite().all()
