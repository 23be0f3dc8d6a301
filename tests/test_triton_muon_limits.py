"""What the Triton step of Muon costs, what it leaves to batched torch, and that it compiles for GPUs."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from _support import Shape, assert_close, snapshot
from _triton import exact_products, needs_triton, scalars_as_bounds  # noqa: F401
from lorapre import LoRAPreAdamW, LoRAPreMuon, estimate_memory
from lorapre.backends import dispatch
from lorapre.backends import triton as backend
from lorapre.backends.triton import table
from test_triton_limits import BUILD, Watch, isolated
from test_triton_muon import build, params_of, train

pytestmark = needs_triton


def test_batches_below_the_limit_change_nothing_and_launches_grow_with_shapes_alone(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorapre.backends.triton import elements

    launches: list[str] = []
    kind = type(elements.fill)
    original = kind.run

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        launches.append(self.fn.__name__)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(kind, "run", counted)
    shapes: tuple[Shape, ...] = ((2, 13, 20), (20, 13), (13, 20))
    whole, parts = (build(shapes, device) for _ in range(2))
    train(whole, 1)
    # tall ones and wide ones are different shapes and share what is not a shape's
    assert len(launches) == 18 + 2 * 4
    launches.clear()
    monkeypatch.setattr(table, "LEAST_SCRATCH", 2 * table.orthogonal_bytes(13, 20, torch.float32))
    train(parts, 1)
    assert launches.count("momentum") == 3  # two of the three wide ones, another, and the tall one
    for (W, state), (expected, its_state) in zip(snapshot(parts), snapshot(whole), strict=True):
        assert_close(W, expected, 1e-6)
        for key, value in state.items():
            assert_close(value, its_state[key], 1e-6, key)


def test_of_a_matrix_s_size_there_are_the_iterates_of_newton_schulz_alone(device: torch.device) -> None:
    optimizer = build(((24, 203),), device, ns_dtype=torch.bfloat16)
    train(optimizer, 1)  # the addresses are known from here on
    (param,) = params_of(optimizer)
    numel = 24 * 208  # up to a multiple of 8

    found: list[int] = []

    class Sizes(Watch):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = super().__torch_dispatch__(func, types, args, kwargs)
            if func is torch.ops.aten.empty.memory_format:
                found.append(out.numel() * out.itemsize)
            return out

    with Sizes([param, param.grad]) as watch:  # type: ignore[list-item]
        optimizer.step()
    assert sorted(found)[-2:] == [2 * numel] * 2
    view = optimizer._view(param, optimizer.param_groups[0])
    foreseen = table.scratch_bytes(view, torch.float32) + table.orthogonal_bytes(24, 203, torch.bfloat16)
    assert 0.9 * watch.total <= foreseen + 4096
    assert foreseen <= 1.6 * watch.total


def test_the_estimate_of_memory_follows_the_backend() -> None:
    def scratch(shape: Shape, **options: Any) -> int:
        params = [torch.empty(shape, device="meta")]
        return estimate_memory([{"params": params}], 32, optimizer=LoRAPreMuon, **options).scratch

    shape = (2048, 5461)
    kernels = scratch(shape, backend="triton")
    iterates = 2 * 2 * (2048 * 5464 + 2048**2)  # bfloat16
    assert iterates < kernels < 1.1 * iterates
    assert kernels < 0.5 * scratch(shape, backend="eager")
    # stacks of them take turns
    assert scratch((24, *shape), backend="triton") < 8 * kernels


@pytest.mark.parametrize(
    ("kind", "rank", "options", "by_kernels"),
    [
        (LoRAPreAdamW, 32, {}, True),
        (LoRAPreAdamW, 512, {"state_dtype": torch.bfloat16}, True),
        (LoRAPreAdamW, 513, {}, False),
        (LoRAPreAdamW, 32, {"regression": "tangent"}, False),
        (LoRAPreMuon, 128, {}, True),
        (LoRAPreMuon, 129, {}, False),
    ],
    ids=str,
)
def test_an_estimate_for_a_device_counts_what_auto_takes_there(
    kind: Any, rank: int, options: dict[str, Any], by_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scratch(backend: str, device: str | None) -> int:
        params = [torch.empty(2048, 5461, device="meta") for _ in range(3)]
        given = {**options, "backend": backend, "device": device}
        return estimate_memory([{"params": params}], rank, optimizer=kind, **given).scratch

    assert scratch("auto", "cuda") == scratch("triton" if by_kernels else "eager", "cuda")
    assert scratch("auto", "cpu") == scratch("eager", "cpu") <= scratch("eager", "cuda")
    assert scratch("auto", None) == scratch("eager", None) == scratch("eager", "cuda"), "the most that any takes"
    monkeypatch.setattr(backend, "installed", lambda: False)
    assert scratch("auto", "cuda") == scratch("eager", "cuda")


# Who steps.


def test_what_the_kernels_cannot_do_is_refused_in_words_and_left_to_batched_torch(
    device: torch.device, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reason(**options: Any) -> str:
        with pytest.raises(ValueError, match=r"backend='triton' cannot step .*\(13, 20\)") as raised:
            train(build(((13, 20),), device, **options), 1)
        return str(raised.value)

    assert "regression='newton'" in reason(regression="newton")
    assert "regression='tangent'" in reason(regression="tangent")
    assert "ns_dtype=torch.float64" in reason(ns_dtype=torch.float64)
    assert "residual_gain=0.1, with which the residual weighs 1;" in reason(residual_gain=0.1)
    assert "residual_gain=0.0" in reason(residual_gain=0.0, nesterov=False)
    assert "residual_gain=None" in reason(residual_gain=None, momentum=0.0)
    assert "float64" in reason(state_dtype=torch.float64)
    monkeypatch.setattr(dispatch, "MEASURED", {"adamw": {}, "muon": {device.type: 512}})
    monkeypatch.setattr(dispatch, "_said", set())
    with caplog.at_level(logging.INFO, logger="lorapre"):
        train(build(((13, 20),), device, backend="auto", regression="newton"), 2)
    (record,) = caplog.records
    assert "plain torch: regression='newton'; the kernels step Muon with 'subspace' only" in record.getMessage()


def test_auto_takes_the_kernels_where_muon_itself_was_measured(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = backend.open_step
    monkeypatch.setattr(backend, "open_step", lambda *args, **options: calls.append(1) or original(*args, **options))
    for measured, expected in (({}, 0), ({"muon": {device.type: 3}}, 0), ({"muon": {device.type: 4}}, 1)):
        calls.clear()
        monkeypatch.setattr(dispatch, "MEASURED", {"adamw": {device.type: 512}, "muon": {}, **measured})
        train(build(((13, 20),), device, backend="auto"), 1)
        assert len(calls) == expected


COMPILE = """
from lorapre.backends.triton import muon_pass

