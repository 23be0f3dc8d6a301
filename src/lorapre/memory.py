"""What a model will need in memory before it is built: weights, gradients, optimizer state, transient peak."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from lorapre import spectral
from lorapre.backends import rounding
from lorapre.backends.batches import Bucket, scratch_numel
from lorapre.backends.dispatch import foreseen
from lorapre.backends.triton import table
from lorapre.optim.adamw import LoRAPreAdamW
from lorapre.optim.backed import BackedOptimizer
from lorapre.optim.base import FactoredOptimizer, Group
from lorapre.optim.checks import sweep_interval
from lorapre.optim.dense import DenseAdamW
from lorapre.optim.lion import LoRAPreLion
from lorapre.optim.muon import LoRAPreMuon
from lorapre.optim.param_groups import param_groups
from lorapre.optim.sgd import LoRAPreSGD
from lorapre.routing import MatrixView, with_rank

#: Those whose temporaries are counted here.
_KNOWN = (LoRAPreAdamW, LoRAPreMuon, LoRAPreSGD, LoRAPreLion)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes, activations excluded (they depend on batch and sequence).

    ``state`` and ``adamw_state`` are exact; ``scratch`` bounds what ``step()`` allocates on top, for one batch
    of matrices at a time, as on a GPU (gradients, momentum and more in float32 or wider, and the factors), or all dense
    parameters of a group. Where the kernels step, it is what they allocate.
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
    model: nn.Module | Iterable[dict[str, Any]],
    rank: int | float | None = None,
    *,
    optimizer: type[FactoredOptimizer] = LoRAPreAdamW,
    device: torch.device | str | None = None,
    **options: Any,
) -> MemoryEstimate:
    """Memory of training ``model`` with ``optimizer``; nothing is allocated.

    Args:
        model: a module, on any device (build it under ``torch.device("meta")`` to pay nothing), or parameter
            groups as `lorapre.param_groups` returns them.
        rank: as in the optimizer; ignored groups that set their own keep it.
        optimizer: `LoRAPreAdamW`, `LoRAPreMuon`, `LoRAPreSGD` or `LoRAPreLion`.
        device: where the model is to be trained, such as "cuda"; it need not be here. ``backend="auto"`` then means
            what it takes there, if triton is installed. None counts the most that any device takes, which is batched
            torch on a GPU; only the scratch depends on it.
        **options: other options of the optimizer, such as ``second_moment`` or ``state_dtype``.

    Raises:
        ValueError: an option is out of range.
        TypeError: ``optimizer`` is another class, or does not have an option.
    """
    if not issubclass(optimizer, _KNOWN):
        known = ", ".join(kind.__name__ for kind in _KNOWN)
        raise TypeError(f"The memory of {optimizer.__name__} is not known. Give one of {known}.")
    groups = param_groups(model) if isinstance(model, nn.Module) else [dict(group) for group in model]
    params: list[Tensor] = []
    for group in groups:
        given = group["params"]
        entries = [given] if isinstance(given, Tensor) else list(given)
        tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in entries]
        meta = [nn.Parameter(tensor.detach().to("meta")) for tensor in tensors]
        params += meta
        group["params"] = [
            (entry[0], tensor) if isinstance(entry, tuple) else tensor
            for entry, tensor in zip(entries, meta, strict=True)
        ]
    if rank is not None:
        options["rank"] = rank
    built = optimizer(groups, **options)
    summary = built.summary()
    gradients = sum(param.numel() * param.element_size() for param in params)
    every = model.parameters() if isinstance(model, nn.Module) else params  # frozen ones are weights too
    return MemoryEstimate(
        weights=sum(param.numel() * param.element_size() for param in every),
        gradients=gradients,
        state=summary.state_bytes,
        adamw_state=summary.adamw_bytes,
        scratch=scratch_bytes(built, device) or 0,
    )


def scratch_bytes(optimizer: Optimizer, device: torch.device | str | None = None) -> int | None:
    """A bound of what ``step()`` of ``optimizer`` allocates on ``device``, by default that of its parameters.

    None for other people's optimizers, whose temporaries nobody has counted; torch's AdamW is known.
    """
    if type(optimizer) is torch.optim.AdamW:
        return max((_adamw_scratch(_dense_sizes(group), group) for group in optimizer.param_groups), default=0)
    if not isinstance(optimizer, _KNOWN):
        return None
    # Matrices and what is dense are updated one after the other, piece by piece and group by group.
    peaks = [0]
    # Buffers of a matrix's size are shared by all that have one dtype; the rest is freed after each piece.
    buffers: dict[tuple[int, torch.device], int] = {}
    given = None if device is None else torch.device(device)
    rest = 0
    kernels = _KernelScratch()
    for group in optimizer.param_groups:
        buckets: Counter[tuple[_Kind, torch.device, int]] = Counter()
        dense, rounded = [], [0]
        for param in group["params"]:
            kind, place = _kind_of(param, optimizer, group), given or param.device
            if kind.view is None and isinstance(optimizer, DenseAdamW):
                dense.append(kind)
                rounded.append(_rounding_scratch(param, group, place))
            elif kind.view is not None and _by_kernels(param, kind.view, optimizer, group, place):
                kernels.add(param, kind.view, optimizer, group)
            elif kind.numel:
                buckets[kind, place, _rounding_scratch(param, group, place)] += 1
        peaks.append(_adamw_scratch(dense, group, max(rounded)))
        for (kind, place, by_chance), count in buckets.items():
            together = min(count, max(1, scratch_numel(place) // kind.numel))
            shared, own = _at_once(kind, optimizer, group, place)
            buffers[kind.width, place] = max(buffers.get((kind.width, place), 0), together * shared)
            rest = max(rest, together * own + by_chance)
    return max(*peaks, kernels.peak, sum(buffers.values()) + rest)


def _by_kernels(
    param: Tensor, view: MatrixView, optimizer: FactoredOptimizer, group: Group, device: torch.device
) -> bool:
    """Whether kernels step ``param`` on ``device``."""
    if not isinstance(optimizer, BackedOptimizer):
        return False
    state = {key: [value] for key, value in optimizer.state[param].items() if key != "step"}
    bucket = Bucket(view, [param], [param], state, 1.0, group["maximize"])
    return foreseen(bucket, optimizer._hyperparameters(group, param.device), group["backend"], device.type)


@dataclass
class _KernelScratch:
    """What the kernels hold for all matrices that they step: in turns, where that is above a limit."""

    weights: int = 0
    factors: int = 0
    largest: int = 0
    at_once: int = 0
    high: bool = False
    iterates: Counter[tuple[MatrixView, torch.dtype]] = field(default_factory=Counter)

    def add(self, param: Tensor, view: MatrixView, optimizer: FactoredOptimizer, group: Group) -> None:
        """Count one parameter."""
        if group["regression"] == "newton":
            rank = group.get("second_moment_rank")
            each = table.newton_scratch_bytes(view, view.rank if rank is None else with_rank(view, rank).rank)
        else:
            sketched = group.get("spectral_clipping") is not None
            dtype = optimizer._state_dtype(param, group)
            kinds = (True,) if sweep_interval(group) == 1 else (True, False)
            each = max(table.scratch_bytes(view, dtype, sketched=sketched, sweeps=sweeps) for sweeps in kinds)
            if view.rank > table.KERNEL_RANK:
                self.high, self.at_once = True, max(self.at_once, table.high_rank_bytes(view))
        self.weights += param.numel() * param.element_size()
        self.factors += each
        self.largest = max(self.largest, each)
        if isinstance(optimizer, LoRAPreMuon):
            iterates = optimizer._hyperparameters(group, param.device).iterates_in(param)
            self.iterates[view, iterates or torch.float32] += 1

    @property
    def peak(self) -> int:
        """Factors of as many as the limit allows or of the largest one, and of one batch iterates or what is copied."""
        batches = (
            table.muon_scratch_bytes(view, dtype, self.weights, count) for (view, dtype), count in self.iterates.items()
        )
        limit = table.high_rank_limit(self.weights) if self.high else table.scratch_limit(self.weights)
        return max(self.largest, min(self.factors, limit)) + max(self.at_once, max(batches, default=0))


@dataclass(frozen=True)
class _Kind:
    """Parameters that are alike: how they are compressed, their size, and bytes of a number of weight and state.

    ``width`` is that of the arithmetic.
    """

    view: MatrixView | None
    shape: torch.Size
    weight_width: int
    state_width: int
    width: int

    @property
    def numel(self) -> int:
        return self.shape.numel()


def _kind_of(param: Tensor, optimizer: FactoredOptimizer, group: Group) -> _Kind:
    state_dtype = optimizer._state_dtype(param, group)
    width = torch.promote_types(torch.promote_types(param.dtype, state_dtype), torch.float32).itemsize
    return _Kind(optimizer._view(param, group), param.shape, param.element_size(), state_dtype.itemsize, width)


def _rounding_scratch(param: Tensor, group: Group, device: torch.device) -> int:
    """What stochastic rounding of one parameter holds."""
    by_chance = group["stochastic_rounding"] and param.dtype == torch.bfloat16
    return rounding.scratch_bytes(param.numel(), device) if by_chance else 0


def _dense_sizes(group: Group) -> Iterator[_Kind]:
    """torch's AdamW keeps its state in the weights' dtype, and computes in it."""
    for param in group["params"]:
        size = param.element_size()
        yield _Kind(None, param.shape, size, size, size)


def _adamw_scratch(kinds: Iterable[_Kind], group: Group, rounded: int = 0) -> int:
    """torch's AdamW for one group, on weights and states that are widened first; ``rounded`` is held afterwards."""
    largest = together = copies = 0
    for kind in kinds:
        size = kind.numel * kind.width
        largest, together = max(largest, size), together + size
        copies += 2 * size * ((kind.weight_width < kind.width) + (kind.state_width < kind.width))
    # One by one, or as lists; fused it needs nothing.
    negated = group["maximize"]
    return copies + max(rounded, 0 if group["capturable"] else max((3 + negated) * largest, (1 + negated) * together))


