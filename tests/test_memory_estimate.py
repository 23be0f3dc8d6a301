"""`estimate_memory` of every optimizer: state to the byte, and a bound of what a step allocates that is no fantasy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from _support import Shape, make_params, random_grads, set_grads
from lorapre import LoRAPreAdamW, LoRAPreLion, LoRAPreMuon, LoRAPreSGD, estimate_memory, param_groups
from lorapre.memory import scratch_bytes

CPU = torch.device("cpu")
KINDS: list[Any] = [LoRAPreAdamW, LoRAPreMuon, LoRAPreSGD, LoRAPreLion]


def peak_bytes(step: Callable[[], Any]) -> int:
    """What ``step`` allocates on the CPU at most beyond what is allocated already."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    assert changes, "the profiler recorded no allocation"
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.up, self.down = nn.Linear(24, 64), nn.Linear(64, 24)
        self.conv = nn.Conv1d(24, 24, 3)
        self.norm = nn.LayerNorm(24)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_of_each_optimizer_is_counted_to_the_byte(kind: Any) -> None:
    estimate = estimate_memory(Model(), rank=4, optimizer=kind, regression="subspace")
    matrices = [(64, 24), (24, 64), (24, 72)]
    rest = [50 * 24, 64, 24, 24, 24, 24]
    per_side = {LoRAPreAdamW: 4 + 1}.get(kind, 4)  # a row and a column of v
    longer = 1 if kind is LoRAPreMuon else 0  # a number for each row or column that is evened out
    per_dense = 2 if kind in (LoRAPreAdamW, LoRAPreMuon) else 1
    numbers = sum((p + q) * per_side + longer * max(p, q) for p, q in matrices) + per_dense * sum(rest)
    assert estimate.state == 4 * (numbers + len(matrices) + len(rest))
    assert estimate.adamw_state == 8 * (sum(p * q for p, q in matrices) + sum(rest))
    assert estimate.weights == estimate.gradients == estimate.adamw_state // 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_of_a_model_is_that_of_its_groups_with_their_own_options(kind: Any) -> None:
    model = Model()
    whole = estimate_memory(model, rank=4, optimizer=kind)
    assert whole == estimate_memory(param_groups(model, rank=4), optimizer=kind)
    assert whole.state > estimate_memory(param_groups(model, rank=2), rank=4, optimizer=kind).state
    built = kind(param_groups(model, rank=4))
    assert built.summary().state_bytes == whole.state
    assert scratch_bytes(kind(param_groups(Model().to("meta"), rank=4))) == whole.scratch
    # on a CPU bases take less
    assert 0 < (scratch_bytes(built) or 0) <= whole.scratch


def test_groups_may_be_given_in_every_form_that_the_optimizer_takes() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 48))
    whole = estimate_memory([{"params": list(model.parameters())}], rank=4)
    assert whole.state == LoRAPreAdamW(model.parameters(), rank=4).summary().state_bytes
    for params in (model.parameters(), model.named_parameters(), iter(list(model.parameters()))):
        assert estimate_memory([{"params": params}], rank=4) == whole
    weight = model[0].weight
    assert estimate_memory([{"params": weight}], rank=4) == estimate_memory([{"params": [weight]}], rank=4)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, nn.Linear])
def test_a_class_whose_memory_is_not_known_is_refused_with_those_that_are(kind: Any) -> None:
    with pytest.raises(TypeError, match=f"{kind.__name__} is not known.*LoRAPreAdamW, LoRAPreMuon, LoRAPreSGD"):
        estimate_memory(Model(), optimizer=kind)


def test_an_option_of_another_class_is_refused() -> None:
    with pytest.raises(TypeError, match="second_moment"):
        estimate_memory(Model(), optimizer=LoRAPreSGD, second_moment="full")


# Scratch.

SQUARE, TALL, WIDE = (128, 128), (512, 32), (32, 512)
BF16, F64 = torch.bfloat16, torch.float64
OPTIONS: list[tuple[Any, dict[str, Any]]] = [
    *((LoRAPreAdamW, {"regression": r, "second_moment": "rank1"}) for r in ("subspace", "tangent", "newton")),
    *((LoRAPreAdamW, {"regression": r, "second_moment": "hadamard"}) for r in ("subspace", "tangent")),
    (LoRAPreAdamW, {"regression": "subspace", "second_moment": "full"}),
    (LoRAPreAdamW, {"regression": "subspace", "second_moment": "hadamard", "second_moment_rank": 0.9}),
    (LoRAPreAdamW, {"regression": "subspace", "second_moment": "full", "residual_gain": 0.5, "capturable": True}),
    *((LoRAPreMuon, {"regression": r}) for r in ("subspace", "newton")),
    (LoRAPreMuon, {"regression": "subspace", "ns_dtype": BF16}),
    (LoRAPreMuon, {"normalization": "longer_side"}),
    *((LoRAPreSGD, {"regression": r}) for r in ("subspace", "tangent", "newton")),
    (LoRAPreSGD, {"regression": "subspace", "capturable": True}),
    (LoRAPreLion, {"regression": "subspace"}),
]
CASES: list[tuple[list[Shape], int, torch.dtype, torch.dtype | None]] = [
    ([SQUARE], 4, torch.float32, None),
    ([SQUARE], 127, torch.float32, None),
    ([SQUARE] * 3, 32, torch.float32, None),
    ([(3, *SQUARE)], 32, BF16, None),
    ([SQUARE], 32, BF16, BF16),
    ([SQUARE], 4, F64, None),
    ([(256, 256)], 1, torch.float32, None),  # all else is small beside what has its size
    ([TALL], 30, torch.float32, BF16),
    ([TALL], 4, BF16, None),
    ([WIDE], 30, torch.float32, None),
    ([WIDE], 4, F64, None),
    ([(16, 16), (20_000,), (20_000,), (30_000,)], 4, torch.float32, None),
    ([(16, 16), (20_000,), (30_000,)], 4, BF16, None),
]


