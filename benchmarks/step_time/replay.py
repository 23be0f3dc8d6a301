"""A step captured in a CUDA graph: its replay, its memory, and whether it gives the bits of launched steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_STEPS = 2


def capture(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, int]:
    """The graph of one step, and the most bytes beyond those held that capturing it took.

    Replays hold that memory for good, in a pool of the graph's own, and allocate nothing.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    torch.cuda.synchronize()
    return graph, torch.cuda.max_memory_allocated() - held


def same_bits(module: nn.Module, optimizer: Optimizer, replayed: Callable[[], Any]) -> bool:
    """Whether steps by ``replayed`` leave the bits that launched ones leave, from the same weights and state."""
    tensors = [param.detach() for param in module.parameters()]
    tensors += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    start = [tensor.clone() for tensor in tensors]
    for _ in range(_STEPS):
        optimizer.step()
    launched = [tensor.clone() for tensor in tensors]
    _restore(tensors, start)
    for _ in range(_STEPS):
        replayed()
    same = all(_equal(tensor, other) for tensor, other in zip(tensors, launched, strict=True))
    moved = any(not _equal(tensor, other) for tensor, other in zip(tensors, start, strict=True))
    return same and moved


def _restore(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _equal(one: Tensor, other: Tensor) -> bool:
    """By bits: nan equals itself, and -0 is not 0."""
    one, other = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(one, other)
