"""The Triton step against the eager one and the formulas in float64: under Triton's interpreter, or on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from _support import ReferenceRun, Shape, assert_close, assert_same_bits, gradients, make_params, set_grads, snapshot
from _triton import (  # noqa: F401
    DEVICE,
    OPTIONS,
    EagerAdamW,
    TritonAdamW,
    assert_nothing_changes_where_not_enabled,
    both,
    exact_products,
    needs_triton,
    params_of,
    scalars_as_bounds,
    small_blocks,
)
from lorapre.backends.batches import Bucket
from lorapre.backends.triton import table

pytestmark = needs_triton


@dataclass(frozen=True)
class Case:
    name: str
    shapes: tuple[Shape, ...]
    rank: int = 4
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 2
    transposed_weights: bool = False
    transposed_grads: bool = False
    missing: frozenset[tuple[int, int]] = frozenset()
    tensor_lr: bool = False


PAIR: tuple[Shape, ...] = ((17, 33), (17, 33))
FULL: dict[str, Any] = {"second_moment": "full"}
CLIPPED: dict[str, Any] = {**FULL, "update_clipping": True, "eps": 0.1}
CASES = [
    Case("tall", ((130, 70),), rank=20),
    Case("wide", ((40, 150),), rank=8),
    Case("square", ((64, 64),), rank=16),
    Case("odd, rank 1", ((17, 33),), rank=1),
    Case("odd, rank close to the smaller side", ((17, 33),), rank=16),
    Case("rank above two blocks", ((50, 60),), rank=37),
    Case("two shapes", ((17, 33), (40, 20), (17, 33))),
    Case("stacks", ((3, 17, 33), (3, 17, 33)), rank=3),
    Case("stacks on the device", ((3, 17, 33), (3, 17, 33)), options={"capturable": True}),
    Case("convolutions", ((12, 5, 3, 3), (12, 5, 3, 3))),
    Case("flattened 1-d convolution", ((12, 7, 3),), options={"view_3d": "flatten"}),
    Case("transposed", ((33, 50), (33, 50)), transposed_weights=True, transposed_grads=True),
    Case("transposed gradients of plain weights", ((32, 48),), transposed_grads=True),
    Case("residual gain of the paper", PAIR, options={"residual_gain": None}),
    Case("hardly any residual", PAIR, options={"residual_gain": 0.01}),
    Case("clipped", PAIR, options={"update_clipping": True}),
    Case(
        "clipped, unbounded, with a gain of 4",
        PAIR,
        options={"update_clipping": True, "bounded": False, "residual_gain": 4.0},
    ),
    Case("residual gain above 1", PAIR, options={"residual_gain": 2.0}),
    Case("absolute eps", PAIR, options={"eps_mode": "absolute", "eps": 1e-2}),
    Case("large relative eps", PAIR, options={"eps": 0.3}),
    Case("weight decay", PAIR, options={"weight_decay": 0.5}),
    Case("scale", PAIR, options={"scale": 0.25, "weight_decay": 0.5}),
    Case("maximize", PAIR, options={"maximize": True, "weight_decay": 0.5}),
    Case("unbounded", PAIR, options={"bounded": False}),
    Case("betas", PAIR, options={"betas": (0.5, 0.999)}),
    Case("no memory in m", PAIR, options={"betas": (0.0, 0.9)}),
    Case("spectrum clipped", PAIR, options={"spectral_clipping": 0.05, "residual_gain": 4.0}),
    Case("spectrum clipped besides", PAIR, options={"spectral_clipping": 0.5, "update_clipping": True}, steps=3),
    Case(
        "spectrum clipped on the device",
        ((3, 17, 33),),
        options={"spectral_clipping": 0.1, "capturable": True, "maximize": True, "residual_gain": None},
    ),
    Case("sweeps now and then", ((17, 33), (40, 20), (64, 64)), options={"sweep_interval": 3}, steps=5),
    Case(
        "sweeps once, with everything clipped",
        PAIR,
        options={"sweep_interval": 9, "update_clipping": True, "spectral_clipping": 0.1, "residual_gain": 4.0},
        steps=3,
    ),
    Case("sweeps now and then, transposed", ((33, 50),), options={"sweep_interval": 2}, transposed_grads=True, steps=3),
    Case(
        "sweeps now and then, full v, gradients missing",
        PAIR,
        options={**CLIPPED, "sweep_interval": 2, "maximize": True},
        steps=4,
        missing=frozenset({(0, 0), (1, 2)}),
    ),
    Case("full v", ((17, 33), (40, 20)), options=FULL),
    Case("full v, clipped", PAIR, options={**FULL, "update_clipping": True, "residual_gain": 4.0}),
    Case("full v, clipped, unbounded", PAIR, options={**FULL, "update_clipping": True, "bounded": False}),
    Case("full v, absolute eps", PAIR, options={**FULL, "eps_mode": "absolute", "eps": 1e-2}),
    Case("full v, large relative eps", PAIR, options={**FULL, "eps": 0.3, "betas": (0.5, 0.9)}, steps=3),
    Case("full v of stacks on the device", ((3, 17, 33),), options={**FULL, "capturable": True}),
    Case("full v of convolutions", ((12, 5, 3, 3),), options={**FULL, "maximize": True}),
    Case("full v of transposed weights", ((32, 48),), options=CLIPPED, transposed_weights=True),
    Case("full v, transposed gradients", ((32, 48),), options=CLIPPED, transposed_grads=True),
    Case("full v, gradients missing", PAIR, options=CLIPPED, steps=3, missing=frozenset({(0, 0), (1, 2)})),
    Case("skipping", PAIR, options={"nonfinite": "skip"}),
    Case("gradients missing", PAIR, steps=3, missing=frozenset({(0, 0), (1, 2)})),
    Case(
        "gradients missing, on the device, with everything else",
        PAIR,
        steps=3,
        options={
            "capturable": True,
            "weight_decay": 0.5,
            "scale": 0.5,
            "maximize": True,
            "residual_gain": None,
        },
        missing=frozenset({(0, 0), (1, 2)}),
        tensor_lr=True,
    ),
]


def transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT


def run_beside_the_reference(case: Case, dtype: torch.dtype, device: torch.device, tolerance: float) -> None:
    params = make_params(case.shapes, dtype, device)
    if case.transposed_weights:
        params = [nn.Parameter(transposed(param.detach())) for param in params]
    options = {**OPTIONS, **case.options}
    if case.tensor_lr:
        options["lr"] = torch.tensor(options["lr"], device=device)
    optimizer = TritonAdamW(params, rank=case.rank, **options)
    runs = [ReferenceRun(optimizer, param, optimizer.param_groups[0]) for param in params]
    streams = [gradients(shape, case.steps, seed=i) for i, shape in enumerate(case.shapes)]
    for step in range(case.steps):
        for i, (param, run, stream) in enumerate(zip(params, runs, streams, strict=True)):
            grad = next(stream).to(device, dtype)
            if case.transposed_grads:
                grad = transposed(grad)
            if (i, step) in case.missing:
                param.grad = None
                continue
            param.grad = grad
            run.step(grad)
        optimizer.step()
    for param, run in zip(params, runs, strict=True):
        run.check(optimizer, param, tolerance)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_the_step_is_that_of_the_formulas(case: Case, device: torch.device) -> None:
    run_beside_the_reference(case, torch.float32, device, 1e-5)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    "case",
    [
        Case("tall", ((100, 70),), rank=37),
        Case("wide", ((40, 101), (40, 101)), rank=16, options={"capturable": True}),
        Case("transposed", ((70, 50),), rank=20, transposed_weights=True, transposed_grads=True),
        Case("full v", ((70, 50),), rank=37, options=CLIPPED, transposed_weights=True),
        Case("sweeping once", ((70, 90),), rank=37, options={"sweep_interval": 9}),
        Case("spectrum clipped", ((70, 90),), rank=37, options={"spectral_clipping": 0.1}, transposed_grads=True),
        Case("both", ((70, 130),), rank=37, options={"sweep_interval": 9, "spectral_clipping": 0.1}),
    ],
    ids=lambda case: case.name,
)
def test_the_cuts_into_blocks_and_parts_change_nothing(
    case: Case, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case.options.get("spectral_clipping"):
        optimizer, _ = both(case.shapes, torch.float32, device, rank=case.rank, **case.options)
        params_of(optimizer)[0].grad = next(gradients(case.shapes[0], 1)).to(device, torch.float32)
        with pytest.raises(ValueError, match=r"PROJECT cuts rank 37: a sketch needs all ranks in one program"):
            optimizer.step()
        monkeypatch.setattr(table, "PROJECT", tuple((*row, replace(block, rank=0)) for *row, block in table.PROJECT))
    run_beside_the_reference(case, torch.float32, device, 1e-5)


def test_a_rank_that_fills_no_block_up(device: torch.device) -> None:
    rank = table.KERNEL_RANK - 30
    run_beside_the_reference(Case("", ((rank + 5, rank + 9),), rank=rank, steps=1), torch.float32, device, 1e-5)


@pytest.mark.parametrize(("second_moment", "maximize"), [("rank1", False), ("full", False), ("rank1", True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_rounded_to_nearest(
    dtype: torch.dtype, second_moment: str, maximize: bool, device: torch.device
) -> None:
    shape = (40, 50)
    optimizer, _ = both((shape,), dtype, device, weight_decay=0.5, second_moment=second_moment, maximize=maximize)
    (param,) = params_of(optimizer)
    run = ReferenceRun(optimizer, param, optimizer.param_groups[0])
    for grad in gradients(shape, 3):
        param.grad = grad.to(device, dtype)
        run.W = run._matrices(param)
        run.step(param.grad)
        optimizer.step()
        exact, found = run.weight().to(dtype), param.detach().cpu()
        # float32 puts a handful of numbers on the other side of the middle between two
        assert (found != exact).float().mean() < 0.02
        assert (
            (found.double() - run.weight()).abs() <= 0.5001 * torch.finfo(dtype).eps * exact.abs()
        ).float().mean() > 0.99
    run.check(optimizer, param, torch.finfo(dtype).eps)
    v, expected = ("exp_avg_sq", run.states[0].v) if second_moment == "full" else ("v_row", run.states[0].v_row)
    assert_close(optimizer.state[param][v], expected, 1e-6)
    assert optimizer.state[param]["m_B"].dtype == torch.float32


def test_float32_weights_take_bfloat16_gradients(device: torch.device) -> None:
    optimizer, expected = both(((24, 30),), torch.float32, device)
    grad = next(gradients((24, 30), 1)).to(device, torch.bfloat16)
    for each in (optimizer, expected):
        (param,) = params_of(each)
        state = each.state[param]
        bucket = Bucket(
            view=each._view(param, each.param_groups[0]),
            params=[param.detach()],
            grads=[grad],
            state={key: [value] for key, value in state.items() if key != "step"},
            step=1.0,
            maximize=False,
        )
        each.step_buckets([bucket], each.param_groups[0])
    assert_close(params_of(optimizer)[0], params_of(expected)[0], 1e-6)


@pytest.mark.parametrize(("second_moment", "kept"), [("rank1", ("v_row", "v_col")), ("full", ("exp_avg_sq",))])
def test_a_bfloat16_state_is_rounded_to_nearest(
    second_moment: str, kept: tuple[str, ...], device: torch.device
) -> None:
    options = {"state_dtype": torch.bfloat16, "second_moment": second_moment}
    optimizer, expected = both(((24, 30),), torch.float32, device, **options)
    grad = next(gradients((24, 30), 1)).float()
    for each in (optimizer, expected):
        set_grads(params_of(each), [grad])
        each.step()
    ours, theirs = (each.state[params_of(each)[0]] for each in (optimizer, expected))
    for key in (*kept, "m_A", "m_B"):
        assert ours[key].dtype == torch.bfloat16
        assert (ours[key] != theirs[key]).float().mean() < 0.02, key
        assert_close(ours[key], theirs[key], 1e-3, key)


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
def test_between_sweeps_a_narrow_matrix_moves_as_in_batched_torch(
    state_dtype: torch.dtype | None, device: torch.device
) -> None:
    options = {"sweep_interval": 3, "state_dtype": state_dtype, "spectral_clipping": 0.5}
    optimizer, expected = both(((24, 30), (30, 24)), torch.bfloat16, device, **options)
    for step in range(3):
        grads = [next(gradients(shape, 1, seed=step)).bfloat16() for shape in ((24, 30), (30, 24))]
        bases = [optimizer.state[param]["m_A"].clone() for param in params_of(optimizer)]
        for each in (optimizer, expected):
            set_grads(params_of(each), grads)
            each.step()
        for ours, theirs, basis in zip(params_of(optimizer), params_of(expected), bases, strict=True):
            assert torch.equal(optimizer.state[ours]["m_A"], basis) == (step > 0)
            assert_close(ours.float(), theirs.float(), 1e-2)
            for key, tolerance in (("m_B", 1e-2), ("v_row", 1e-2), ("v_col", 1e-2)):
                assert_close(optimizer.state[ours][key].float(), expected.state[theirs][key].float(), tolerance, key)


def test_nothing_changes_between_sweeps_where_the_step_is_not_enabled(device: torch.device) -> None:
    options = {"nonfinite": "skip", "weight_decay": 0.5, "sweep_interval": 9, "update_clipping": True}
    optimizer, _ = both(PAIR, torch.float32, device, **options)
    for _ in range(2):  # what is left out must be a step that does not sweep
        set_grads(params_of(optimizer), [next(gradients(shape, 1, seed=i)) for i, shape in enumerate(PAIR)])
        optimizer.step()
    assert not optimizer.last[0].sweeps
    before = snapshot(optimizer)
    bucket, _ = optimizer.last
    off = replace(bucket, step=bucket.step + 1, enabled=torch.tensor(False, device=bucket.params[0].device))
    optimizer.step_buckets([off], optimizer.param_groups[0])
    assert_same_bits(snapshot(optimizer), before)


@pytest.mark.parametrize("second_moment", ["rank1", "full"])
@pytest.mark.parametrize("capturable", [False, True])
def test_nothing_changes_where_the_step_is_not_enabled(
    capturable: bool, second_moment: str, device: torch.device
) -> None:
    options = {"nonfinite": "skip", "weight_decay": 0.5, "update_clipping": True, "second_moment": second_moment}
    optimizer, _ = both(PAIR, torch.float32, device, capturable=capturable, **options)
    assert_nothing_changes_where_not_enabled(optimizer, PAIR)


@pytest.mark.parametrize("second_moment", ["rank1", "full"])
def test_zero_gradients_leave_a_fresh_matrix_where_it_is(second_moment: str, device: torch.device) -> None:
    optimizer, _ = both(((17, 33),), torch.float32, device, second_moment=second_moment, update_clipping=True)
    (param,) = params_of(optimizer)
    before = param.detach().clone()
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert_same_bits(param.detach(), before)
    for key, value in optimizer.state[param].items():
        assert value.isfinite().all(), key


@pytest.mark.parametrize(
    ("eps_mode", "second_moment"), [("relative", "rank1"), ("absolute", "rank1"), ("relative", "full")]
)
def test_the_update_is_bounded_and_columns_without_gradients_stand_still(
    eps_mode: str, second_moment: str, device: torch.device
) -> None:
    shape = (17, 33)
    hardly = torch.ones(33, dtype=torch.float64)
    hardly[3:6], hardly[6:9] = 0.0, 1e-7  # features that are never active, and hardly ever

    def trained(**options: Any) -> list[Tensor]:
        options |= {"eps_mode": eps_mode, "second_moment": second_moment}
        both_ways = both((shape,), torch.float32, device, rank=8, **options)
        for optimizer in both_ways:
            for grad in gradients(shape, 5):
                set_grads(params_of(optimizer), [(grad * hardly).float()])
                optimizer.step()
        return [params_of(optimizer)[0].detach() for optimizer in both_ways]

    start = make_params((shape,), torch.float32, device)[0].detach()
    ours, theirs = trained()
    assert_same_bits(ours[:, 3:6], start[:, 3:6])
    # what moves the columns that are hardly ever active is the rounding of all others
    usual = [*range(6), *range(9, 33)]
    assert_close(ours[:, usual], theirs[:, usual], 1e-4)
    assert (trained(bounded=False)[0] - start)[:, 3:6].abs().max() > 3
    # five updates of lr 0.1, none above 1 / sqrt(1 - beta2)
    assert (ours - start).abs().max() <= 5 * 0.1 * 20**0.5


@pytest.mark.usefixtures("small_blocks")
def test_a_rerun_gives_the_same_bits(device: torch.device) -> None:
    shapes: tuple[Shape, ...] = ((70, 90), (70, 90))
    grads = [next(gradients(shape, 1, seed=i)) for i, shape in enumerate(shapes)]
    results = []
    for _ in range(2):
        optimizer, _ = both(shapes, torch.float32, device, rank=20)
        set_grads(params_of(optimizer), grads)
        optimizer.step()
        results.append(snapshot(optimizer))
    assert_same_bits(*results)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter runs one program after the other: it has no races")
@pytest.mark.parametrize("rank", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reruns_of_many_programs_at_once_give_the_same_bits(
    rank: int, dtype: torch.dtype, device: torch.device
) -> None:
    shapes: tuple[Shape, ...] = ((2048, 2048), (2048, 1365), (1365, 2048)) * 2  # rows aligned and not
    first: Any = None
    for _ in range(4):
        optimizer, _ = both(shapes, dtype, device, rank=rank, update_clipping=True)
        for step in range(2):
            drawn = torch.Generator(device).manual_seed(step)
            grads = [torch.randn(shape, generator=drawn, device=device).to(dtype) for shape in shapes]
            set_grads(params_of(optimizer), grads)
            optimizer.step()
        if first is None:
            first = snapshot(optimizer)
        assert_same_bits(snapshot(optimizer), first)


@pytest.mark.parametrize("second_moment", ["rank1", "full"])
@pytest.mark.parametrize("across", [False, True], ids=["rows", "columns"])
def test_a_part_of_a_wider_matrix_is_stepped_and_nothing_beside_it(
    across: bool, second_moment: str, device: torch.device
) -> None:
    # 20 numbers from row to row: 16 bytes are a divisor, the 8 numbers that the kernels round to are none
    steps = []
    for kind in (TritonAdamW, EagerAdamW):
        wide = torch.linspace(-1, 1, 24 * 20, device=device).view(24, 20)
        part = wide[:, :16].mT if across else wide[:, :16]
        param = nn.Parameter(part)
        assert param.data_ptr() == wide.data_ptr()
        optimizer = kind([param], rank=4, **{**OPTIONS, "second_moment": second_moment})
        before = wide.clone()
        param.grad = next(gradients(tuple(param.shape), 1)).to(device, torch.float32)
        optimizer.step()
        assert torch.equal(wide[:, 16:], before[:, 16:])
        steps.append(wide)
    assert_close(*steps, 1e-5)
