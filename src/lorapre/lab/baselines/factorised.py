"""What the weight-factorised baselines share: a linear layer whose weight is made of smaller parts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from lorapre import param_groups
from lorapre.lab.errors import UserError
from lorapre.routing import matrix_view

_Model = TypeVar("_Model", bound=nn.Module)


class FactorisedLinear(nn.Module):
    """A linear map y = x W^T + b, W (out_features, in_features) = ``merged_weight()``."""

    in_features: int
    out_features: int
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Linear) -> None:
        """Take the shape and the bias over from ``layer``."""
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias

    def merged_weight(self) -> Tensor:
        """The (out_features, in_features) weight that the layer applies."""
        raise NotImplementedError

    def factors(self) -> list[tuple[str, nn.Parameter]]:
        """Names and trainable parameters of which the weight is made, the bias left out."""
        return [(name, param) for name, param in self.named_parameters() if name != "bias" and param.requires_grad]

    def extra_repr(self) -> str:
        """Shapes, for ``print(model)``."""
        parts = ", ".join(f"{name}={tuple(param.shape)}" for name, param in self.named_parameters(recurse=False))
        return f"in_features={self.in_features}, out_features={self.out_features}, {parts}"


def seeded_generator(seed: int, key: str) -> torch.Generator:
    """A CPU generator that depends on ``seed`` and ``key`` alone: the same draws in every process."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def drawn_like(weight: Tensor, values: Tensor) -> nn.Parameter:
    """``values``, drawn on the CPU, as a parameter of the dtype and on the device of ``weight``."""
    return nn.Parameter(values.to(device=weight.device, dtype=weight.dtype))


def factorise(
    model: nn.Module, rank: int | float, replace: Callable[[str, nn.Linear, int], FactorisedLinear]
) -> list[FactorisedLinear]:
    """Put ``replace(name, layer, r)`` in the place of every attention and MLP linear layer above ``rank``.

    Those are the linear layers whose weight is a matrix of `lorapre.param_groups` (not the head) and whose smaller
    side is above r = `lorapre.routing.resolve_rank`. The others stay, and are trained in full; so do stacks of
    experts, which are no ``nn.Linear``. Returns the new layers, in the order of ``model.named_modules()``.

    Raises:
        UserError: no layer qualifies, or one shares its weight with another, which two sets of factors would part.
    """
    matrices = {
        id(param) for group in param_groups(model) if group.get("compress", True) for _, param in group["params"]
    }
    places = [
        (f"{prefix}.{name}".lstrip("."), parent, name, child)
        for prefix, parent in list(model.named_modules())
        for name, child in list(parent.named_children())
        if isinstance(child, nn.Linear) and id(child.weight) in matrices
    ]
    owners: dict[int, str] = {}
    new: list[FactorisedLinear] = []
    for full_name, parent, name, child in places:
        view = matrix_view(child.weight.shape, rank)
        if view is None:
            continue
        owner = owners.setdefault(id(child.weight), full_name)
        if owner != full_name:
            raise UserError(
                f"--model: {owner} and {full_name} share one weight, which factors of their own would part. Choose an "
                "optimizer that leaves the weights as they are, such as adamw."
            )
        layer = replace(full_name, child, view.rank)
        setattr(parent, name, layer)
        new.append(layer)
    if not new:
        raise UserError(
            f"--rank {rank}: the model has no linear layer in attention or MLP with a smaller side above it, so that "
            "no weight can be factorised. Give a smaller rank, or an optimizer that leaves the weights as they are."
        )
    return new


def restart_factor(step: int, every: int, length: int) -> float:
    """What the learning rate is multiplied by in the step after ``step`` steps, in a run restarted ``every`` steps.

    The jagged schedule of ReLoRA (arXiv 2307.05695, figure 2): ``length`` steps of linear warm-up after each restart,
    none at the start of the run, which has a warm-up of its own. It begins at 1 / (length + 1): no step is lost.
    """
    return 1.0 if step < every else min(1.0, (step % every + 1) / (length + 1))


def merge_factorised(model: _Model) -> _Model:
    """Put plain linear layers in the place of all `FactorisedLinear` of ``model``, and return it."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, FactorisedLinear):
                weight = child.merged_weight().detach()
                # On the meta device nothing is drawn: the global generator stays where it is.
                linear = nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
                linear.weight = nn.Parameter(weight)
                linear.register_parameter("bias", child.bias)
                setattr(parent, name, linear.train(child.training))
    return model
