"""What the weight-factorised baselines share: a linear layer whose weight is made of smaller parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from lorapre import param_groups

_Model = TypeVar("_Model", bound=nn.Module)


class FactorisedLinear(nn.Module):
    """A linear map y = x W^T + b, W (out_features, in_features) = ``merged_weight()``."""

    in_features: int
    out_features: int
    bias: nn.Parameter | None

    def merged_weight(self) -> Tensor:
        """The (out_features, in_features) weight that the layer applies."""
        raise NotImplementedError


def factorise(model: nn.Module, replace: Callable[[nn.Linear], FactorisedLinear | None]) -> list[FactorisedLinear]:
    """Put ``replace(layer)`` in the place of every linear layer whose weight is a matrix of `param_groups`.

    Where it gives None the layer stays. Returns the new layers, in the order of ``model.named_modules()``.
    """
    matrices = {
        id(param) for group in param_groups(model) if group.get("compress", True) for _, param in group["params"]
    }
    new: list[FactorisedLinear] = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and id(child.weight) in matrices:
                layer = replace(child)
                if layer is not None:
                    setattr(parent, name, layer)
                    new.append(layer)
    return new


def merge_factorised(model: _Model) -> _Model:
    """Put plain linear layers in the place of all `FactorisedLinear` of ``model``, and return it."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, FactorisedLinear):
                weight = child.merged_weight().detach()
                linear = nn.Linear(
                    child.in_features,
                    child.out_features,
                    bias=child.bias is not None,
                    device=weight.device,
                    dtype=weight.dtype,
                )
                with torch.no_grad():
                    linear.weight.copy_(weight)
                    if child.bias is not None and linear.bias is not None:
                        linear.bias.copy_(child.bias)
                setattr(parent, name, linear)
    return model
