"""The matrices that an optimizer steps: those of a Llama's layers, alone, with gradients that stay."""

from __future__ import annotations

import torch
from torch import nn

from lorapre.lab.models import LLAMAS

#: Held at once, in sizes of the weights: weights, gradients, fused AdamW's two moments, two more of another optimizer
#: and a temporary of that size, which foreach AdamW makes.
HELD = 7
#: Share of a GPU's memory that may be filled.
FILLED = 0.85


def layer_shapes(model: str) -> list[tuple[int, int]]:
    """The seven matrices of one layer: query, key, value, output; gate, up; down."""
    size = LLAMAS[model]
    d, f = size.hidden, size.mlp
    return [(d, d)] * 4 + [(f, d)] * 2 + [(d, f)]


def smallest_side(model: str) -> int:
    """A rank must be below it, or matrices of the model would not be compressed."""
    return min(min(shape) for shape in layer_shapes(model))


def fitting_layers(model: str, dtype: torch.dtype, memory: int | None) -> int:
    """Layers of ``model`` whose matrices can be stepped within ``memory`` bytes, at least one; all where it is None."""
    layers = LLAMAS[model].layers
    if memory is None:
        return layers
    each = sum(p * q for p, q in layer_shapes(model)) * dtype.itemsize
    return max(1, min(layers, int(FILLED * memory) // (HELD * each)))


class Matrices(nn.Module):
    """The matrices of some layers as parameters, each with a gradient; a module, as the lab's registry wants one."""

    def __init__(self, model: str, layers: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        generator = torch.Generator(device).manual_seed(0)
        params = []
        for shape in layer_shapes(model) * layers:
            param = nn.Parameter(torch.randn(shape, generator=generator, device=device).mul_(0.02).to(dtype))
            param.grad = torch.randn(shape, generator=generator, device=device).mul_(1e-3).to(dtype)
            params.append(param)
        self.weights = nn.ParameterList(params)
