"""The Triton step of the paper preset against the eager one and the formulas in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from _support import (
    ReferenceRun,
    Shape,
    assert_close,
    assert_same_bits,
    gradients,
    make_params,
    relative_difference,
    set_grads,
    snapshot,
)
from _triton import (  # noqa: F401
    EagerAdamW,
    TritonAdamW,
    assert_nothing_changes_where_not_enabled,
    bfloat16_products,
    exact_products,
    needs_triton,
    params_of,
    rounded_by_chance,
    scalars_as_bounds,
    small_blocks,
)
from lorapre.backends import triton as backend
from lorapre.backends.triton import table
from lorapre.optim.adamw import PAPER_PRESET
from test_triton_adamw import Case, transposed
from test_triton_limits import BUILD, Watch, isolated

if backend.unavailable("cpu") is None or torch.cuda.is_available():
    from lorapre.backends.triton import elements, newton, newton_inverses, newton_kernels, newton_squares

pytestmark = needs_triton

PAIR: tuple[Shape, ...] = ((17, 33), (17, 33))
RELATIVE = {"damping_mode": "relative", "damping": 1e-4}
ONE: tuple[Shape, ...] = ((17, 33),)
CASES = [
    Case("tall", ((70, 20),), rank=9, steps=2),
    Case("wide", ((20, 70),), rank=18, steps=2),
    Case("odd, rank 1", ONE, rank=1, steps=2),
    Case("odd, rank close to the smaller side", ONE, rank=15, steps=2),
    Case(
        "v of a higher rank than m", ONE, options={"second_moment_rank": 9, "eps_mode": "relative", "eps": 0.3}, steps=2
    ),
    Case("v of a lower rank than m", ONE, rank=9, steps=2, options={"second_moment_rank": 2, **RELATIVE}),
    Case("two shapes", ((17, 33), (40, 20)), steps=2),
    Case("a stack on the device", ((2, 17, 33),), steps=2, options={"capturable": True}),
    Case("a convolution", ((12, 5, 3, 3),), steps=2),
    Case("transposed", ((33, 50),), steps=2, transposed_weights=True, transposed_grads=True),
    Case("a residual gain, three steps", ONE, options={"residual_gain": 2.0}),
    Case("no residual, no memory", ONE, steps=2, options={"residual_gain": 0.0, "betas": (0.0, 0.9)}),
    Case("relative damping", ONE, options={**RELATIVE, "residual_gain": 0.5}, steps=2),
    Case(
        "betas, exact bias correction, bounded",
        ONE,
        steps=2,
        options={"betas": (0.5, 0.999), "scale": 1.0, "bias_correction": "exact", "bounded": True},
    ),
    Case("gradients missing", PAIR, missing=frozenset({(0, 0), (1, 1)}), options={"nonfinite": "skip"}, steps=2),
    Case(
        "gradients missing, on the device, with everything else",
        PAIR,
        options={
            "capturable": True,
            "weight_decay": 0.5,
            "maximize": True,
            "residual_gain": 1.0,
            "eps_mode": "relative",
            "bias_correction": "exact",
            **RELATIVE,
        },
        steps=2,
        missing=frozenset({(0, 0)}),
        tensor_lr=True,
    ),
]


def paper(kind: type[TritonAdamW], params: list[nn.Parameter], rank: int = 4, **options: Any) -> TritonAdamW:
    return kind(params, **{"lr": 0.1, "rank": rank, **PAPER_PRESET, **options})


def both(shapes: tuple[Shape, ...], dtype: torch.dtype, device: torch.device, **options: Any) -> list[TritonAdamW]:
    params = make_params(shapes, dtype, device)
    return [
        paper(kind, [nn.Parameter(param.detach().clone()) for param in params], **options)
        for kind in (TritonAdamW, EagerAdamW)
    ]


def run_beside_the_reference(case: Case, device: torch.device) -> None:
    """Every state tensor and the weights are as near to the formulas in float64 as the eager step's, or nearly."""
    params = make_params(case.shapes, torch.float32, device)
    if case.transposed_weights:
        params = [nn.Parameter(transposed(param.detach())) for param in params]
    options = dict(case.options)
    if case.tensor_lr:
        options["lr"] = torch.tensor(0.1, device=device)
    optimizer = paper(TritonAdamW, params, case.rank, **options)
    twin = paper(EagerAdamW, [nn.Parameter(param.detach().clone()) for param in params], case.rank, **options)
    runs = [ReferenceRun(optimizer, param, optimizer.param_groups[0]) for param in params]
    streams = [gradients(shape, case.steps, seed=i) for i, shape in enumerate(case.shapes)]
    for step in range(case.steps):
        for i, (param, other, run, stream) in enumerate(zip(params, params_of(twin), runs, streams, strict=True)):
            grad = next(stream).to(device, torch.float32)
            grad = transposed(grad) if case.transposed_grads else grad
            missing = (i, step) in case.missing
            param.grad, other.grad = (None, None) if missing else (grad, grad.clone())
            if not missing:
                run.step(grad)
        optimizer.step()
        twin.step()
    for param, other, run in zip(params, params_of(twin), runs, strict=True):
        pairs = {"W": (param, other, run.weight())}
        for key in ("m_B", "m_A", "v_B", "v_A"):
            expected = torch.stack([getattr(state, key) for state in run.states]).reshape(
                optimizer.state[param][key].shape
            )
            pairs[key] = (optimizer.state[param][key], twin.state[other][key], expected)
        for key, (mine, eager, expected) in pairs.items():
            least = 1e-5 if key == "W" else 3e-5
            assert_close(mine, expected, max(least, 3 * relative_difference(eager, expected)), key)
            assert relative_difference(eager, expected) < 1e-3, key  # or this test would say nothing


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_the_step_is_that_of_algorithm_1(case: Case, device: torch.device) -> None:
    run_beside_the_reference(case, device)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    "case",
    [
        Case("both ranks in parts", ((37, 40),), rank=33, steps=2),
        Case("one in parts, with a residual", ((25, 40),), rank=18, steps=2, options={"second_moment_rank": 3,
             "residual_gain": 1.0, "eps_mode": "relative", **RELATIVE}),
    ],
    ids=lambda case: case.name,
)  # fmt: skip
def test_the_cuts_into_blocks_and_parts_change_nothing(case: Case, device: torch.device) -> None:
    run_beside_the_reference(case, device)


