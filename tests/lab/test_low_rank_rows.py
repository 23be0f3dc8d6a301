"""The rows of our own low-rank rivals: the packages they replace, their bytes, resuming, and what they refuse."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from _support import assert_close, assert_same_bits, gradients
from lorapre.lab.baselines.fira import Fira
from lorapre.lab.baselines.galore import GaLore
from lorapre.lab.baselines.galore_muon import GaLoreMuon
from lorapre.lab.baselines.ldadam import LDAdam
from lorapre.lab.baselines.mlorc import MLorc
from lorapre.lab.baselines.mofasgd import MoFaSGD
from lorapre.lab.config import PretrainConfig
from lorapre.lab.optimizers.low_rank import ENTRIES
from lorapre.lab.optimizers.measure import state_bytes

LR, DENSE_LR = 0.02, 0.01
TALL, WIDE, SQUARE = (24, 10), (9, 30), (16, 16)
BY_NAME = {entry.name: entry for entry in ENTRIES}
rows = pytest.mark.parametrize("entry", ENTRIES, ids=BY_NAME)


def start(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> nn.Parameter:
    generator = torch.Generator().manual_seed(3)
    return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))


def step_with(optimizer: torch.optim.Optimizer, G: Tensor) -> Tensor:
    """The parameter after one step, as a copy."""
    (param,) = optimizer.param_groups[0]["params"]
    param.grad = G.to(param.dtype)
    optimizer.step()
    copy: Tensor = param.detach().clone()
    return copy


# The packages that two of them replace.


def packaged(name: str, param: nn.Parameter, rank: int, *, scale: float, gap: int, **options: Any) -> Any:
    if name == "galore":
        package = pytest.importorskip("galore_torch")
        group = {"params": [param], "rank": rank, "update_proj_gap": gap, "scale": scale, "proj_type": "std"}
        return package.GaLoreAdamW([group], lr=LR, no_deprecation_warning=True, **options)
    package = pytest.importorskip("fira")
    group = {"params": [param], "rank": rank, "update_proj_gap": gap, "alpha": scale, "proj_type": "std"}
    return package.FiraAdamW([group], lr=LR, no_deprecation_warning=True, **options)


def ours(name: str, param: nn.Parameter, rank: int, *, scale: float, gap: int, **options: Any) -> GaLore | Fira:
    if name == "galore":
        return GaLore([param], lr=LR, rank=rank, update_gap=gap, scale=scale, **options)
    return Fira([param], lr=LR, rank=rank, update_gap=gap, alpha=scale, **options)


@pytest.mark.parametrize("scale", [0.25, 1.0])
@pytest.mark.parametrize("rank", [1, 4, 8])
@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
@pytest.mark.parametrize("name", ["galore", "fira"])
def test_galore_and_fira_agree_with_their_packages_over_three_projections(
    name: str, shape: tuple[int, int], rank: int, scale: float
) -> None:
    eps, betas = 1e-8, (0.9, 0.95)
    mine = ours(name, start(shape), rank, scale=scale, gap=4, betas=betas, eps=eps)
    theirs = packaged(name, start(shape), rank, scale=scale, gap=4, betas=betas)
    for t, G in enumerate(gradients(shape, 12), 1):
        theirs.param_groups[0]["eps"] = eps * (1 - betas[1] ** t) ** 0.5  # the next test's subject
        assert_close(step_with(mine, G), step_with(theirs, G), 2e-6, f"{name}, step {t}")


@pytest.mark.parametrize("name", ["galore", "fira"])
def test_the_packages_eps_is_ours_before_the_bias_correction(name: str) -> None:
    eps, betas = 0.3, (0.9, 0.95)
    mine = ours(name, start(TALL), 3, scale=0.25, gap=4, betas=betas, eps=eps)
    moved, plain = (packaged(name, start(TALL), 3, scale=0.25, gap=4, betas=betas, eps=eps) for _ in range(2))
    for t, G in enumerate(gradients(TALL, 8), 1):
        moved.param_groups[0]["eps"] = eps * (1 - betas[1] ** t) ** 0.5
        actual = step_with(mine, G)
        assert_close(actual, step_with(moved, G), 2e-6, f"step {t}")
        assert not torch.allclose(actual, step_with(plain, G), rtol=1e-3)


@pytest.mark.parametrize("name", ["galore", "fira"])
def test_weight_decay_is_before_the_update_here_and_after_it_in_the_packages(name: str) -> None:
    G, W = next(gradients(WIDE, 1)), start(WIDE, torch.float64).detach()
    options = {"scale": 0.25, "gap": 4, "betas": (0.9, 0.95), "eps": 1e-8}
    no_decay = step_with(ours(name, start(WIDE, torch.float64), 3, **options), G)
    decayed = step_with(ours(name, start(WIDE, torch.float64), 3, weight_decay=0.5, **options), G)
    theirs = step_with(packaged(name, start(WIDE, torch.float64), 3, weight_decay=0.5, **options), G)
    assert_close(decayed, no_decay - LR * 0.5 * W, 1e-12)
    assert_close(theirs, no_decay - LR * 0.5 * no_decay, 1e-6)


@pytest.mark.parametrize("name", ["galore", "fira"])
def test_projections_are_orthonormal_to_the_parameters_precision_here_and_to_float32s_in_the_packages(
    name: str,
) -> None:
    G, identity = next(gradients(TALL, 1)), torch.eye(3, dtype=torch.float64)
    mine = ours(name, start(TALL, torch.float64), 3, scale=0.25, gap=4)
    theirs = packaged(name, start(TALL, torch.float64), 3, scale=0.25, gap=4)
    step_with(mine, G)
    step_with(theirs, G)
    P = mine.state[mine.param_groups[0]["params"][0]]["projection"]
    rows_of_theirs = theirs.state[theirs.param_groups[0]["params"][0]]["projector"].ortho_matrix
    assert (P.T @ P - identity).abs().max() < 1e-14
    assert (rows_of_theirs @ rows_of_theirs.T - identity).abs().max() > 1e-9


def test_a_gradient_of_zeros_ends_firas_residual_in_the_package_and_not_here() -> None:
    zeros, G = torch.zeros(TALL), next(gradients(TALL, 1))
    options = {"scale": 0.25, "gap": 1, "betas": (0.9, 0.95), "eps": 1e-8}
    mine, theirs = ours("fira", start(TALL), 3, **options), packaged("fira", start(TALL), 3, **options)
    for step in (zeros, G):
        step_with(mine, step)
        step_with(theirs, step)
    (my_state,), (their_state,) = mine.state.values(), theirs.state.values()
    assert their_state["scaling_grad"] < 1.1e-8
    assert my_state["residual_norm"] > 1


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_firas_residual_keeps_what_alpha_leaves_of_the_projected_gradient(alpha: float) -> None:
    """At alpha = 1 it is orthogonal to the subspace, as in the paper; below that it is not, as in the package."""
    param, G = start(TALL, torch.float64), next(gradients(TALL, 1))
    W = param.detach().clone()
    optimizer = Fira([param], lr=LR, rank=3, alpha=alpha, eps=0.0)
    direction = (W - step_with(optimizer, G)) / LR
    P = optimizer.state[param]["projection"]
    R = G @ P
    in_subspace = direction @ P - alpha * R.sign()  # Adam's first step is the sign
    expected = (1 - alpha) * R * (3**0.5 / R.norm(dim=1, keepdim=True))
    assert (in_subspace - expected).abs().max() < 1e-7


# The rows.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 24)
        self.tall, self.wide, self.square = nn.Linear(10, 24, bias=False), nn.Linear(30, 9), nn.Linear(16, 16)
        self.thin = nn.Linear(4, 20, bias=False)  # its shorter side is not above the rank
        self.norm = nn.LayerNorm(24)


CONFIG = PretrainConfig(rank=4, weight_decay=0.1, seed=5)


def built(entry: Any) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = Net()
    make, kwargs = entry.build(net, CONFIG, LR, DENSE_LR)
    return net, make(**kwargs)


def train(net: Net, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in net.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


@rows
def test_a_rows_formula_is_the_bytes_that_its_optimizer_holds(entry: Any) -> None:
    net, optimizer = built(entry)
    train(net, optimizer, range(3))
    for matrix in (net.tall.weight, net.wide.weight, net.square.weight):
        assert state_bytes(optimizer, [matrix]) == entry.state_bytes(*matrix.shape, 4), tuple(matrix.shape)


@rows
def test_a_row_gives_all_but_the_compressed_matrices_to_torchs_adamw(entry: Any) -> None:
    net, optimizer = built(entry)
    twin, _ = built(entry)
    options = {"betas": (0.9, 0.95), "eps": 1e-8}
    dense = [twin.embed.weight, twin.wide.bias, twin.square.bias, *twin.norm.parameters()]
    decayed = {True: [], False: []}
    for name, param in twin.named_parameters():
        if any(param is other for other in dense):
            group = next(g for g in optimizer.param_groups if name in g["param_names"])
            decayed[group["weight_decay"] > 0].append(param)
    groups = [
        {"params": [twin.thin.weight], "lr": LR, "weight_decay": 0.1},
        {"params": decayed[True], "lr": DENSE_LR, "weight_decay": 0.1},
        {"params": decayed[False], "lr": DENSE_LR, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW([group for group in groups if group["params"]], **options)
    train(net, optimizer, range(3))
    train(twin, adamw, range(3))
    for param, other in ((net.thin.weight, twin.thin.weight), (net.norm.weight, twin.norm.weight)):
        assert_same_bits(param, other)
    assert_same_bits(net.embed.weight, twin.embed.weight)


@rows
def test_a_rows_optimizer_resumes_to_the_bit_from_a_file_of_plain_tensors(entry: Any) -> None:
    net, optimizer = built(entry)
    train(net, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"weights": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, second = built(entry)
    resumed.load_state_dict(saved["weights"])
    second.load_state_dict(saved["optimizer"])
    train(net, optimizer, range(3, 8))
    train(resumed, second, range(3, 8))
    assert_same_bits(resumed.state_dict(), net.state_dict())
    assert_same_bits(second.state_dict()["parts"][0]["state"], optimizer.state_dict()["parts"][0]["state"])


@rows
def test_a_rows_learning_rate_is_searched_around_its_default(entry: Any) -> None:
    assert entry.default_lr in entry.lr_grid
    assert list(entry.lr_grid) == sorted(set(entry.lr_grid))


def test_mlorcs_random_matrices_follow_the_runs_seed() -> None:
    _, optimizer = built(BY_NAME["mlorc"])
    assert {group["seed"] for group in optimizer.param_groups if "seed" in group} == {CONFIG.seed}


# What they refuse.

CLASSES = [GaLore, Fira, GaLoreMuon, MLorc, MoFaSGD, LDAdam]
classes = pytest.mark.parametrize("make", CLASSES, ids=lambda make: make.__name__)


@classes
@pytest.mark.parametrize("shape", [(5,), (4, 3, 2)])
def test_what_is_no_matrix_is_refused_with_the_remedy(make: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"moves matrices alone.*torch\.optim\.AdamW"):
        make([nn.Parameter(torch.zeros(shape))], rank=1)


@classes
def test_a_refused_group_leaves_the_optimizer_as_it_was(make: Any) -> None:
    optimizer = make([start(WIDE)], rank=2)
    with pytest.raises(ValueError, match="has no more than 9"):
        optimizer.add_param_group({"params": [start(WIDE)], "rank": 10})
    assert len(optimizer.param_groups) == 1


@classes
def test_weights_too_narrow_for_decompositions_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"torch\.bfloat16 is too narrow.*autocast"):
        make([start(WIDE, torch.bfloat16)], rank=2)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (GaLore, {"rank": 0}, "Invalid rank value: 0"),
        (GaLore, {"rank": 0.5}, "Invalid rank value: 0.5"),
        (GaLore, {"rank": 2.5}, "must be a whole number"),
        (GaLore, {"lr": -1.0}, "Invalid lr value"),
        (GaLore, {"betas": (0.9, 1.0)}, r"Invalid betas\[1\] value: 1.0. It must be below 1"),
        (GaLore, {"update_gap": 0}, "Invalid update_gap value: 0. It must be at least 1"),
        (GaLore, {"scale": -0.1}, "Invalid scale value"),
        (Fira, {"alpha": float("nan")}, "Invalid alpha value: nan"),
        (Fira, {"max_growth": 0.9}, "Invalid max_growth value: 0.9. It must be at least 1"),
        (GaLoreMuon, {"beta": 1.0}, "Invalid beta value"),
        (GaLoreMuon, {"newton_schulz_steps": 0}, "Invalid newton_schulz_steps value"),
        (GaLoreMuon, {"adjust_lr_fn": "none"}, "Choose 'match_rms_adamw' or 'original'"),
        (MLorc, {"oversampling": -1}, "Invalid oversampling value"),
        (MLorc, {"power_iterations": -1}, "Invalid power_iterations value"),
        (MoFaSGD, {"weight_decay": -0.1}, "Invalid weight_decay value"),
        (LDAdam, {"rho": 1.0}, "Invalid rho value"),
        (LDAdam, {"eps": -1e-8}, "Invalid eps value"),
    ],
)
def test_an_option_out_of_range_is_named(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make([start(WIDE)], **{"rank": 2, **options})


@classes
def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned(make: Any) -> None:
    param = start(WIDE)
    before = param.detach().clone()
    optimizer = make([param], rank=2, lr=LR)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == before.square().sum()
    assert not torch.equal(param, before)


@classes
def test_a_first_gradient_of_zeros_moves_nothing_and_harms_nothing(make: Any) -> None:
    optimizer = make([start(TALL)], rank=3, lr=LR)
    assert_same_bits(step_with(optimizer, torch.zeros(TALL)), start(TALL).detach())
    for G in gradients(TALL, 3):
        assert step_with(optimizer, G).isfinite().all()


@classes
def test_a_sparse_gradient_is_refused(make: Any) -> None:
    param = start(WIDE)
    param.grad = torch.zeros(WIDE).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        make([param], rank=2).step()
