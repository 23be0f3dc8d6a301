"""LoRAPreMuon: Algorithm 2 in both precisions, the subspace form by plain formulas, and torch's Muon as the limit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from _formulas import MomentumRun, random_matrix
from _support import (
    Shape,
    assert_close,
    assert_same_bits,
    clone_params,
    gradients,
    make_params,
    random_grads,
    relative_difference,
    set_grads,
    snapshot,
)
from lorapre import LoRAPreMuon, reference
from lorapre.orthogonal import newton_schulz

STEPS = 20
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}

# Newton-Schulz.


@pytest.mark.parametrize("steps", [1, 5, 8])
@pytest.mark.parametrize(("p", "q"), [(5, 9), (9, 5), (7, 7), (1, 6), (6, 1)])
def test_newton_schulz_is_the_references_on_each_matrix(p: int, q: int, steps: int) -> None:
    M = random_matrix(3, p, q)
    for i in range(3):
        assert_close(newton_schulz(M, steps)[i], reference.newton_schulz(M[i], steps), 1e-12)
        assert_close(newton_schulz(M.float(), steps)[i], reference.newton_schulz(M[i], steps), 1e-4)


@pytest.mark.parametrize("exponent", range(-20, 21, 5))
def test_newton_schulz_knows_no_scale(exponent: int) -> None:
    M = random_matrix(2, 6, 10)
    expected = newton_schulz(M)
    assert_close(newton_schulz((M * 10.0**exponent).float()), expected, 1e-5)
    scaled = M.float() * 2.0 ** (3 * exponent)
    assert_same_bits(newton_schulz(scaled), newton_schulz(M.float()))


def test_newton_schulz_leaves_zeros_and_their_neighbours_alone() -> None:
    M = torch.cat([torch.zeros(1, 6, 10), random_matrix(1, 6, 10).float()])
    result = newton_schulz(M)
    assert not result[0].any()
    assert_close(result[1], newton_schulz(M[1:])[0], 1e-6)


def test_newton_schulz_iterates_in_the_dtype_it_is_given_and_returns_its_own() -> None:
    M = random_matrix(2, 16, 24).float()
    exact = newton_schulz(M, dtype=torch.float64)
    assert exact.dtype == torch.float32
    assert_close(exact, newton_schulz(M.double()), 3e-7)
    coarse = newton_schulz(M, dtype=torch.bfloat16)
    assert coarse.dtype == torch.float32
    assert 1e-4 < relative_difference(coarse, exact) < 3e-2


# Algorithm 2.


@dataclass(frozen=True)
class Case:
    name: str
    shapes: tuple[Shape, ...]
    rank: int | float = 4
    options: dict[str, Any] = field(default_factory=dict)
    missing: frozenset[tuple[int, int]] = frozenset()

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


MIXED: tuple[Shape, ...] = ((12, 20), (12, 20), (24, 10), (16, 16))
SOME = frozenset({(0, 0), (0, 1), (2, 5), (1, 12), (3, 19)})
CASES = [
    Case("tall", ((40, 12),)),
    Case("wide", ((12, 40),)),
    Case("square", ((20, 20),)),
    Case("stack", ((3, 12, 16), (12, 16)), rank=3),
    Case("2-d convolution", ((12, 3, 3, 3),)),
    Case("1-d convolution flattened", ((12, 5, 3),), options={"view_3d": "flatten"}),
    Case("rank one", ((16, 24), (24, 16)), rank=1),
    Case("fractional rank", ((16, 24), (32, 8)), rank=0.25),
    Case("several shapes, gradients missing", MIXED, missing=SOME),
    Case("capturable, gradients missing", MIXED, options={"capturable": True}, missing=SOME),
    Case("weight decay", MIXED[1:3], options={"weight_decay": 0.1}),
    Case("maximize", MIXED[1:3], options={"maximize": True, "weight_decay": 0.1}),
    Case("scaled like AdamW", MIXED[1:], options={"adjust_lr_fn": "match_rms_adamw"}),
    Case("scale", MIXED[1:3], options={"scale": 0.25, "weight_decay": 0.1}),
    Case("iterations", MIXED[1:3], options={"ns_steps": 7}),
    Case("no memory", MIXED[1:3], options={"momentum": 0.0}),
    Case("long memory", MIXED[1:3], options={"momentum": 0.99}),
]


class Algorithm2:
    """`reference.lorapre_muon_step` for one parameter, from the optimizer's own factors."""

    def __init__(self, optimizer: LoRAPreMuon, param: nn.Parameter, group: dict[str, Any]) -> None:
        run = MomentumRun(optimizer, param, group)  # for the views
        self.run, self.group = run, group
        self.B, self.A, self.W = run.B, run.A, run.W

    def step(self, grad: torch.Tensor) -> None:
        group = self.group
        for i, G in enumerate(self.run._wide(grad, self.run.view.p, self.run.view.q)):
            moved, self.B[i], self.A[i] = reference.lorapre_muon_step(
                self.W[i],
                -G if group["maximize"] else G,
                self.B[i],
                self.A[i],
                lr=1e-2,
                mu=group["momentum"],
                weight_decay=group["weight_decay"],
                shape_scale=group["adjust_lr_fn"],
                damping=1e-6,
                damping_mode="absolute",
            )
            # the reference knows neither `scale` nor another number of iterations
            decayed = self.W[i] * (1 - 1e-2 * group["weight_decay"])
            self.W[i] = decayed + group["scale"] * (moved - decayed)


