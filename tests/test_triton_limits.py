"""What the Triton step leaves out: scratch, copies of addresses, what it refuses; and that it compiles for GPUs."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from _support import Shape, assert_close, gradients, make_params, set_grads
from _triton import DEVICE, OPTIONS, EagerAdamW, both, needs_triton, params_of, scalars_as_bounds  # noqa: F401
from lorapre.backends import triton as backend
from lorapre.backends.triton.pointers import Pointers

pytestmark = needs_triton
PAIR: tuple[Shape, ...] = ((17, 33), (17, 33))


class Watch(TorchDispatchMode):
    """The sizes of what torch allocates, and how many operations that write it performs."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for result in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, result.untyped_storage().nbytes())
        self.operations += not func.is_view
        return out


def test_no_scratch_of_a_matrix_s_size_is_allocated(device: torch.device) -> None:
    shape = (128, 160)
    sizes = []
    for optimizer in both((shape,) * 2, torch.float32, device, rank=4):
        set_grads(params_of(optimizer), [next(gradients(shape, 1)) for _ in range(2)])
        optimizer.step()  # the addresses are known from here on
        bucket, _ = optimizer.last
        with torch.no_grad(), Watch([*bucket.params, *bucket.grads]) as watch:
            optimizer._step_bucket(replace(bucket, step=2.0), optimizer.param_groups[0])
        sizes.append(watch.largest)
    n_p_q_bytes = 2 * 128 * 160 * 4
    assert sizes[1] >= n_p_q_bytes  # what the watch sees of the eager step
    factor = 2 * 2 * 160 * 4 * 4  # in float64; on a GPU a reduction is cut into parts
    assert sizes[0] <= (factor if device.type == "cpu" else 3 * factor)
    assert 4 * sizes[0] < n_p_q_bytes


def test_addresses_are_sent_once_while_tensors_stay_in_place(device: torch.device) -> None:
    optimizer, expected = both(PAIR, torch.float32, device)
    kept = [torch.zeros(shape, device=device) for shape in PAIR]
    for step, grads in enumerate(zip(*(gradients(shape, 4, seed=i) for i, shape in enumerate(PAIR)), strict=True)):
        set_grads(params_of(expected), grads)
        expected.step()
        if step == 2:  # a gradient that moved
            kept[1] = torch.zeros_like(kept[1])
        for param, grad, new in zip(params_of(optimizer), kept, grads, strict=True):
            param.grad = grad.copy_(new)
        optimizer.step()
        assert len(optimizer.pointers) == (1 if step < 2 else 2)
    for mine, other in zip(params_of(optimizer), params_of(expected), strict=True):
        assert_close(mine, other, 1e-5)


def test_the_number_of_tables_is_bounded_and_copies_start_empty() -> None:
    pointers = Pointers(limit=3)
    tensors = [torch.zeros(8) for _ in range(5)]
    for tensor in tensors:
        addresses = pointers.table([[tensor]], [0], 1)
        assert addresses.table.tolist() == [[tensor.data_ptr()]]
        assert addresses.aligned == (tensor.data_ptr() % 16 == 0,)
    assert len(pointers) == 3
    latest = pointers.table([[tensors[4]]], [0], 1)
    assert pointers.table([[tensors[4]]], [0], 1) is latest
    stack = torch.zeros(3, 2, 4)
    assert pointers.table([[stack]], [32], 3).table.tolist() == [[stack.data_ptr() + 32 * i for i in range(3)]]
    for other in (copy.deepcopy(pointers), pickle.loads(pickle.dumps(pointers))):
        assert len(other) == 0
        assert other.limit == 3


def reason(shape: Shape = (17, 33), *, dtype: torch.dtype = torch.float32, **options: Any) -> str | None:
    device = torch.device(DEVICE)
    options = {"rank": 4, **OPTIONS, **options}
    optimizer = EagerAdamW(make_params((shape,), dtype, device), **options)
    set_grads(params_of(optimizer), [torch.randn(shape)])
    optimizer.step()
    return backend.supports(*optimizer.last)


def test_what_the_kernels_cannot_do_is_said_in_words(device: torch.device) -> None:
    assert reason() is None
    assert reason(dtype=torch.bfloat16) is None
    assert "float64" in str(reason(dtype=torch.float64))
    assert "float64" in str(reason(state_dtype=torch.float64))
    assert "newton" in str(reason(regression="newton"))
    assert "tangent" in str(reason(regression="tangent"))
    assert "v_A" in str(reason(second_moment="hadamard"))
    assert "exp_avg_sq" in str(reason(second_moment="full"))
    assert "clip" in str(reason(update_clipping=True))
    assert "513" in str(reason((514, 515), rank=513))


