"""The promise in bytes: what the state holds, what summary() says of it, what estimate_memory() predicts."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from _contract import ADAMW, LION, MUON, MUON_ROWS, PAPER, SGD, Kind
from _support import Shape, make_params, random_grads, set_grads
from lorapre import LoRAPreAdamW, MemoryEstimate, estimate_memory, param_groups
from lorapre.backends import batches
from lorapre.optim.checks import SWEEP_INTERVAL
from lorapre.optim.summary import format_bytes


def storage_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the storages behind all state tensors, each counted once."""
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
    }
    return sum(storages.values())


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """What ``step`` allocates at most beyond what is allocated already."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
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


DTYPES = [(torch.float32, None, 4), (torch.bfloat16, None, 4), (torch.float64, None, 8)]
DTYPES += [(torch.float32, torch.bfloat16, 2), (torch.bfloat16, torch.float64, 8)]


#: Numbers of state of one p x q matrix at rank r, apart from the step.
NUMBERS: list[tuple[Kind, Callable[[int, int, int], int]]] = [
    (Kind("rank1", LoRAPreAdamW, {"second_moment": "rank1"}), lambda p, q, r: (p + q) * (r + 1)),
    (Kind("hadamard", LoRAPreAdamW, {"second_moment": "hadamard"}), lambda p, q, r: 2 * (p + q) * r),
    (
        Kind("hadamard of rank 2", LoRAPreAdamW, {"second_moment": "hadamard", "second_moment_rank": 2}),
        lambda p, q, r: (p + q) * (r + 2),
    ),
    (Kind("full", LoRAPreAdamW, {"second_moment": "full"}), lambda p, q, r: (p + q) * r + p * q),
    (PAPER, lambda p, q, r: 2 * (p + q) * r),
    (MUON, lambda p, q, r: (p + q) * r + max(p, q)),
    (MUON_ROWS, lambda p, q, r: (p + q) * r + p),
    (SGD, lambda p, q, r: (p + q) * r),
    (LION, lambda p, q, r: (p + q) * r),
]


@pytest.mark.parametrize(("kind", "numbers"), NUMBERS, ids=lambda value: str(value) if isinstance(value, Kind) else "")
@pytest.mark.parametrize(("dtype", "state_dtype", "itemsize"), DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "matrices", "p", "q", "options"),
    [
        ((64, 96), 1, 64, 96, {}),
        ((96, 40), 1, 96, 40, {}),
        ((3, 64, 96), 3, 64, 96, {}),
        ((64, 16, 3, 3), 1, 64, 144, {}),
        ((64, 16, 3), 1, 64, 48, {"view_3d": "flatten"}),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
def test_a_matrix_costs_what_its_factors_hold_and_a_step(
    kind: Kind,
    numbers: Callable[[int, int, int], int],
    shape: Shape,
    matrices: int,
    p: int,
    q: int,
    options: dict[str, Any],
    dtype: torch.dtype,
    state_dtype: torch.dtype | None,
    itemsize: int,
    device: torch.device,
) -> None:
    params = make_params([shape], dtype, device)
    optimizer = kind(params, rank=8, state_dtype=state_dtype, **options)
    expected = matrices * numbers(p, q, 8) * itemsize + 4
    assert storage_bytes(optimizer) == expected
    set_grads(params, random_grads(params, 0))
    optimizer.step()
    assert storage_bytes(optimizer) == expected, "a step adds nothing"
    summary = optimizer.summary()
    assert summary.state_bytes == summary.compressed_bytes == expected
    assert summary.adamw_bytes == 2 * matrices * p * q * itemsize
    assert (summary.compressed_tensors, summary.dense_tensors) == (1, 0)
    if kind.is_adamw:
        estimate = estimate_memory([{"params": params, **options}], 8, state_dtype=state_dtype, **kind.options)
        assert estimate.state == expected
        assert estimate.adamw_state == summary.adamw_bytes
        assert estimate.weights == estimate.gradients == params[0].numel() * params[0].element_size()


@pytest.mark.parametrize("kind", [ADAMW, MUON, SGD, LION], ids=str)
def test_a_dense_parameter_costs_what_torchs_class_or_lion_holds(kind: Kind, device: torch.device) -> None:
    params = make_params([(16, 24), (11,), (9, 9)], torch.float32, device)
    optimizer = kind([{"params": params[:1]}, {"params": params[1:], "compress": False}], rank=2)
    moments = 2 if kind in (ADAMW, MUON) else 1  # Muon's dense parameters are AdamW's
    assert optimizer.summary().dense_bytes == moments * (11 + 81) * 4 + 2 * 4
    assert storage_bytes(optimizer) == optimizer.summary().state_bytes


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.body = nn.ModuleList([nn.Linear(24, 64), nn.Linear(64, 24), nn.Conv1d(24, 24, 3), nn.LayerNorm(24)])
        self.head = nn.Linear(24, 50)


def test_summary_and_estimate_agree_with_the_storages_of_a_whole_model(device: torch.device) -> None:
    model = Model().to(device)
    optimizer = LoRAPreAdamW(param_groups(model, rank=4))
    summary = optimizer.summary()
    assert summary.state_bytes == storage_bytes(optimizer) == summary.compressed_bytes + summary.dense_bytes
    assert summary.compressed_tensors == 3
    assert summary.dense_tensors == len(list(model.parameters())) - 3
    on_meta = Model().to("meta")
    estimate = estimate_memory(on_meta, rank=4)
    assert estimate.state == summary.state_bytes
    assert estimate == estimate_memory(param_groups(model, rank=4)) == estimate_memory(model, rank=4)
    assert estimate.weights == 4 * sum(param.numel() for param in model.parameters())
    assert estimate.total == estimate.weights + estimate.gradients + estimate.state + estimate.scratch
    assert estimate_memory(model, rank=4, second_moment="full").state > estimate.state
    named = [{"params": list(model.named_parameters())}]
    assert estimate_memory(named, rank=4).state < estimate.state, "without param_groups the head is compressed too"
    assert isinstance(named[0]["params"][0][1], nn.Parameter)
    assert named[0]["params"][0][1].device == torch.empty(0, device=device).device, "the given groups are not changed"


def test_frozen_weights_are_weights_without_gradients_or_state() -> None:
    model = Model()
    model.embed.requires_grad_(False)
    frozen = 4 * model.embed.weight.numel()
    estimate = estimate_memory(model, rank=4)
    assert estimate.weights == 4 * sum(param.numel() for param in model.parameters())
    assert estimate.gradients == estimate.weights - frozen


def test_estimating_allocates_nothing_and_validates() -> None:
    with torch.device("meta"):
        huge = nn.Sequential(nn.Linear(2**17, 2**17), nn.Linear(2**17, 2**17))  # 137 GB
    estimate = estimate_memory(huge, rank=128, second_moment="hadamard")
    assert estimate.state == 2 * (2 * 2**18 * 128 * 4 + 4) + 2 * (2 * 2**17 * 4 + 4)
    assert estimate.scratch >= 3 * 4 * 2**34
    with pytest.raises(ValueError, match="rank: 0"):
        estimate_memory(huge, rank=0)


square, tall = (128, 128), (512, 32)
SCRATCH_CASES: list[tuple[list[Shape], int, torch.dtype, dict[str, Any]]] = [
    ([square], 8, torch.float32, {}),
    ([square], 32, torch.float32, {}),
    ([square], 127, torch.float32, {}),
    ([square] * 4, 32, torch.float32, {}),
    ([(4, *square)], 32, torch.float32, {}),
    ([tall], 30, torch.float32, {}),
    ([square], 32, torch.bfloat16, {}),
    ([square], 32, torch.float64, {}),
    ([square], 32, torch.float32, {"state_dtype": torch.bfloat16}),
    ([square], 32, torch.float32, {"capturable": True}),
    ([square], 32, torch.float32, {"second_moment": "full"}),
    ([square], 32, torch.float32, {"second_moment": "hadamard"}),
    ([square] * 4, 32, torch.float32, {"second_moment": "hadamard", "regression": "newton"}),
    ([square], 127, torch.float32, {"second_moment": "hadamard", "regression": "newton"}),
    ([square], 32, torch.float32, {"regression": "tangent"}),
    ([square], 32, torch.float32, {"regression": "newton"}),
    ([square], 32, torch.float32, {"residual_gain": None, "eps_mode": "absolute"}),
    ([square], 32, torch.bfloat16, {"second_moment": "full", "state_dtype": torch.bfloat16}),
    ([(16, 16), (20_000,), (30_000,)], 4, torch.float32, {}),
    ([(16, 16), (20_000,), (30_000,)], 4, torch.float32, {"maximize": True}),
    ([(16, 16), (20_000,), (30_000,)], 4, torch.float32, {"capturable": True}),
    ([(16, 16), (20_000,), (30_000,)], 4, torch.bfloat16, {}),
    ([(16, 16), *[(20_000,)] * 8], 4, torch.bfloat16, {"state_dtype": torch.bfloat16}),
]


@pytest.mark.parametrize(("shapes", "rank", "dtype", "options"), SCRATCH_CASES, ids=str)
def test_the_scratch_estimate_bounds_what_a_step_allocates_and_is_no_fantasy(
    shapes: list[Shape], rank: int, dtype: torch.dtype, options: dict[str, Any], device: torch.device
) -> None:
    params = make_params(shapes, dtype, device)
    optimizer = LoRAPreAdamW(params, rank=rank, **options)
    set_grads(params, random_grads(params, 0))
    optimizer.step()  # libraries allocate their workspaces once
    peak = 0
    for step in range(1, 1 + SWEEP_INTERVAL):
        set_grads(params, random_grads(params, step))
        peak = max(peak, peak_bytes(optimizer.step, device))
    estimate = estimate_memory([{"params": params}], rank, **options).scratch
    # counters, masks, norms; on the GPU also what blocks are rounded up by and cuSOLVER's own
    slack = 4096 if device.type == "cpu" else 2**20
    assert peak <= estimate + slack
    assert estimate <= 2.5 * peak + slack


def test_pieces_bound_the_scratch_of_many_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    one = estimate_memory([{"params": make_params([square], torch.float32, torch.device("cpu"))}], 16)
    params = make_params([square] * 6, torch.float32, torch.device("cpu"))
    six = estimate_memory([{"params": params}], 16)
    assert six.scratch == 6 * one.scratch
    monkeypatch.setattr(batches, "MAX_SCRATCH_NUMEL", 2 * 128 * 128)
    assert estimate_memory([{"params": params}], 16).scratch == 2 * one.scratch
    optimizer = LoRAPreAdamW(params, rank=16)
    set_grads(params, random_grads(params, 0))
    limited = peak_bytes(optimizer.step, torch.device("cpu"))
    monkeypatch.undo()
    assert limited < 0.5 * peak_bytes(optimizer.step, torch.device("cpu"))


def test_the_summary_reads_as_a_table_within_eighty_columns() -> None:
    params = [
        nn.Parameter(torch.empty(shape, device="meta"))
        for shape in ((4096, 4096), (4096, 4096), (11008, 4096), (8, 14336, 4096), (512, 512, 3, 3), (4096,), ())
    ]
    optimizer = LoRAPreAdamW(params, rank=128, second_moment="hadamard")
    lines = str(optimizer.summary()).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["shape", "tensors", "numbers", "rank", "state", "AdamW"]
    rows = {re.split(r"\s{2,}", line.strip())[0]: line.split()[-6:] for line in lines[1:-2]}
    assert list(rows) == ["4096 x 4096", "11008 x 4096", "8 x 14336 x 4096", "512 x 512 x 3 x 3", "4096", "scalar"]
    # 2 matrices: 2 * (2 * 8192 * 128 * 4 + 4) bytes; AdamW: 2 * 2 * 4096^2 * 4
    assert rows["4096 x 4096"] == ["33,554,432", "128", "16.78", "MB", "268.44", "MB"]
    assert rows["4096"][1] == "dense"
    assert lines[-2].startswith("compressed: 5 tensors, ")
    assert "dense: 2 tensors, 32.78 kB" in lines[-2]
    share = optimizer.summary().state_bytes / optimizer.summary().adamw_bytes
    assert f"{share:.1%} of AdamW's" in lines[-1]


def test_a_summary_of_nothing_but_empty_parameters_is_printable() -> None:
    with pytest.warns(UserWarning, match="compresses nothing"):
        optimizer = LoRAPreAdamW([nn.Parameter(torch.empty(0, 4))])
    assert "100.0% of AdamW's 0 B" in str(optimizer.summary())


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.50 kB"), (2.5e6, "2.50 MB"), (3e9, "3.00 GB"), (4.25e12, "4.25 TB")],
)
def test_bytes_are_printed_in_decimal_units(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_the_estimate_of_an_uncompressed_model_warns_its_caller_once() -> None:
    with pytest.warns(UserWarning, match="compresses nothing") as caught:
        estimate = estimate_memory(nn.Linear(4, 4), rank=4)
    assert [warning.filename for warning in caught] == [__file__]
    assert estimate.state == 2 * 20 * 4 + 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate_memory(nn.Linear(8, 8), rank=4)
    assert isinstance(estimate, MemoryEstimate)