def test_narrow_weights_and_gradients_give_the_eager_step_rounded_to_nearest(device: torch.device) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        optimizer, expected = both(((24, 30),), dtype, device, weight_decay=0.5, bounded=True)
        (param,), (other,) = params_of(optimizer), params_of(expected)
        for grad in gradients((24, 30), 2):
            for each in (optimizer, expected):
                set_grads(params_of(each), [grad])
                each.step()
        # a handful of numbers fall on the other side of the middle between two
        assert (param != other).float().mean() < 0.02
        assert_close(param, other, torch.finfo(dtype).eps)
        for key, value in optimizer.state[param].items():
            assert_close(value, expected.state[other][key], 3e-5, key)  # two numbers of bfloat16 have 16 bits
            assert value.dtype == torch.float32


def test_tensor_cores_products_stay_near_the_exact_step(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu":
        pytest.skip("the interpreter's products are exact, whatever they are called")
    for precision in ("tf32", "bf16x3"):
        monkeypatch.setitem(table.NEWTON_PRECISION, "newton", precision)
        monkeypatch.setitem(table.NEWTON_PRECISION, "moments", precision)
        monkeypatch.setitem(table.NEWTON_PRECISION, "squares", "tf32x3")
        optimizer, expected = both(((200, 300),), torch.float32, device, rank=64, damping_mode="relative", damping=1e-4)
        for grad in gradients((200, 300), 5):
            for each in (optimizer, expected):
                set_grads(params_of(each), [grad])
                each.step()
        ours, theirs = (each.state[params_of(each)[0]] for each in (optimizer, expected))
        for moment in "mv":
            products = [state[f"{moment}_B"] @ state[f"{moment}_A"] for state in (ours, theirs)]
            assert_close(*products, 1e-2, moment)


def test_stochastic_rounding_takes_one_of_two_neighbours_without_bias(device: torch.device) -> None:
    def stepped(dtype: torch.dtype, seed: int | None) -> torch.Tensor:
        params = [
            nn.Parameter(p.detach().bfloat16().to(dtype)) for p in make_params(((40, 50),), torch.float32, device)
        ]
        optimizer = paper(TritonAdamW, params, lr=1e-3, weight_decay=2.0)
        rounded_by_chance(optimizer, seed)
        params[0].grad = next(gradients((40, 50), 1)).bfloat16().to(device, dtype)
        optimizer.step()
        return params[0].detach().double().cpu()

    exact, first, again, second = (
        stepped(torch.float32, None),
        stepped(torch.bfloat16, 3),
        stepped(torch.bfloat16, 3),
        stepped(torch.bfloat16, 4),
    )
    assert_same_bits(again, first)
    assert (second != first).double().mean() > 0.05
    spacing = torch.exp2(torch.floor(exact.abs().log2()) - 7)
    for drawn in (first, second):
        assert ((drawn - exact).abs() <= 1.001 * spacing).all()
        # errors are uniform at most: a mean of 2000 of them is below this
        assert abs(((drawn - exact) / spacing).mean().item()) < 4 / 2000**0.5


def test_a_bfloat16_state_is_rounded_to_nearest(device: torch.device) -> None:
    optimizer, expected = both(((24, 30),), torch.float32, device, state_dtype=torch.bfloat16)
    for each in (optimizer, expected):
        set_grads(params_of(each), [next(gradients((24, 30), 1))])
        each.step()
    ours, theirs = (each.state[params_of(each)[0]] for each in (optimizer, expected))
    for key in ("m_A", "m_B", "v_A", "v_B"):
        assert ours[key].dtype == torch.bfloat16
        assert (ours[key] != theirs[key]).float().mean() < 0.02, key
        assert_close(ours[key], theirs[key], 1e-3, key)


@pytest.mark.parametrize("options", [{"capturable": True}, RELATIVE], ids=["capturable", "relative"])
def test_nothing_changes_where_the_step_is_not_enabled(options: dict[str, Any], device: torch.device) -> None:
    optimizer, _ = both(PAIR, torch.float32, device, nonfinite="skip", weight_decay=0.5, **options)
    assert_nothing_changes_where_not_enabled(optimizer, PAIR)


@pytest.mark.parametrize("options", [{}, {**RELATIVE, "eps_mode": "relative"}], ids=["absolute", "relative"])
def test_without_gradients_the_factors_shrink_as_the_eager_ones_do(
    options: dict[str, Any], device: torch.device
) -> None:
    optimizers = both(((17, 33),), torch.float32, device, **options)
    for optimizer in optimizers:
        (param,) = params_of(optimizer)
        before = param.detach().clone()
        param.grad = torch.zeros_like(param)
        optimizer.state[param]["m_A"].mul_(1e-12)  # below what relative damping tells from zero
        optimizer.step()
        assert_same_bits(param.detach(), before)
    ours, theirs = (each.state[params_of(each)[0]] for each in optimizers)
    for key in ("m_A", "v_A"):
        assert_close(ours[key], theirs[key], 1e-6, key)
    assert not ours["m_B"].any()
    if options:
        assert ours["m_A"].square().mean() * 33 > 0.1


@pytest.mark.usefixtures("small_blocks")
def test_a_rerun_gives_the_same_bits(device: torch.device) -> None:
    shapes: tuple[Shape, ...] = ((20, 40),)
    results = []
    for _ in range(2):
        optimizer, _ = both(shapes, torch.float32, device, rank=18)
        set_grads(params_of(optimizer), [next(gradients(shape, 1, seed=i)) for i, shape in enumerate(shapes)])
        optimizer.step()
        results.append(snapshot(optimizer))
    assert_same_bits(*results)


def test_scratch_beyond_the_limit_is_used_in_turns_that_change_nothing(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: tuple[Shape, ...] = ((24, 20), (17, 33), (17, 33))
    whole, turns = (both(shapes, torch.float32, device, second_moment_rank=6)[0] for _ in range(2))
    for each in (whole, turns):
        set_grads(params_of(each), [next(gradients(shape, 1, seed=i)) for i, shape in enumerate(shapes)])
    whole.step()
    view = turns._view(params_of(turns)[1], turns.param_groups[0])
    assert view is not None
    limit = table.newton_scratch_bytes(view, 6)
    made: list[int] = []
    original = newton._Step.run
    monkeypatch.setattr(table, "scratch_limit", lambda _: limit)
    monkeypatch.setattr(newton._Step, "run", lambda step: (made.append(step.n), original(step))[1])
    turns.step()
    assert len(made) > 1
    assert sum(made) == 3
    assert_same_bits(snapshot(turns), snapshot(whole))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("rank", "kind"), [(4, "plain"), (36, "plain"), (36, "ill-conditioned"), (20, "zeros"), (36, "of rank 2")]
)
def test_the_inverse_is_that_of_the_shifted_gram_matrix(rank: int, kind: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(rank)
    X = torch.randn(2, 2, rank, 90, generator=generator, dtype=torch.float64)
    if kind == "ill-conditioned":
        X *= torch.logspace(0, -4, rank, dtype=torch.float64)[:, None]
    elif kind == "zeros":
        X *= 0.0
    elif kind == "of rank 2":
        X[:, :, 2:] = X[:, :, :1] * torch.arange(2, rank)[:, None] / rank + X[:, :, 1:2]
    gram = X @ X.mT  # (n, 2, r, r)
    squares, scales = gram.clone().to(device), torch.empty(2, 2, 3, dtype=torch.float64, device=device)
    block, damping = table.NEWTON_INVERT, 2.0**-10  # a GPU is given float32
    newton_inverses.invert[(4,)](
        squares, scales, scales, torch.zeros(3, dtype=torch.int32, device=device), 2, damping, 0.1, 0.1, R=rank,
        BLOCK=block.rows, COLS=block.cols, WIDE=table.padded(rank), FIRST=0, MOMENTS=1, FIRST_SIDE=0, SIDES=2,
        RELATIVE=False,
    )  # fmt: skip
    shifted = gram + damping * torch.eye(rank, dtype=torch.float64)
    found = squares.cpu()
    condition = torch.linalg.cond(shifted).max().item()
    assert_close(found, torch.linalg.inv(shifted), 4e-16 * rank * max(10.0, condition))
    assert_same_bits(scales[0].cpu(), torch.ones(2, 3, dtype=torch.float64))


def test_no_scratch_of_a_matrix_s_size_is_allocated_and_it_is_what_is_foreseen(device: torch.device) -> None:
    shape, rank = (512, 160), 4
    optimizer, _ = both((shape,), torch.float32, device, rank=rank)
    set_grads(params_of(optimizer), [next(gradients(shape, 1))])
    optimizer.step()  # the addresses are known from here on
    bucket, _ = optimizer.last
    with torch.no_grad(), Watch([*bucket.params, *bucket.grads]) as watch:
        optimizer.step_buckets([replace(bucket, step=2.0)], optimizer.param_groups[0])
    assert watch.largest == 512 * 2 * rank * 4  # both moments' H A^T
    foreseen = table.newton_scratch_bytes(bucket.view, rank)
    assert 0.9 * watch.total <= foreseen <= 1.2 * watch.total


def test_launches_do_not_depend_on_how_many_shapes_there_are(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launched(shapes: tuple[Shape, ...], **options: Any) -> list[str]:
        optimizer, _ = both(shapes, torch.float32, device, **options)
        set_grads(params_of(optimizer), [torch.ones(shape) for shape in shapes])
        names: list[str] = []

        class Counted:
            def __init__(self, name: str) -> None:
                self.name = name

            def __getitem__(self, grid: Any) -> Any:
                return lambda *args, **kwargs: names.append(self.name)

        with monkeypatch.context() as patch:
            for module, name in (
                (newton_inverses, "gram"),
                (newton_inverses, "overlap"),
                (newton_inverses, "invert"),
                (newton_squares, "targets"),
                (newton_squares, "finish"),
                (newton_kernels, "project"),
                (newton_kernels, "update"),
                (elements, "fill"),
            ):
                patch.setattr(module, name, Counted(name))
            optimizer.step()
        return names

    aligned = ((16, 32), (24, 16), (2, 8, 16))
    assert launched(aligned[:1]) == ["fill", "gram", "invert", "project", "update", "finish"]
    assert launched(aligned) == launched(aligned[:1])
    assert len(launched(aligned, second_moment_rank=2)) == 9
    assert launched(aligned, eps_mode="relative", residual_gain=1.0, **RELATIVE) == [
        "fill", "gram", "overlap", "invert", "project", "targets", "invert", "update", "finish"
    ]  # fmt: skip


COMPILE = """
from lorapre.backends.triton import newton_inverses, newton_kernels, newton_squares

doubles = ("squares", "squares_m", "squares_v", "scales")
and_parts = (*doubles, "parts")
for target, rank, kind in ((GPUTarget("cuda", 80, 32), 40, tl.float32), (GPUTarget("cuda", 90, 32), 20, tl.bfloat16)):
    whole = table.padded(rank)
    both = dict(FIRST=0, MOMENTS=2)
    block = table.NEWTON_GRAM
    made = build(newton_inverses.gram, target, block, doubles, S_TYPE=kind, R=rank, BLOCK_R=16, BLOCK=block.rows,
                 **both)
    print("mma" in made.asm["ptx"])
    block = table.NEWTON_INVERT
    build(newton_inverses.invert, target, block, and_parts, R=rank, BLOCK=16, COLS=16, WIDE=whole, FIRST_SIDE=0,
          SIDES=2, RELATIVE=True, **both)
build(newton_inverses.overlap, target, block, doubles, R=rank, BLOCK=1024)
block = table.square_blocks(rank)
common = dict(R=rank, BLOCK_R=whole, BLOCK=block.rows, INNER=block.cols, PRECISION="tf32x3", **both)
build(newton_squares.targets, target, block, and_parts, **common)
build(newton_squares.finish, target, block, doubles, S_TYPE=kind, RM=rank, DONE=False, **common)
block = table.blocks(table.NEWTON_PROJECT, rank, 2)
tile = dict(RM=rank, RV=3, BLOCK_M=whole, BLOCK_V=16, BLOCK_P=block.rows, BLOCK_Q=block.cols, R_BLOCKS=1,
            NEGATE=True, PRECISION="bf16x2", G_TYPE=kind, S_TYPE=kind)
build(newton_kernels.project, target, block, doubles, SQUARES=True, ORDER=1, **tile)
block = table.blocks(table.NEWTON_UPDATE, rank, 2)
tile |= dict(BLOCK_P=block.rows, BLOCK_Q=block.cols, OUT=16, INNER=32, PARTS=1, RESIDUAL=True, RELATIVE=True)
made = build(newton_kernels.update, target, block, doubles, W_TYPE=kind, BOUNDED=True, STOCHASTIC=True, ROUNDS=7,
             W_ORDER=1, G_ORDER=2, MOMENT_PRECISION="tf32", SQUARE_PRECISION="tf32x3", **tile)
print("cubin" in made.asm and made.metadata.shared <= 227 * 1024)
"""


def test_amd_gpus_are_refused_in_words(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = both(ONE, torch.float32, device)[1]
    set_grads(params_of(optimizer), [torch.ones(ONE[0])])
    optimizer.step()
    assert backend.supports(*optimizer.last) is None
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "AMD" in str(backend.supports(*optimizer.last))


def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path: Any) -> None:
    pytest.importorskip("triton.backends.nvidia")
    assert isolated(BUILD + COMPILE, TRITON_CACHE_DIR=str(tmp_path)).splitlines() == ["True"] * 3