@pytest.mark.parametrize("case", [case for case in CASES if "ns_steps" not in case.options], ids=str)
def test_the_preset_is_algorithm_2_in_both_precisions(case: Case, device: torch.device) -> None:
    optimizers = {}
    for dtype in TOLERANCE:
        params = [nn.Parameter(p.detach().to(dtype)) for p in make_params(case.shapes, torch.float32, device)]
        optimizers[dtype] = LoRAPreMuon.paper(params, 1e-2, case.rank, ns_dtype=dtype, **case.options)
    judged = optimizers[torch.float32]
    runs = [Algorithm2(judged, param, judged.param_groups[0]) for param in judged.param_groups[0]["params"]]
    feed(optimizers, runs, case)
    for dtype, optimizer in optimizers.items():
        for param, run in zip(optimizer.param_groups[0]["params"], runs, strict=True):
            run.run.check(optimizer, param, TOLERANCE[dtype])


def feed(optimizers: dict[torch.dtype, Any], runs: list[Any], case: Case) -> None:
    """The same float32 gradients to every precision and to the formulas."""
    streams = [gradients(shape, STEPS, seed=i) for i, shape in enumerate(case.shapes)]
    for step in range(STEPS):
        for i, (run, stream) in enumerate(zip(runs, streams, strict=True)):
            grad = next(stream).float()
            missing = (i, step) in case.missing
            if not missing:
                run.step(grad)
            for dtype, optimizer in optimizers.items():
                param = optimizer.param_groups[0]["params"][i]
                param.grad = None if missing else grad.to(param.device, dtype)
        for optimizer in optimizers.values():
            optimizer.step()


# Beyond the paper.

FORMS: dict[str, dict[str, Any]] = {
    "default": {"nesterov": True, "residual_gain": None},
    "no Nesterov": {"nesterov": False, "residual_gain": None},
    "gain": {"nesterov": True, "residual_gain": 0.3},
    "gain 1, no Nesterov": {"nesterov": False, "residual_gain": 1.0},
    "no residual": {"nesterov": True, "residual_gain": 0.0},
    "even rows": {"nesterov": True, "residual_gain": 1.0, "normalization": "rows", "betas": (0.9, 0.8)},
    "even along the longer side": {"nesterov": True, "residual_gain": 1.0, "normalization": "longer_side"},
    "Newton's with Nesterov and a gain": {"regression": "newton", "nesterov": True, "residual_gain": 0.3},
}


# Every case in the two main forms, every form in the cases that batch differently.
TABLE = [(case, form) for case in CASES for form in ("default", "even along the longer side")]
TABLE += [
    (case, form)
    for case in CASES
    if case.name in ("stack", "several shapes, gradients missing", "capturable, gradients missing")
    for form in FORMS
    if (case, form) not in TABLE
]


@pytest.mark.parametrize(("case", "form"), TABLE, ids=str)
def test_every_form_is_its_formula_in_both_precisions(case: Case, form: str, device: torch.device) -> None:
    options = {"weight_decay": 0.0, "regression": "subspace", "normalization": "none", **FORMS[form]}
    optimizers = {}
    for dtype in TOLERANCE:
        params = [nn.Parameter(p.detach().to(dtype)) for p in make_params(case.shapes, torch.float32, device)]
        optimizers[dtype] = LoRAPreMuon(params, 1e-2, case.rank, **{**options, "ns_dtype": dtype, **case.options})
    judged = optimizers[torch.float32]
    runs = [MomentumRun(judged, param, judged.param_groups[0]) for param in judged.param_groups[0]["params"]]
    feed(optimizers, runs, case)
    for dtype, optimizer in optimizers.items():
        for param, run in zip(optimizer.param_groups[0]["params"], runs, strict=True):
            run.check(optimizer, param, TOLERANCE[dtype])


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize(("p", "q"), [(16, 24), (24, 16), (16, 16)])
def test_where_the_momentums_rank_is_below_r_it_is_torchs_muon(
    p: int, q: int, adjust: Any, nesterov: bool, device: torch.device
) -> None:
    # gradients of a fixed row space: the factors hold the whole momentum, and nothing is left outside
    V = random_matrix(5, q, seed=1)
    within = torch.linalg.pinv(V) @ V  # torch iterates in bfloat16, and blows rounding up in all other directions
    start = random_matrix(p, q, seed=2).float().to(device)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options: dict[str, Any] = {"lr": 0.01, "momentum": 0.95, "nesterov": nesterov, "weight_decay": 0.1}
    plain = {"regression": "subspace", "residual_gain": None, "normalization": "none"}
    one = LoRAPreMuon([ours], rank=6, adjust_lr_fn=adjust, **plain, **options)
    other = torch.optim.Muon([theirs], adjust_lr_fn=adjust, **options)
    for step in range(20):
        before = ours.detach().clone(), theirs.detach().clone()
        ours.grad = (random_matrix(p, 5, seed=10 + step) @ V).float().to(device)
        theirs.grad = ours.grad.clone()
        one.step()
        other.step()
        # torch averages where ours sums, which Newton-Schulz does not see
        moved, expected = (
            (new.detach() - old * (1 - 0.01 * 0.1)).cpu().double() @ within
            for new, old in zip((ours, theirs), before, strict=True)
        )
        assert_close(moved, expected, 0.03, f"step {step}")


