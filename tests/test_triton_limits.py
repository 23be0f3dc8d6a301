"""What the Triton step leaves out: scratch, copies of addresses, what it refuses; and that it compiles for GPUs."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from _support import Shape, assert_close, assert_same_bits, gradients, make_params, set_grads, snapshot
from _triton import DEVICE, OPTIONS, EagerAdamW, both, exact_products, needs_triton, params_of, scalars_as_bounds  # noqa: F401
from lorapre.backends import triton as backend
from lorapre.backends.batches import Bucket
from lorapre.backends.rounding import Rounding
from lorapre.backends.triton import table
from lorapre.backends.triton.layout import COLUMNS, IN_ROWS, ROWS_ALIGNED, STATE, Layouts, Matrices, P, Q, W
from lorapre.optim.adamw import PAPER_PRESET
from lorapre.routing import MatrixView

pytestmark = needs_triton
PAIR: tuple[Shape, ...] = ((17, 33), (17, 33))


class Watch(TorchDispatchMode):
    """The sizes of what torch allocates: the largest, and their sum."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest = self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for result in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, result.untyped_storage().nbytes())
                if func is torch.ops.aten.empty.memory_format:  # the interpreter's copies are not ours
                    self.total += result.untyped_storage().nbytes()
        return out


def test_no_scratch_of_a_matrix_s_size_is_allocated(device: torch.device) -> None:
    shape = (512, 160)
    sizes = []
    for optimizer in both((shape,) * 2, torch.float32, device, rank=4, update_clipping=True):
        set_grads(params_of(optimizer), [next(gradients(shape, 1)) for _ in range(2)])
        optimizer.step()  # the addresses are known from here on
        bucket, _ = optimizer.last
        with torch.no_grad(), Watch([*bucket.params, *bucket.grads]) as watch:
            optimizer.step_buckets([replace(bucket, step=2.0)], optimizer.param_groups[0])
        sizes.append((watch.largest, watch.total))
    n_p_q_bytes = 2 * 512 * 160 * 4
    assert sizes[1][0] >= n_p_q_bytes  # what the watch sees of the eager step
    left_factors = 2 * 512 * 4 * 4
    assert sizes[0][0] == left_factors
    assert sizes[0][1] < 2 * left_factors  # the rest are single rows and columns and r x r matrices