def _at_once(kind: _Kind, optimizer: FactoredOptimizer, group: Group, device: torch.device) -> tuple[int, int]:
    """Bytes that the update of one parameter holds at once, outside AdamW: in shared buffers, and besides."""
    view, width = kind.view, kind.width
    narrow = kind.weight_width < width
    if view is None:  # the gradient; the momentum old and new, and a term of its sum
        return width * kind.numel, 3 * width * kind.numel
    dense = width * view.p * view.q
    reflections = group["regression"] == "subspace" and device.type == "cpu"
    factors = _factor_scratch(view, width, reflections=reflections)
    shared = 1  # the gradients, whose place the update takes
    if isinstance(optimizer, LoRAPreAdamW):
        second = group["second_moment"]
        if second == "hadamard" and group["second_moment_rank"] is not None:
            of_v = with_rank(view, group["second_moment_rank"])
            factors = max(factors, _factor_scratch(of_v, width, reflections=reflections))
        shared += (second == "rank1") + (second == "hadamard" or group["update_clipping"])  # v; |G| or G / sqrt(v)
        if group["spectral_clipping"] is not None:
            # Signs in 64 bits, twice, and scaled; the sketch.
            factors = max(factors, spectral.COLUMNS * ((16 + 2 * width) * view.q + 2 * width * view.p))
        own = dense * ((second != "rank1") + (group["update_clipping"] and not group["bounded"])) + factors
    elif isinstance(optimizer, LoRAPreMuon):
        # Two of the iteration's matrices and two of its Gram matrices.
        own = max(factors, 2 * dense + 2 * width * min(view.p, view.q) ** 2)
    else:
        own = max(factors, dense * narrow)
    return view.batch * shared * dense, view.batch * own


def _factor_scratch(view: MatrixView, width: int, *, reflections: bool) -> int:
    """Bytes of what advancing the factors of one matrix holds at once, beside the gradient.

    Copies of the factors, projections and targets or bases. Besides, bases by Householder's ``reflections`` or, in
    float64, factors, right-hand sides or bases before and after a pass, and r x r matrices with their decompositions.
    """
    p, q, r = view.p, view.q, view.rank
    besides = 3 * width * (max(p, q) + r) * r if reflections else 24 * max(p, q) * r + 48 * r * r
    return 5 * width * (p + q) * r + besides