for target, rank, kind, out, precision in (
    (GPUTarget("cuda", 90, 32), 120, tl.bfloat16, tl.bfloat16, "tf32"),
    (GPUTarget("hip", "gfx942", 64), 20, tl.float32, tl.float32, "ieee"),
):
    narrow = kind == tl.bfloat16
    block = table.blocks(table.UPDATE, rank, 2 if narrow else 4)
    made = build(muon_pass.momentum, target, block, G_TYPE=kind, S_TYPE=tl.float32, M_TYPE=out, R=rank,
                 BLOCK_R=block.rank, BLOCK_P=block.rows, BLOCK_Q=block.cols, X_IN_STATE=True, X_ALIGNED=True,
                 L_IN_STATE=not narrow, ORDER=1, MOMENTUM_PRECISION=precision, LEFT_PRECISION=precision)
    build(muon_pass.normalize, target, M_TYPE=out, BLOCK=table.ELEMENTS)
    block = table.MUON_LENGTHS
    build(muon_pass.lengths, target, block, S_TYPE=kind, BLOCK=block.rows, OTHER=block.cols, BY_ROW=narrow)
    block = table.MUON_WEIGHTS
    build(muon_pass.turn, target, block, W_TYPE=kind, BLOCK_P=block.rows, BLOCK_Q=block.cols, NORMALIZED=True,
          BY_ROW=narrow, STOCHASTIC=narrow, ROUNDS=7, ORDER=2 if narrow else 1)
    print(*sorted(made.asm.keys() & {"cubin", "hsaco"}), made.metadata.shared <= 227 * 1024)
"""


def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path: Any) -> None:
    # The interpreter takes what the compiler does not.
    pytest.importorskip("triton.backends.nvidia")
    assert isolated(BUILD + COMPILE, TRITON_CACHE_DIR=str(tmp_path)) == "cubin True\nhsaco True"
