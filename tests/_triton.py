"""Set-up of the Triton tests: the interpreter on the CPU, an optimizer that steps by the kernels, its eager twin.

The interpreter runs one program after the other: matrices are small, and `small_blocks` makes blocks smaller.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from _support import Shape, assert_same_bits, gradients, make_params, set_grads, snapshot
from lorapre import LoRAPreAdamW
from lorapre.backends import eager
from lorapre.backends import triton as backend
from lorapre.backends.batches import Bucket
from lorapre.backends.opened import Opened
from lorapre.backends.triton import table
from lorapre.backends.triton.layout import Layouts
from lorapre.optim.base import Work

DEVICE = os.environ.get("LORAPRE_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="the Triton kernels need triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    from _interpreter import quicken

    quicken()
_REASON = backend.unavailable(DEVICE)
needs_triton = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))


@pytest.fixture(autouse=True)
def scalars_as_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6's interpreter holds scalars in arrays of one element, which NumPy 2.4 no longer turns into ints."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter holds bfloat16 as 16 bits, of which it would multiply the integers."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.create_dot

    def widened(value: Any) -> Any:
        if value.dtype.scalar != tl.bfloat16:
            return value
        bits = torch.from_numpy(value.data.copy()).view(torch.bfloat16)
        return interpreter.TensorHandle(bits.float().numpy(), tl.float32)

    def patched(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", patched)


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32's own products on a GPU too: nothing can be said of TF32's at 1e-5."""
    for use in ("newton", "moments", "squares"):
        monkeypatch.setitem(table.NEWTON_PRECISION, use, "ieee")
    for use in table.PRECISION:
        monkeypatch.setitem(table.PRECISION, use, "ieee")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 ranks at most where ranks are cut, and chunks of 64 rows."""
    block = table.Blocks(32, 32, 16, 4, 1)
    monkeypatch.setattr(table, "PROJECT", ((table.MAX_RANK, 4, block),))
    monkeypatch.setattr(table, "UPDATE", ((table.MAX_RANK, 4, replace(block, rank=0)),))
    monkeypatch.setattr(table, "NEWTON_PROJECT", ((table.MAX_RANK, 4, block),))
    monkeypatch.setattr(table, "NEWTON_UPDATE", ((table.MAX_RANK, 4, block),))
    monkeypatch.setattr(table, "NEWTON_PARTS", (16, 16))
    monkeypatch.setattr(table, "NEWTON_GRAM", table.Blocks(32, 0, 16, 4, 1))
    monkeypatch.setattr(table, "NEWTON_INVERT", table.Blocks(16, 16, 0, 4, 1))
    monkeypatch.setattr(table, "CHUNK", 64)
    monkeypatch.setattr(table, "ELEMENTS", 512)
    monkeypatch.setattr(table, "SIGNS", 64)


class TritonAdamW(LoRAPreAdamW):
    """LoRAPreAdamW whose matrices go to the kernels, or, with ``eagerly``, to what they are compared with."""

    eagerly = False

    def _open(self, work: Work) -> Opened:
        jobs = [(buckets, self._hyperparameters(group, buckets[0].params[0].device)) for buckets, group in work]
        self.last = jobs[-1][0][-1], jobs[-1][1]
        if self.eagerly:

            def proceed(enabled: Tensor | None) -> None:
                for buckets, hyper in jobs:
                    for bucket in buckets:
                        eager.lorapre_adamw(bucket.where(enabled), hyper)

            return Opened(proceed)
        if not hasattr(self, "layouts"):
            self.layouts = Layouts()
        return backend.open_step(jobs, self.layouts)

    def step_buckets(self, buckets: list[Bucket], group: dict[str, Any]) -> None:
        """The kernels alone: no check, no counters."""
        self._open([(buckets, group)]).proceed(buckets[0].enabled)


class EagerAdamW(TritonAdamW):
    eagerly = True


def assert_nothing_changes_where_not_enabled(
    optimizer: TritonAdamW, shapes: tuple[Shape, ...], *, sweeps: bool = True
) -> None:
    """After a first step, of one with nan among its gradients that a mask leaves out."""
    params = params_of(optimizer)
    set_grads(params, [next(gradients(shape, 1, seed=i)) for i, shape in enumerate(shapes)])
    optimizer.step()
    before = snapshot(optimizer)
    params[0].grad.fill_(float("nan"))  # type: ignore[union-attr]
    bucket, _ = optimizer.last
    enabled = torch.tensor(False, device=params[0].device)
    off = replace(bucket, step=bucket.step + 1, sweeps=sweeps, enabled=enabled)
    optimizer.step_buckets([off], optimizer.param_groups[0])
    assert_same_bits(snapshot(optimizer), before)


#: Large, so that a weight is what the updates made of it and an error in them shows.
OPTIONS: dict[str, Any] = {
    "lr": 0.1,
    "regression": "subspace",
    "second_moment": "rank1",
    "residual_gain": 1.0,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "eps_mode": "relative",
    "weight_decay": 0.0,
    "scale": 1.0,
    "update_clipping": False,
    "spectral_clipping": None,
}


def both(shapes: tuple[Shape, ...], dtype: torch.dtype, device: torch.device, **options: Any) -> list[TritonAdamW]:
    """The kernels and the eager step from the same start."""
    params = make_params(shapes, dtype, device)
    return [
        kind([nn.Parameter(param.detach().clone()) for param in params], **{"rank": 4, **OPTIONS, **options})
        for kind in (TritonAdamW, EagerAdamW)
    ]


def rounded_by_chance(optimizer: torch.optim.Optimizer, seed: int | None) -> None:
    """Switch stochastic rounding on from here; another seed at the start would draw other factors. None: off."""
    for group in optimizer.param_groups:
        group["stochastic_rounding"], group["seed"] = seed is not None, seed or 0


def params_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return list(optimizer.param_groups[0]["params"])
