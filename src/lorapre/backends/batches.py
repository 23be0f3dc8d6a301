"""Parameters of one shape as one batch of matrices, and back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lorapre.backends.rounding import Rounding, round_
from lorapre.factors import Coefficient
from lorapre.routing import MatrixView

#: Largest batch of p x q scratch, in numbers (256 MiB in float32); larger buckets are updated in pieces. Three
#: such buffers live at once: the gradients, m and v.
MAX_SCRATCH_NUMEL = 2**26

#: The same on a CPU, whose caches hold such pieces: with larger ones a step takes up to twice as long.
CACHED_NUMEL = 2**21


def scratch_numel(device: torch.device) -> int:
    """Largest batch of p x q scratch on ``device``, in numbers."""
    return min(MAX_SCRATCH_NUMEL, CACHED_NUMEL) if device.type == "cpu" else MAX_SCRATCH_NUMEL


class Scratch:
    """Buffers that pieces take one after the other.

    On a CPU new memory of this size comes as new pages, which cost more than the arithmetic on them.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer of ``shape``, uninitialised. It is the same memory as all others of this ``name``."""
        key, numel = (name, dtype, device), math.prod(shape)
        if key not in self._buffers or self._buffers[key].numel() < numel:
            self._buffers.pop(key, None)  # before the larger one is there
            self._buffers[key] = torch.empty(numel, dtype=dtype, device=device)
        return self._buffers[key][:numel].view(shape)

    def clear(self) -> None:
        """Let go of all buffers."""
        self._buffers.clear()


@dataclass(frozen=True)
class Bucket:
    """Matrices of one shape, dtype and device, as lists with one entry a parameter; updated in place.

    Attributes:
        view: how each parameter is a batch of matrices.
        params: the weights.
        grads: their gradients, read only.
        state: lists of state tensors by their key.
        step: number t of this step, from 1: a float, or a tensor with one entry a parameter.
        maximize: ascend.
        sweeps: the bases of the factors move; else m_A stays, and m_B follows on it.
        enabled: a 0-d bool tensor on the device; where False, nothing changes (the gradients are not finite).
        rounding: of bfloat16 weights by chance; None rounds to nearest.
        counters: of the steps taken, one a parameter, for the optimizer to advance.
        scratch: what its pieces take their p x q buffers from.
    """

    view: MatrixView
    params: list[Tensor]
    grads: list[Tensor]
    state: dict[str, list[Tensor]]
    step: Coefficient
    maximize: bool
    sweeps: bool = True
    enabled: Tensor | None = None
    rounding: Rounding | None = None
    counters: list[Tensor] = field(default_factory=list)
    scratch: Scratch = field(default_factory=Scratch, compare=False)

    @property
    def weight_bytes(self) -> int:
        """Of all weights, which are of one shape and dtype."""
        return len(self.params) * self.params[0].numel() * self.params[0].element_size()

    def where(self, enabled: Tensor | None) -> Bucket:
        """The same with the mask ``enabled``, brought to the device; with its own where that is None."""
        return self if enabled is None else replace(self, enabled=enabled.to(self.params[0].device))

    def pieces(self) -> Iterator[Piece]:
        """The bucket in parts whose p x q scratch stays below `scratch_numel` (or is one parameter)."""
        size = max(1, scratch_numel(self.params[0].device) // max(1, self.params[0].numel()))
        for start in range(0, len(self.params), size):
            part = slice(start, start + size)
            step = self.step
            if isinstance(step, Tensor):  # one coefficient a matrix, to broadcast over its rows and columns
                step = step[part].repeat_interleave(self.view.batch)[:, None, None]
            state = {key: tensors[part] for key, tensors in self.state.items()}
            rounding = None if self.rounding is None else self.rounding.part(part)
            piece = Piece(
                self.view,
                self.params[part],
                self.grads[part],
                state,
                step,
                self.enabled,
                rounding,
                self.scratch,
                sweeps=self.sweeps,
            )
            if self.maximize:
                piece.G.neg_()
            yield piece


class Piece:
    """Part of a bucket that is updated at once, in a dtype wide enough for weights and state.

    Attributes:
        G: gradients (n, p, q) to descend along, a copy in scratch; zeros where the step is not enabled.
        step: number of this step, a float or a tensor (n, 1, 1).
        on: 1.0, or ``enabled`` as a number.
        enabled: as in `Bucket`.
        sweeps: as in `Bucket`.
    """

    def __init__(
        self,
        view: MatrixView,
        params: list[Tensor],
        grads: list[Tensor],
        state: dict[str, list[Tensor]],
        step: Coefficient,
        enabled: Tensor | None,
        rounding: Rounding | None,
        scratch: Scratch,
        *,
        sweeps: bool,
    ) -> None:
        self._view, self._params, self._state, self._rounding = view, params, state, rounding
        self.enabled, self.sweeps = enabled, sweeps
        n = len(params) * view.batch
        widest = torch.promote_types(params[0].dtype, next(iter(state.values()))[0].dtype)
        self._dtype = torch.promote_types(widest, torch.float32)
        self.step: Coefficient = step.to(self._dtype) if isinstance(step, Tensor) else step
        self.on: Coefficient = 1.0 if enabled is None else enabled.to(self._dtype)
        self._shapes = {"B": (n, view.p, -1), "A": (n, -1, view.q), "row": (n, view.p, 1), "col": (n, 1, view.q)}
        self._full = (n, view.p, view.q)
        self._scratch, self._device = scratch, params[0].device
        self.G = self.buffer("G")
        torch._foreach_copy_(list(self.G.view(len(params), *params[0].shape).unbind(0)), grads)
        if enabled is not None:
            self.G.masked_fill_(~enabled, 0.0)

    def buffer(self, name: str) -> Tensor:
        """Scratch (n, p, q), uninitialised, of this piece until the next one asks for the same ``name``."""
        return self._scratch.take(name, self._full, self._dtype, self._device)

    def __getitem__(self, key: str) -> Tensor:
        """A copy of the state ``key`` as a batch of matrices."""
        return gather(self._state[key], self._shapes.get(key.rpartition("_")[2], self._full), self._dtype)

    def __setitem__(self, key: str, batch: Tensor) -> None:
        scatter(batch, self._state[key])

    def __contains__(self, key: str) -> bool:
        return key in self._state

    def apply(self, update: Tensor, decay: Coefficient, scratch: Tensor | None = None) -> None:
        """weights <- decay * weights + update (n, p, q), rounded once where the weights are narrower than it.

        ``scratch`` is a contiguous buffer of ``update``'s size that may be overwritten.
        """
        params = self._params
        if self.enabled is not None:
            update.masked_fill_(~self.enabled, 0.0)  # 0 / 0, which no factor of 0 repairs
        parts = list(update.view(len(params), *params[0].shape).unbind(0))
        if params[0].dtype == update.dtype:
            if self._device.type == "cpu" and isinstance(decay, float):
                for param, part in zip(params, parts, strict=True):  # in one pass over the weights instead of two
                    torch.add(part, param, alpha=decay, out=param)
                return
            if isinstance(decay, Tensor) or decay != 1.0:
                torch._foreach_mul_(params, decay)
            torch._foreach_add_(params, parts)
            return
        if scratch is None:  # in the elements' order, which Muon's update of a tall matrix is not
            scratch = torch.empty_like(update, memory_format=torch.contiguous_format)
        wide = scratch.view(len(params), *params[0].shape)
        torch._foreach_copy_(list(wide.unbind(0)), params)
        if isinstance(decay, float):
            torch.add(update.view_as(wide), wide, alpha=decay, out=wide)
        else:
            wide.mul_(decay).add_(update.view_as(wide))
        if self._rounding is not None:
            self._round(wide, self._rounding)
        scatter(wide, params)

    def _round(self, wide: Tensor, rounding: Rounding) -> None:
        """Round new weights (parameters, *shape) by chance, in place; what then narrows them loses nothing."""
        for index, stream in enumerate(rounding.streams):
            step = self.step
            if isinstance(step, Tensor):  # one a matrix
                step = step[index * self._view.batch].view(())
            round_(wide[index], seed=rounding.seed, stream=stream, step=step, numel=self._view.p * self._view.q)


def gather(tensors: list[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A contiguous batch of ``shape`` (n, ...) in ``dtype``, copied from ``n`` or fewer equal parts of it."""
    batch = torch.empty((len(tensors), *tensors[0].shape), dtype=dtype, device=tensors[0].device)
    torch._foreach_copy_(list(batch.unbind(0)), tensors)
    return batch.view(shape)


def scatter(batch: Tensor, tensors: list[Tensor]) -> None:
    """The inverse of `gather`, into existing tensors, in their dtype."""
    torch._foreach_copy_(tensors, list(batch.reshape(len(tensors), *tensors[0].shape).unbind(0)))
