"""Stochastic rounding of bfloat16 weights in the Triton step: which bits, and what they are on average."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from _support import Shape, assert_same_bits, gradients, make_params, set_grads
from _triton import OPTIONS, TritonAdamW, exact_products, needs_triton, rounded_by_chance, scalars_as_bounds  # noqa: F401
from lorapre import LoRAPreAdamW

pytestmark = needs_triton


def draw(
    seed: int,
    *,
    step: float = 1.0,
    size: float = 1.0,
    shapes: tuple[Shape, ...] = ((20, 28),),
    dtype: Any = torch.bfloat16,
    device: torch.device,
) -> list[Tensor]:
    """The weights after one step from a start and a gradient (times ``size``) that are the same for every matrix."""
    params = [nn.Parameter(p.detach().bfloat16().to(dtype)) for p in make_params(shapes, torch.float32, device)]
    for param in params[1:]:
        param.data.copy_(params[0].data)
    optimizer = TritonAdamW(params, **{"rank": 4, **OPTIONS, "lr": 1e-3, "weight_decay": 2.0})
    rounded_by_chance(optimizer, seed if dtype == torch.bfloat16 else None)
    for param in params[1:]:
        for key, value in optimizer.state[param].items():
            value.copy_(optimizer.state[params[0]][key])
    for param in params:
        optimizer.state[param]["step"].fill_(step - 1.0)
        param.grad = (size * next(gradients(shapes[0], 1))).bfloat16().to(device, dtype)
    optimizer.step()
    return [param.detach().cpu() for param in params]


def test_stochastic_rounding_repeats_by_seed_and_differs_by_seed_step_and_matrix(device: torch.device) -> None:
    shapes: tuple[Shape, ...] = ((20, 28), (20, 28))
    first = draw(5, shapes=shapes, device=device)
    assert_same_bits(draw(5, shapes=shapes, device=device), first)
    # bfloat16 is coarse: half of the numbers would fall alike if the draws were independent, all if they were one
    assert (first[0] != first[1]).float().mean() > 0.05
    assert (draw(6, device=device)[0] != first[0]).float().mean() > 0.05
    # without a gradient only the weight decay is left, which is the same at every step
    at_2, at_3 = (draw(5, step=step, size=0.0, device=device)[0] for step in (2.0, 3.0))
    exact = [draw(0, step=step, size=0.0, dtype=torch.float32, device=device)[0] for step in (2.0, 3.0)]
    assert_same_bits(*exact)
    assert (at_2 != at_3).float().mean() > 0.05


def test_stochastic_rounding_gives_one_of_two_neighbours_and_the_exact_value_on_average(device: torch.device) -> None:
    count = 16
    (exact,) = draw(0, dtype=torch.float32, device=device)
    draws = torch.stack([draw(seed, device=device)[0] for seed in range(count)]).double()
    exact = exact.double()
    below = exact.abs().float().view(torch.int32).bitwise_and(-65536).view(torch.float32).double()
    spacing = (exact.abs().float().view(torch.int32).bitwise_and(-65536) + 65536).view(torch.float32).double() - below
    share = (exact.abs() - below) / spacing  # how far towards the neighbour further from zero
    up = (draws.abs() > below).double()
    outside = (draws.abs() != below) & (draws.abs() != below + spacing)
    # float32 puts some exact values on the other side of a bfloat16 number
    assert outside.double().mean() < 0.002
    assert (draws.sign() == exact.sign()).all()
    deviation = (up.mean(0) - share) / (share * (1 - share) / count).sqrt().clamp(min=0.2 / count)
    assert abs(deviation.mean().item()) < 5 / exact.numel() ** 0.5
    assert 0.8 < deviation.square().mean().item() < 1.2
    # neighbours in a row are drawn independently
    noise = up - share
    correlation = (noise[:, :, 1:] * noise[:, :, :-1]).mean() / noise.square().mean()
    assert abs(correlation.item()) < 5 / noise.numel() ** 0.5


@pytest.mark.parametrize(("seed", "capturable"), [(0, False), (1, True), (2**32 + 3, False), (2**63 - 1, True)])
@pytest.mark.parametrize("regression", ["subspace", "newton"])
def test_for_one_update_both_backends_write_the_same_bits(
    regression: str, seed: int, capturable: bool, device: torch.device
) -> None:
    options = (
        {"second_moment": "hadamard", "update_clipping": False, "spectral_clipping": None}
        if regression == "newton"
        else {}
    )
    shapes: tuple[Shape, ...] = ((20, 30), (17, 33), (2, 20, 30), (600,), (20, 30))
    results = []
    for backend, on_device in (("eager", False), ("triton", capturable)):
        params = make_params(shapes, torch.bfloat16, device)
        params[1].data = params[1].data.mT.contiguous().mT
        optimizer = LoRAPreAdamW(
            params, rank=4, lr=0.1, weight_decay=1.0, stochastic_rounding=True, backend=backend, seed=seed,
            capturable=on_device, regression=regression, **options,
        )  # fmt: skip
        for _ in range(2):  # the weights decay, and nothing else
            set_grads(params, [torch.zeros_like(param) for param in params])
            optimizer.step()
        results.append([param.detach().clone() for param in params])
    assert_same_bits(results[1], results[0])


@pytest.mark.parametrize(
    ("backend", "capturable", "second_moment"),
    [("triton", False, "full"), ("triton", True, "rank1"), ("eager", False, "rank1"), ("eager", True, "full")],
)
def test_what_is_drawn_after_a_skipped_step_is_what_a_run_without_it_draws(
    backend: str, capturable: bool, second_moment: str, device: torch.device
) -> None:
    shapes: tuple[Shape, ...] = ((10, 18), (40,))  # the second is dense
    options = {"second_moment": second_moment, "backend": backend, "capturable": capturable, "nonfinite": "skip"}
    if second_moment == "full":
        options["spectral_clipping"] = None
    results = []
    for skips in (False, True):
        params = make_params(shapes, torch.bfloat16, device)
        optimizer = LoRAPreAdamW(params, rank=2, lr=1e-3, weight_decay=1.0, stochastic_rounding=True, **options)
        for number in range(2):
            grads = [next(gradients(shape, 1, seed=number)).bfloat16() for shape in shapes]
            if skips and number == 1:
                before = [param.detach().clone() for param in params]
                set_grads(params, [torch.full_like(grad, float("nan")) for grad in grads])
                optimizer.step()
                assert_same_bits([param.detach() for param in params], before)
            set_grads(params, grads)
            optimizer.step()
        results.append([param.detach().clone() for param in params])
    assert_same_bits(results[1], results[0])
