"""What a model will need in memory before it is built: weights, gradients, optimizer state, transient peak."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorapre.backends.eager import MAX_SCRATCH_NUMEL
from lorapre.optim.adamw import LoRAPreAdamW
from lorapre.optim.param_groups import param_groups
from lorapre.routing import MatrixView


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes, activations excluded (they depend on batch and sequence).

    ``state`` and ``adamw_state`` are exact; ``scratch`` bounds what ``step()`` allocates on top, for one batch
    of matrices at a time (gradients, m and v in float32 or wider, and their factors) or all dense parameters of a
    group.
    """

    weights: int
    gradients: int
    state: int
    adamw_state: int
    scratch: int

    @property
    def total(self) -> int:
        """Weights, gradients, state and scratch together."""
        return self.weights + self.gradients + self.state + self.scratch


def estimate_memory(
    model: nn.Module | Iterable[dict[str, Any]], rank: int | float | None = None, **options: Any
) -> MemoryEstimate:
    """Memory of training ``model`` with `LoRAPreAdamW`; nothing is allocated.

    Args:
        model: a module, on any device (build it under ``torch.device("meta")`` to pay nothing), or parameter
            groups as `lorapre.param_groups` returns them.
        rank: as in the optimizer; ignored groups that set their own keep it.
        **options: other options of the optimizer, such as ``second_moment`` or ``state_dtype``.

    Raises:
        ValueError: an option is out of range.
    """
    groups = param_groups(model) if isinstance(model, nn.Module) else [dict(group) for group in model]
    params: list[Tensor] = []
    for group in groups:
        named = [entry if isinstance(entry, tuple) else None for entry in group["params"]]
        tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in group["params"]]
        meta = [nn.Parameter(tensor.detach().to("meta")) for tensor in tensors]
        params += meta
        group["params"] = [
            (entry[0], tensor) if entry is not None else tensor for entry, tensor in zip(named, meta, strict=True)
        ]
    if rank is not None:
        options["rank"] = rank
    optimizer = LoRAPreAdamW(groups, **options)
    summary = optimizer.summary()
    gradients = sum(param.numel() * param.element_size() for param in params)
    every = model.parameters() if isinstance(model, nn.Module) else params  # frozen ones are weights too
    return MemoryEstimate(
        weights=sum(param.numel() * param.element_size() for param in every),
        gradients=gradients,
        state=summary.state_bytes,
        adamw_state=summary.adamw_bytes,
        scratch=_scratch_bytes(optimizer),
    )


def _scratch_bytes(optimizer: LoRAPreAdamW) -> int:
    """Matrices and vectors are updated one after the other, piece by piece and group by group."""
    peaks = [0]
    buckets: Counter[tuple[MatrixView, int, int]] = Counter()
    for group in optimizer.param_groups:
        largest = together = copies = 0
        for param in group["params"]:
            view, state_dtype = optimizer._view(param, group), optimizer._state_dtype(param, group)
            width = torch.promote_types(torch.promote_types(param.dtype, state_dtype), torch.float32).itemsize
            if view is not None:
                buckets[view, param.numel(), width] += 1
                continue
            size = param.numel() * width
            largest, together = max(largest, size), together + size
            copies += 2 * size * (param.element_size() < width) + 2 * size * (state_dtype.itemsize < width)
        # torch's AdamW one by one, or as lists; fused it needs nothing
        negated = group["maximize"]
        peaks.append(copies + (0 if group["capturable"] else max((3 + negated) * largest, (1 + negated) * together)))
    for (view, numel, width), count in buckets.items():
        n = min(count, max(1, MAX_SCRATCH_NUMEL // numel)) * view.batch
        p, q, r = view.p, view.q, view.rank
        # G, m and v; factors, projections and targets; in float64: factors, one right-hand side and its solution
        # twice, and the Gram matrices with their decompositions
        factors = 5 * width * (p + q) * r + 24 * max(p, q) * r + 48 * r * r
        peaks.append(n * (3 * p * q * width + factors))
    return max(peaks)