def test_scratch_beyond_the_limit_is_used_in_turns_that_change_nothing(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: tuple[Shape, ...] = ((20, 18), (2, 9, 13), (9, 13), (2, 9, 13))
    for options, steps in (({"capturable": True}, 2), ({"state_dtype": torch.bfloat16}, 1)):
        whole, _ = both(shapes, torch.float32, device, **options)
        turns, _ = both(shapes, torch.float32, device, **options)
        for grads in zip(*(gradients(shape, steps, seed=i) for i, shape in enumerate(shapes)), strict=True):
            for each in (whole, turns):
                set_grads(params_of(each), grads)
            whole.step()
            view = turns._view(params_of(turns)[1], turns.param_groups[0])
            assert view is not None
            dtype = options.get("state_dtype", torch.float32)
            limit = 2 * table.scratch_bytes(view, dtype)
            with monkeypatch.context() as patch:
                patch.setattr(table, "scratch_limit", lambda _, limit=limit: limit)
                turns.step()
        assert_same_bits(snapshot(turns), snapshot(whole))


def test_scratch_is_what_is_foreseen_and_a_small_share_of_a_large_model(device: torch.device) -> None:
    sketched = {"spectral_clipping": 3.0}
    for rank, options in ((4, {}), (20, sketched), (1, sketched), (4, {"state_dtype": torch.bfloat16})):
        optimizer, _ = both(((600, 64),), torch.float32, device, rank=rank, **options)
        set_grads(params_of(optimizer), list(gradients((600, 64), 1)))
        optimizer.step()
        bucket, _ = optimizer.last
        with torch.no_grad(), Watch([*bucket.params, *bucket.grads]) as watch:
            optimizer.step_buckets([replace(bucket, step=2.0)], optimizer.param_groups[0])
        dtype = bucket.state["m_B"][0].dtype
        foreseen = table.scratch_bytes(bucket.view, dtype, sketched="spectral_clipping" in options)
        assert 0.9 * watch.total <= foreseen + 4096
        assert foreseen <= 1.6 * watch.total
    assert table.scratch_limit(10**10) == 4.5 * 10**8


def test_layouts_are_made_once_while_tensors_stay_in_place(device: torch.device) -> None:
    optimizer, expected = both(PAIR, torch.float32, device, sweep_interval=1)
    kept = [torch.zeros(shape, device=device) for shape in PAIR]
    counts = []
    for step, grads in enumerate(zip(*(gradients(shape, 4, seed=i) for i, shape in enumerate(PAIR)), strict=True)):
        set_grads(params_of(expected), grads)
        expected.step()
        if step == 2:  # a gradient that moved
            kept[1] = torch.zeros_like(kept[1])
        for param, grad, new in zip(params_of(optimizer), kept, grads, strict=True):
            param.grad = grad.copy_(new)
        optimizer.step()
        counts.append(len(optimizer.layouts))
    assert counts[1] == counts[0]
    assert counts[2] == counts[3] == counts[0] + 1  # the table of addresses, not the lists of work
    for mine, other in zip(params_of(optimizer), params_of(expected), strict=True):
        assert_close(mine, other, 1e-5)


@pytest.mark.parametrize(
    ("shapes", "whole"), [(((12, 24), (9, 40)), True), (((12, 24), (9, 20)), False), (((3, 12, 24),), True)]
)
def test_lines_of_right_factors_are_taken_for_aligned_only_where_all_of_them_are(
    shapes: tuple[Shape, ...], whole: bool, device: torch.device
) -> None:
    optimizer, _ = both(shapes, torch.float32, device, rank=4)
    state = optimizer.state[params_of(optimizer)[0]]
    for moved in (False, True):
        if moved:  # four bytes behind a multiple of 16
            there = torch.empty(state["m_A"].numel() + 1, device=device)[1:].view_as(state["m_A"])
            state["m_A"] = there.copy_(state["m_A"])
        set_grads(params_of(optimizer), [next(gradients(shape, 1)) for shape in shapes])
        optimizer.step()
        *_, latest = (made for made in optimizer.layouts._made.values() if isinstance(made, Matrices))
        assert len(latest.p) == sum(shape[0] if len(shape) == 3 else 1 for shape in shapes)
        assert latest.aligned is (whole and not moved)


def test_work_lists_name_every_tile_once_and_the_chosen_ones_alone() -> None:
    layouts, device = Layouts(limit=3), torch.device("cpu")
    work = layouts.work((5, 4, 9), 4, device)
    assert work.items.tolist() == [[0, 0], [0, 1], [1, 0], [2, 0], [2, 1], [2, 2]]
    assert work.starts.tolist() == [0, 2, 3, 6]
    assert (work.programs, work.tiles) == (6, 6)
    some = layouts.work((5, 4, 9), 4, device, (True, False, True))
    assert some.items.tolist() == [[0, 0], [0, 1], [2, 0], [2, 1], [2, 2]]
    assert some.starts.tolist() == [0, 2, 3, 6]
    assert (some.programs, some.tiles) == (5, 6)
    for block in (1, 2, 3):
        layouts.work((5, 4, 9), block, device)
    assert len(layouts) == 3
    for other in (copy.deepcopy(layouts), pickle.loads(pickle.dumps(layouts))):
        assert len(other) == 0
        assert other.limit == 3


def test_the_table_holds_addresses_sizes_and_strides_of_every_matrix() -> None:
    device = torch.device(DEVICE)
    optimizer, _ = both(((3, 17, 33), (20, 40)), torch.float32, device)
    set_grads(params_of(optimizer), [torch.randn(3, 17, 33, device=device), torch.randn(20, 40, device=device)])
    optimizer.step()
    stack, plain = params_of(optimizer)
    matrices = next(made for made in optimizer.layouts._made.values() if isinstance(made, Matrices))
    assert matrices.table.shape == (4, COLUMNS)
    assert matrices.table[:, W].tolist() == [stack.data_ptr() + 4 * 17 * 33 * i for i in range(3)] + [plain.data_ptr()]
    assert matrices.table[:, W + 1].tolist()[3] == plain.grad.data_ptr()  # type: ignore[union-attr]
    assert matrices.table[:, P].tolist() == list(matrices.p) == [17, 17, 17, 20]
    assert matrices.table[:, Q].tolist() == list(matrices.q) == [33, 33, 33, 40]
    begins = [plain.data_ptr(), *(optimizer.state[plain][key].data_ptr() for key in STATE)]
    whole = all(begin % 16 == 0 for begin in begins)
    assert [kind[0] for kind in matrices.kinds] == [IN_ROWS] * 3 + [ROWS_ALIGNED if whole else IN_ROWS]


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
    assert "v_row" in str(reason(regression="newton"))
    assert reason(regression="newton", second_moment="hadamard") is None
    clipping = reason(regression="newton", second_moment="hadamard", update_clipping=True)
    assert "update_clipping=True" in str(clipping)
    assert reason(**PAPER_PRESET) is None
    assert reason(**PAPER_PRESET, dtype=torch.bfloat16) is None
    assert "514" in str(reason((515, 516), **PAPER_PRESET, second_moment_rank=514))
    assert "tangent" in str(reason(regression="tangent"))
    assert "v_A" in str(reason(second_moment="hadamard"))
    assert reason(second_moment="full") is None
    assert reason(spectral_clipping=3.0) is None
    assert "spectral_clipping=3.0" in str(reason(second_moment="full", spectral_clipping=3.0))
    assert "exp_avg_sq" in str(reason(second_moment="full", regression="newton"))
    assert "residual_gain=0.0" in str(reason(residual_gain=0.0))
    assert "513" in str(reason((514, 515), rank=513))
    # The second is too large by what its rows are brought to, a multiple of 16.
    for p, q in ((70_000, 40_000), (2_130_700, 1000)):
        big = [torch.empty(p, q, device="meta")]
        bucket = Bucket(MatrixView(1, p, q, 4, stacked=False), big, big, {"m_B": big}, 1.0, maximize=False)
        assert "too large for offsets of 32 bits" in str(backend._unsupported_tensor(bucket))


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
            backend.open_step([([wrong], hyper)], Layouts())
    factor = bucket.state["m_A"][0].mT.contiguous().mT
    crooked = replace(bucket, state={**bucket.state, "m_A": [factor, bucket.state["m_A"][1]]})
    assert "contiguous" in str(backend.supports(crooked, hyper))
    assert "empty" in str(backend.supports(replace(bucket, params=[], grads=[]), hyper))
    rounded = replace(bucket, rounding=Rounding(0, (0, 1)))
    assert "bfloat16" in str(backend.supports(rounded, hyper))


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


#: What the kernels' compilation begins with, in an interpreter of its own.
BUILD = f"""
import sys
sys.path.append({str(Path(__file__).resolve().parents[1] / "benchmarks")!r})
import triton.language as tl
from kernel_code import GPUTarget, build
from lorapre.backends.triton import table
"""
COMPILE = """
import re
from lorapre.backends.triton import bases, blocked_cholesky, cholesky, copies, elements, first_pass, second_pass
from lorapre.backends.triton import spectral

for target, rank, kind, narrow, precision in (
    (GPUTarget("cuda", 90, 32), 160, tl.bfloat16, True, "tf32"),
    (GPUTarget("hip", "gfx942", 64), 20, tl.float32, False, "ieee"),
):
    size = 4 if kind == tl.float32 else 2
    R, whole, chunk = {"R": rank}, table.padded(rank), table.chunk_rows(rank)
    build(elements.fill, target, MASKED=True)
    build(elements.totals, target, PARTS=2)
    build(elements.carry, target, BLOCK=table.ELEMENTS, **R)
    block = table.cholesky_blocks(rank)
    build(cholesky.inverse_cholesky, target, block, WIDTH_OF_R=whole, BLOCK=block.rank, FIRST=False, LAST=True,
          PRECISION=precision, **R)
    shared = dict(R, CHUNK=chunk, RIGHT_SIDE=True, ALIGNED=narrow, X_IN_STATE=not narrow, Y_IN_STATE=not narrow,
                  PRECISION=precision, S_TYPE=kind)
    block = table.product_blocks(rank)
    build(bases.product, target, block, BLOCK_R=block.rank, BLOCK=block.rows, SCALE=True, FORM=True, WITH_X=False,
          **shared)
    block = table.apply_blocks(rank)
    build(bases.apply, target, block, BLOCK_R=whole, BLOCK=block.rows, OUT=block.cols, SCALE=True, FORM=True,
          GRAM=not narrow, CARRY=False, **shared)
    block = table.left_blocks(rank)
    build(bases.left_factors, target, block, BLOCK_R=block.rank, BLOCK=block.rows, S_TYPE=kind, SWEEPS=narrow, **R)
    block = table.finish_blocks(rank)
    build(bases.finish, target, block, BLOCK_R=whole, BLOCK=block.rows, OUT=block.cols, INNER=block.rank, S_TYPE=kind,
          L_IN_STATE=not narrow, V_ROWS=not narrow, PRECISION=precision, **R)
    build(bases.advance_v_row, target, BLOCK=table.CHUNK, S_TYPE=kind)
    block = table.COPY
    move = dict(COLUMN=2, TYPE=kind, ALIGNED=narrow, BLOCK_P=block.rows, BLOCK_Q=block.cols)
    build(copies.gather, target, block, **move)
    build(copies.scatter, target, block, **move)
    block = table.blocks(table.PROJECT, rank, size)
    tile = dict(R, BLOCK_R=block.rank, BLOCK_P=block.rows, BLOCK_Q=block.cols, NEGATE=True, CLIP=True,
                FULL=narrow, V_ORDER=2)
    build(first_pass.project, target, block, G_TYPE=kind, S_TYPE=kind, ORDER=1, SPECTRAL=not narrow,
          WHOLE=not narrow and rank <= table.KERNEL_RANK, SWEEPS=narrow, PRECISION=precision, **tile)
    block = table.SKETCH
    build(spectral.signs, target, block, BLOCK_R=min(block.rank, whole), BLOCK_Q=block.cols, S_TYPE=kind,
          PRECISION=precision, **R)
    build(spectral.totals, target, PARTS=1, CLIP=narrow)
    build(spectral.divide, target, block, BLOCK_P=block.rows, CLIP=True, S_TYPE=kind, PRECISION=precision)
    most = min(rank, table.KERNEL_RANK)
    block = table.blocks(table.UPDATE, most, size)
    tile |= dict(R=most, BLOCK_R=block.rank, BLOCK_P=block.rows, BLOCK_Q=block.cols)
    del tile["NEGATE"]
    columns = table.blocked_cholesky_blocks()
    build(blocked_cholesky.decompose, target, columns, doubles=("S", "T") if narrow else (), BLOCK=columns.rows)
    update = dict(W_TYPE=kind, G_TYPE=kind, S_TYPE=tl.float32, RELATIVE=True, BOUNDED=True, STOCHASTIC=narrow, ROUNDS=7,
                  W_ORDER=1, G_ORDER=2, MOMENTUM_PRECISION=precision, LEFT_PRECISION=precision)
    made = build(second_pass.update, target, block, GIVEN=False, LEAVE_G=False, SWEEPS=narrow, ASYNC=narrow,
                 X_IN_STATE=True, X_ALIGNED=narrow, L_IN_STATE=not narrow, **update, **tile)
    block = table.given_blocks()
    tile |= dict(R=block.rank, BLOCK_R=block.rank, BLOCK_P=block.rows, BLOCK_Q=block.cols)
    build(second_pass.update, target, block, GIVEN=True, LEAVE_G=narrow, SWEEPS=False, ASYNC=False,
          X_IN_STATE=False, X_ALIGNED=True, L_IN_STATE=False, **update, **tile)
    print(*sorted(made.asm.keys() & {"cubin", "hsaco"}), made.metadata.shared <= 227 * 1024)

# No product may still read shared memory when it is filled for the turn after the next.
block = table.blocks(table.PROJECT, 64, 4)
made = build(first_pass.project, GPUTarget("cuda", 90, 32), block, G_TYPE=tl.float32, S_TYPE=tl.float32, R=64, ORDER=1,
             BLOCK_R=block.rank, BLOCK_P=block.rows, BLOCK_Q=block.cols, NEGATE=False, CLIP=True,
             SPECTRAL=True, WHOLE=True, FULL=False, SWEEPS=True, V_ORDER=0, PRECISION="tf32")
print(sorted(set(re.findall(r"warp_group_dot_wait .*pendings = ([0-9]+)", made.asm["ttgir"]))))

# Of a turn of the second pass the momentum alone is dealt out anew, not W there and back, or G.
for kind, size in ((tl.float32, 4), (tl.bfloat16, 2)):
    for sweeps in (True, False):
        block = table.blocks(table.UPDATE, 16, size)
        made = build(second_pass.update, GPUTarget("cuda", 90, 32), block, W_TYPE=kind, G_TYPE=kind, S_TYPE=tl.float32,
                     R=16, BLOCK_R=16, BLOCK_P=block.rows, BLOCK_Q=block.cols, RELATIVE=True, BOUNDED=True, CLIP=True,
                     FULL=False, GIVEN=False, LEAVE_G=False, SWEEPS=sweeps, ASYNC=False, STOCHASTIC=False, ROUNDS=7,
                     X_IN_STATE=True, X_ALIGNED=True, L_IN_STATE=True, W_ORDER=1, G_ORDER=1, V_ORDER=0,
                     MOMENTUM_PRECISION="tf32", LEFT_PRECISION="tf32")
        turn = next(loop for loop in made.asm["ttgir"].split("scf.for")[1:] if "warp_group_dot" in loop)
        print(turn.split("scf.yield")[0].count("ttg.convert_layout"))
"""


def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path: Any) -> None:
    # The interpreter takes what the compiler does not.
    pytest.importorskip("triton.backends.nvidia")
    assert isolated(BUILD + COMPILE, TRITON_CACHE_DIR=str(tmp_path)) == "cubin True\nhsaco True\n['0']\n1\n1\n1\n1"
