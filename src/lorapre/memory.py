"""What a model will need in memory before it is built: weights, gradients, optimizer state, transient peak."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lorapre.backends.eager import MAX_SCRATCH_NUMEL
from lorapre.optim.adamw import LoRAPreAdamW
from lorapre.optim.param_groups import param_groups


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes, activations excluded (they depend on batch and sequence).

    ``state`` and ``adamw_state`` are exact; ``scratch`` bounds what ``step()`` allocates on top for one batch
    of matrices at a time (gradients, m and v in float32 or wider, and their factors).
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
    """Memory of training ``model`` with :class:`LoRAPreAdamW`; nothing is allocated.

    Args:
        model: a module, on any device (build it under ``torch.device("meta")`` to pay nothing), or parameter
            groups as :func:`lorapre.param_groups` returns them.
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
    summary = LoRAPreAdamW(groups, **options).summary()
    gradients = sum(param.numel() * param.element_size() for param in params)
    every = model.parameters() if isinstance(model, nn.Module) else params  # frozen ones are weights too
    return MemoryEstimate(
        weights=sum(param.numel() * param.element_size() for param in every),
        gradients=gradients,
        state=summary.state_bytes,
        adamw_state=summary.adamw_bytes,
        scratch=_scratch_bytes(params, summary.rows),
    )


def _scratch_bytes(params: list[Tensor], rows: Iterable[Any]) -> int:
    wide = max(4, max(param.element_size() for param in params))
    largest = 0
    for row in rows:
        if row.rank is None:
            continue
        each = row.numel // row.tensors
        together = min(row.numel, max(each, MAX_SCRATCH_NUMEL // each * each))
        # gradients, m and v, and four factors with their targets, which state_bytes already counts once
        largest = max(largest, 3 * together * wide + 2 * row.state_bytes * together // row.numel)
    return largest
