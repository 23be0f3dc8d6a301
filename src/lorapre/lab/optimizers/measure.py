"""Bytes that an optimizer really holds, whatever it keeps its state in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lorapre.lab.optimizers.entry import adamw_bytes


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        if is_traceable_wrapper_subclass(value):  # quantized states: codes, scales, tables
            for name in value.__tensor_flatten__()[0]:
                yield from _tensors(getattr(value, name), seen)
        else:
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item, seen)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _tensors(item, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type):  # a projector object
        yield from _tensors(vars(value), seen)


def state_bytes(optimizer: Optimizer, params: Iterable[Tensor] | None = None) -> int:
    """Bytes of the storages behind ``optimizer``'s state, of ``params`` alone if they are given.

    Tensors inside Python objects and quantized tensors are counted too, each storage once.
    """
    wanted = optimizer.state.keys() if params is None else list(params)
    seen: set[int] = set()
    storages: dict[int, int] = {}
    for param in wanted:
        if param in optimizer.state:
            for tensor in _tensors(optimizer.state[param], seen):
                storage: torch.UntypedStorage = tensor.untyped_storage()
                storages[storage.data_ptr() or id(tensor)] = storage.nbytes()
    return sum(storages.values())


def adamw_state_bytes(params: Iterable[Tensor]) -> int:
    """What torch.optim.AdamW holds for those of ``params`` that are trained."""
    return sum(adamw_bytes(param.numel(), param.element_size()) for param in params if param.requires_grad)