@pytest.mark.parametrize(("shapes", "rank", "dtype", "state_dtype"), CASES, ids=str)
@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=str)
def test_the_scratch_estimate_bounds_what_a_step_allocates(
    kind: Any,
    options: dict[str, Any],
    shapes: list[Shape],
    rank: int,
    dtype: torch.dtype,
    state_dtype: torch.dtype | None,
) -> None:
    params = make_params(shapes, dtype, CPU)
    given = {**options, "state_dtype": state_dtype}
    optimizer = kind(params, rank=rank, **given)
    set_grads(params, random_grads(params, 0))
    optimizer.step()  # libraries allocate their workspaces once
    set_grads(params, random_grads(params, 1))
    peak = peak_bytes(optimizer.step)
    estimate = estimate_memory([{"params": params}], rank, optimizer=kind, **given).scratch
    bound = scratch_bytes(optimizer)
    assert bound is not None
    slack = 4096  # counters, masks, norms
    assert peak <= bound + slack
    assert bound <= 2.5 * peak + slack
    assert bound <= estimate <= 2.5 * bound + slack, "on a device that is not known"


@pytest.mark.parametrize("shapes", [[SQUARE] * 3, [TALL], [(3, *SQUARE)], [(16, 16), (200_000,), (30_000,)]])
@pytest.mark.parametrize("kind", KINDS)
def test_what_stochastic_rounding_holds_is_counted_and_bounded(kind: Any, shapes: list[Shape]) -> None:
    params = make_params(shapes, BF16, CPU)
    optimizer = kind(params, rank=4, stochastic_rounding=True)
    set_grads(params, random_grads(params, 0))
    optimizer.step()
    peak, bound = peak_bytes(optimizer.step), scratch_bytes(optimizer)
    assert bound is not None
    assert peak <= bound + 4096
    assert bound <= 2.5 * peak + 4096
    large, rounded = (
        estimate_memory(
            [{"params": [torch.empty(2**13, 2**13, dtype=BF16, device="meta")]}], 4, optimizer=kind, **option
        )
        for option in ({}, {"stochastic_rounding": True})
    )
    assert large.scratch < rounded.scratch < 1.2 * large.scratch


@pytest.mark.parametrize(
    ("kind", "shape"),  # vectors: torch's AdamW takes them all at once
    [*((kind, SQUARE) for kind in KINDS), (LoRAPreSGD, (20_000,)), (LoRAPreLion, (20_000,))],
)
def test_many_matrices_are_updated_in_pieces_whose_scratch_is_bounded_too(
    kind: Any, shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = make_params([(16, 16), *[shape] * 6], torch.float32, CPU)
    optimizer = kind(params, rank=4)
    set_grads(params, random_grads(params, 0))
    peak_of_six = peak_bytes(optimizer.step)
    monkeypatch.setattr("lorapre.backends.batches.MAX_SCRATCH_NUMEL", 2 * params[-1].numel())
    bound = estimate_memory([{"params": params}], 4, optimizer=kind).scratch
    peak = peak_bytes(optimizer.step)
    assert peak <= bound + 4096
    assert bound <= 2.5 * peak + 4096
    assert bound < 0.6 * peak_of_six


@pytest.mark.parametrize("shapes", [[SQUARE], [(20_000,), (30_000,)]])
def test_the_scratch_of_torchs_adamw_is_known_and_that_of_others_is_not(shapes: list[Shape]) -> None:
    params = make_params(shapes, torch.float32, CPU)
    adamw = torch.optim.AdamW(params)
    set_grads(params, random_grads(params, 0))
    adamw.step()
    bound = scratch_bytes(adamw)
    assert bound is not None
    peak = peak_bytes(adamw.step)
    assert peak <= bound + 4096
    assert bound <= 2.5 * peak + 4096
    assert scratch_bytes(torch.optim.SGD(params)) is None
