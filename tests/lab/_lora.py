"""Pairs of LoRA factors on given gradients of the weight, for the optimizers that move them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from _support import assert_same_bits, gradients
from lorapre.lab.baselines.lora_pairs import LoRAPairOptimizer, lora_pair_groups
from lorapre.lab.optimizers.measure import state_bytes

Make = Callable[..., LoRAPairOptimizer]
P, Q, R, SCALING = 9, 7, 3, 1.7


def factors(
    shape: tuple[int, int, int] = (P, Q, R), dtype: torch.dtype = torch.float64, seed: int = 3
) -> tuple[nn.Parameter, nn.Parameter]:
    """A (r, q) and B (p, r) of full rank."""
    p, q, r = shape
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((r, q), (p, r)))
    return nn.Parameter(A.to(dtype)), nn.Parameter(B.to(dtype))


def weight_gradients(steps: int, shape: tuple[int, int] = (P, Q)) -> list[Tensor]:
    return list(gradients(shape, steps))


def backpropagated(A: Tensor, B: Tensor, G: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """What the factors of W = s B A get of the gradient G of W."""
    return s * B.T @ G, s * G @ A.T


def products_after_each_step(
    optimizer: torch.optim.Optimizer, grads: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """A and B after each gradient of the weight."""
    (group,) = optimizer.param_groups
    A, B = group["params"]
    for G in grads:
        for param, grad in zip(
            (A, B), backpropagated(A.detach().double(), B.detach().double(), G, group["scaling"]), strict=True
        ):
            param.grad = grad.to(param.dtype)
        optimizer.step()
        yield A.detach().clone(), B.detach().clone()


def check_resume_has_the_same_bits(make: Make, dtype: torch.dtype) -> None:
    grads = weight_gradients(7)
    optimizer = make(list(factors(dtype=dtype)), scaling=SCALING)
    early = list(products_after_each_step(optimizer, grads[:4]))[-1]
    saved = copy.deepcopy(optimizer.state_dict())
    expected = list(products_after_each_step(optimizer, grads[4:]))
    resumed = make([nn.Parameter(value.clone()) for value in early], scaling=SCALING)
    resumed.load_state_dict(saved)
    assert_same_bits(list(products_after_each_step(resumed, grads[4:])), expected)
    assert_same_bits(resumed.state_dict()["state"], optimizer.state_dict()["state"])


def check_bfloat16_rounds_float32(make: Make) -> None:
    """One step from factors that bfloat16 holds exactly: the float32 result, rounded; the state is float32."""
    A, B = factors(dtype=torch.bfloat16)
    G = weight_gradients(1)[0].bfloat16().double()
    narrow = make([A, B], scaling=2.0)
    wide = make([nn.Parameter(A.detach().float()), nn.Parameter(B.detach().float())], scaling=2.0)
    grads = backpropagated(A.detach().double(), B.detach().double(), G, 2.0)
    before = B.detach().clone()
    for optimizer in (narrow, wide):
        a, b = optimizer.param_groups[0]["params"]
        a.grad, b.grad = (grad.bfloat16().to(a.dtype) for grad in grads)
        optimizer.step()
    rounded = [param.detach().bfloat16() for param in wide.param_groups[0]["params"]]
    assert_same_bits([A.detach(), B.detach()], rounded)
    assert not torch.equal(B, before)
    state = narrow.state_dict()["state"]
    assert_same_bits(state, wide.state_dict()["state"])


def measured_state_bytes(make: Make) -> int:
    """Of a float32 pair, after a step."""
    optimizer = make(list(factors(dtype=torch.float32)), scaling=SCALING)
    list(products_after_each_step(optimizer, weight_gradients(1)))
    return state_bytes(optimizer)


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(6, 10, bias=False), nn.Linear(10, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(torch.tanh(self.wide(x)))


def adapted(rank_pattern: dict[str, int] | None = None, **options: Any) -> peft.PeftModel:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2, lora_alpha=8, target_modules=["wide", "narrow"], rank_pattern=rank_pattern or {}, **options
    )
    return peft.get_peft_model(TwoLayers(), config)


def check_refusals(make: Make) -> None:
    A, B = factors()
    for params in ([A], [B, A], [A, nn.Parameter(torch.zeros(P))]):
        with pytest.raises(ValueError, match="in turn"):
            make(params)
    with pytest.raises(ValueError, match="float16"):
        make(list(factors(dtype=torch.float16)))
    for name, value in (("lr", -1.0), ("eps", -1.0), ("weight_decay", -0.1), ("betas", (0.9, 1.0)), ("delta", -1.0)):
        with pytest.raises(ValueError, match=name):
            make([A, B], **{name: value})
    with pytest.raises(ValueError, match="scaling"):
        make([A, B], scaling=0.0)
    optimizer = make([A, B])
    A.grad = torch.zeros_like(A)
    with pytest.raises(RuntimeError, match="both factors"):
        optimizer.step()


def check_it_moves_the_pairs_of_a_peft_model(make: Make) -> None:
    """On the gradients of autograd, as on the formula's from the gradient of the merged weights."""
    model = adapted(rank_pattern={"narrow": 3})
    for name, param in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param, std=0.1)
    x = torch.randn(5, 6)
    optimizer = make(lora_pair_groups(model))
    layers = [model.base_model.model.wide, model.base_model.model.narrow]
    merged = [
        (layer.base_layer.weight + layer.get_delta_weight("default")).detach().requires_grad_(True) for layer in layers
    ]
    (torch.tanh(x @ merged[0].T) @ merged[1].T).square().sum().backward()
    expected = []
    for layer, weight in zip(layers, merged, strict=True):
        pair = [nn.Parameter(side["default"].weight.detach().clone()) for side in (layer.lora_A, layer.lora_B)]
        alone = make(pair, scaling=layer.scaling["default"])
        expected += next(products_after_each_step(alone, [weight.grad.double()]))
    model(x).square().sum().backward()
    optimizer.step()
    found = [side["default"].weight.detach() for layer in layers for side in (layer.lora_A, layer.lora_B)]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