def test_strides_that_are_no_matrix_s_are_refused_and_the_step_raises(device: torch.device) -> None:
    optimizer = EagerAdamW(make_params(((8, 6, 3, 3), (8, 6, 3, 3)), torch.float32, device), rank=4, **OPTIONS)
    set_grads(params_of(optimizer), [torch.randn(8, 6, 3, 3)] * 2)
    optimizer.step()
    bucket, hyper = optimizer.last
    shuffled = [grad.to(memory_format=torch.channels_last) for grad in bucket.grads]
    for wrong in (
        replace(bucket, grads=shuffled),
        replace(bucket, grads=[shuffled[0], bucket.grads[1]]),
        replace(bucket, params=[param.to(memory_format=torch.channels_last) for param in bucket.params]),
    ):
        assert "strides" in str(backend.supports(wrong, hyper))
        with pytest.raises(ValueError, match="strides"):
            backend.lorapre_adamw(wrong, hyper, Pointers())
    factor = bucket.state["m_A"][0].mT.contiguous().mT
    crooked = replace(bucket, state={**bucket.state, "m_A": [factor, bucket.state["m_A"][1]]})
    assert "contiguous" in str(backend.supports(crooked, hyper))
    assert "empty" in str(backend.supports(replace(bucket, params=[], grads=[]), hyper))
    assert "bfloat16" in str(backend.supports(bucket, hyper, stochastic_rounding=True))


def isolated(code: str, **environment: str) -> str:
    """What a fresh interpreter without TRITON_INTERPRET prints."""
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", code], env={**kept, **environment}, capture_output=True, text=True, timeout=90
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_library_imports_without_triton_and_says_so() -> None:
    code = "import sys; sys.modules['triton'] = None; import lorapre, lorapre.backends.triton as t; "
    assert isolated(code + "print(t.unavailable('cpu'))") == "triton is not installed"


def test_the_cpu_is_refused_without_the_interpreter() -> None:
    code = "import lorapre.backends.triton as t; print(t.unavailable('cpu'))"
    assert "TRITON_INTERPRET" in isolated(code)


COMPILE = """
import triton.language as tl
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lorapre.backends.triton import bases, elements, kernels, table

numbers = "decay gain beta2 eps keep cross outside v_scale rate step limit shift".split()
batches = "A B GA K X U UG row_sums col_sums coefficients scalars gram T".split()

def build(kernel, target, warps=4, stages=2, **constants):
    names = kernel.arg_names
    types = {}
    for name in names:
        types[name] = "i32"
        if name in numbers: types[name] = "fp32"
        if name in batches: types[name] = "*fp32"
        if name.endswith("_table"): types[name] = "*i64"
        if name == "enabled": types[name] = "*u8"
        if name in constants: types[name] = "constexpr"
    source = ASTSource(kernel, types, {(names.index(name),): value for name, value in constants.items()})
    return compile(source, target=target, options={"num_warps": warps, "num_stages": stages})

def tile(blocks, rank):
    return {"R": rank, "BLOCK_P": blocks.rows, "BLOCK_Q": blocks.cols, "BLOCK_R": blocks.rank,
            "warps": blocks.warps, "stages": blocks.stages, "NEGATE": True}

for target, rank, kind, narrow, precision in (
    (GPUTarget("cuda", 90, 32), 160, tl.bfloat16, True, "tf32"),
    (GPUTarget("hip", "gfx942", 64), 20, tl.float32, False, "ieee"),
):
    size = 4 if kind == tl.float32 else 2
    # an argument of 1 is compiled in
    counts = "tiles parts B_blocks A_blocks row_blocks col_blocks row_parts col_parts seed first_matrix".split()
    def ones(kernel):
        return {name: 1 for name in kernel.arg_names if narrow and name in counts}
    build(elements.fill, target, MASKED=True)
    build(bases.inverse_cholesky, target, warps=8, R=12, BLOCK=16, LAST=True)
    build(elements.gather, target, ALIGNED=True, S_TYPE=kind, BLOCK=table.ELEMENTS, **ones(elements.gather))
    build(elements.combine, target, S_TYPE=kind, RELATIVE=True, BLOCK=table.ELEMENTS,
          **ones(elements.combine))
    build(elements.commit, target, ALIGNED=True, S_TYPE=kind, BLOCK=table.ELEMENTS, **ones(elements.commit))
    build(kernels.project, target, G_TYPE=kind, ALIGNED=1, BF16=narrow, PRECISION=precision,
          **ones(kernels.project), **tile(table.blocks(table.PROJECT, rank, size), rank))
    made = build(kernels.update, target, W_TYPE=kind, G_TYPE=kind, S_TYPE=tl.float32, RELATIVE=True, BOUNDED=True,
          STOCHASTIC=narrow, ROUNDS=7, W_ALIGNED=1, G_ALIGNED=2, BF16=narrow, MOMENTUM_PRECISION=precision,
          LEFT_PRECISION=precision, **ones(kernels.update), **tile(table.blocks(table.UPDATE, rank, size), rank))
    print(*sorted(made.asm.keys() & {"cubin", "hsaco"}), made.metadata.shared <= 227 * 1024)
"""


def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path: Any) -> None:
    # The interpreter takes what the compiler does not.
    pytest.importorskip("triton.backends.nvidia")
    assert isolated(COMPILE, TRITON_CACHE_DIR=str(tmp_path)) == "cubin True\nhsaco True"