def test_a_sum_and_not_an_average_is_what_the_factors_hold(device: torch.device) -> None:
    G = (random_matrix(12, 2) @ random_matrix(2, 20, seed=1)).to(device)
    param = nn.Parameter(torch.zeros_like(G))
    options: dict[str, Any] = {"residual_gain": 1.0, "regression": "subspace"}
    optimizer = LoRAPreMuon([param], rank=4, momentum=0.8, **options)
    for _ in range(7):
        param.grad = G.clone()
        optimizer.step()
    state = optimizer.state[param]
    assert_close(state["m_B"] @ state["m_A"], (1 - 0.8**7) / (1 - 0.8) * G, 1e-12)


def test_the_rms_of_an_update_is_adamws_where_that_is_asked_for(device: torch.device) -> None:
    for shape in ((64, 96), (96, 64), (128, 32)):
        param = make_params([shape], torch.float32, device)[0]
        options = {"regression": "subspace", "residual_gain": None, "normalization": "none"}
        optimizer = LoRAPreMuon([param], lr=1.0, rank=8, weight_decay=0.0, adjust_lr_fn="match_rms_adamw", **options)
        for grad in gradients(shape, 5):
            before = param.detach().clone()
            param.grad = grad.to(param)
            optimizer.step()
        # 0.2 to 0.4 is what AdamW's updates have in training (arXiv 2502.16982)
        assert 0.12 < (param.detach() - before).square().mean().sqrt() < 0.25


def test_even_rows_have_one_length_in_the_long_run_and_leave_a_row_without_gradient_alone(device: torch.device) -> None:
    shape = (40, 12)
    sizes = torch.logspace(-3, 0, 40, dtype=torch.float64)[:, None]
    sizes[7] = 0
    lengths = {}
    for normalization in ("none", "rows"):
        param = make_params([shape], torch.float32, device)[0]
        optimizer = LoRAPreMuon([param], lr=1.0, rank=4, weight_decay=0.0, normalization=normalization)
        moved = []
        for step in range(60):
            before = param.detach().clone()
            param.grad = (sizes * random_matrix(*shape, seed=step)).to(param)
            optimizer.step()
            moved.append((param.detach() - before).cpu().double())
        assert not any(update[7].any() for update in moved)
        rows = torch.stack(moved[30:]).square().mean(dim=(0, 2)).sqrt()
        lengths[normalization] = rows[torch.arange(40) != 7]
        # what all rows have together is the same
        assert rows.square().mean().sqrt() == pytest.approx(0.2, rel=0.15)
    assert lengths["none"].max() > 100 * lengths["none"].min()
    assert lengths["rows"].max() < 1.5 * lengths["rows"].min()


def test_dense_parameters_take_torchs_adamw_beside_the_matrices(device: torch.device) -> None:
    params = make_params([(12, 20), (20,), (9, 11)], torch.float32, device)
    optimizer = LoRAPreMuon(
        [{"params": params[:2]}, {"params": params[2:], "compress": False, "lr": 0.05}],
        lr=0.01,
        rank=3,
        betas=(0.8, 0.97),
        eps=1e-6,
        weight_decay=0.1,
    )
    copies = clone_params(params[1:])
    groups = [{"params": copies[:1], "lr": 0.01}, {"params": copies[1:], "lr": 0.05}]
    adamw = torch.optim.AdamW(groups, betas=(0.8, 0.97), eps=1e-6, weight_decay=0.1)
    for step in range(6):
        grads = random_grads(params, step)
        set_grads(params, grads)
        set_grads(copies, grads[1:])
        optimizer.step()
        adamw.step()
    assert_same_bits(snapshot(optimizer)[1:], snapshot(adamw))
