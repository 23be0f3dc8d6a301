"""The rows of our own optimizers: what they hold, what they make of the recipe's options, what they compute."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from _peers import llama
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from _support import assert_close, assert_same_bits
from lorapre import LoRAPreAdamW, LoRAPreLion, LoRAPreMuon, LoRAPreSGD, reference
from lorapre.lab.config import PretrainConfig
from lorapre.lab.optimizers import OPTIMIZERS, matrix_state_bytes
from lorapre.lab.optimizers.entry import OptimizerEntry
from lorapre.lab.optimizers.hybrid import HybridOptimizer, parts_of
from lorapre.lab.optimizers.measure import state_bytes
from lorapre.optim.base import FactoredOptimizer

LR, DENSE_LR, RANK = 0.02, 0.01, 4
ONE_MOMENTUM = ("lorapre-muon", "lorapre-muon-paper", "lorapre-sgd", "lorapre-lion")
BESIDE = ("lorapre-sgd", "lorapre-lion")
OURS = ("lorapre-adamw", "lorapre-adamw-paper", *ONE_MOMENTUM)
rows = pytest.mark.parametrize("name", ONE_MOMENTUM)


class Net(nn.Module):
    """Matrices above and below the rank, a stack of them, a convolution, and what is never compressed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 24)
        self.tall, self.wide = nn.Linear(10, 24, bias=False), nn.Linear(30, 9)
        self.thin = nn.Linear(RANK, 20, bias=False)
        self.experts = nn.Parameter(torch.randn(3, 12, 14))
        self.conv = nn.Conv1d(8, 16, 3)
        self.norm = nn.LayerNorm(24)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def built(name: str, model: nn.Module, **options: Any) -> Optimizer:
    config = PretrainConfig(rank=RANK, weight_decay=0.1, seed=5, beta1=0.7, beta2=0.8, options=options)
    kind, kwargs = OPTIMIZERS[name].build(model, config, LR, DENSE_LR)
    return kind(**kwargs)


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)
        optimizer.step()


# What they hold.


@pytest.mark.parametrize(("dtype", "width"), [(None, 4), ("bfloat16", 2), ("float64", 8)])
@pytest.mark.parametrize("shape", [(24, 10), (9, 30), (16, 16)])
@rows
def test_a_matrix_holds_one_momentum_as_two_factors_and_a_counter(
    name: str, shape: tuple[int, int], dtype: str | None, width: int
) -> None:
    (p, q), entry = shape, OPTIMIZERS[name]
    body = nn.Sequential(nn.Linear(q, p, bias=False))
    optimizer = built(name, body, state_dtype=dtype)
    more = max(p, q) if name == "lorapre-muon" else 0  # which are evened out along their longer side
    expected = width * ((p + q) * RANK + more) + 4
    train(body, optimizer, range(3))
    assert state_bytes(optimizer) == expected == entry.formula({"state_dtype": dtype})(p, q, RANK)
    assert dtype is not None or entry.state_bytes(p, q, RANK) == 4 * ((p + q) * RANK + more + 1)


@pytest.mark.parametrize(("normalization", "more"), [("rows", 9), ("longer_side", 30)])
def test_muons_even_rows_or_columns_cost_a_number_each(normalization: str, more: int) -> None:
    body = nn.Sequential(nn.Linear(30, 9, bias=False))
    given = {"normalization": normalization}
    optimizer = built("lorapre-muon", body, **given)
    expected = 4 * (39 * RANK + more) + 4
    assert state_bytes(optimizer) == expected == OPTIMIZERS["lorapre-muon"].formula(given)(9, 30, RANK)


@pytest.mark.parametrize("name", OURS)
def test_a_model_holds_the_sum_also_over_matrices_that_are_not_above_the_rank(name: str) -> None:
    body = nn.Sequential(nn.Linear(30, 9, bias=False), nn.Linear(9, 24, bias=False), nn.Linear(24, 3, bias=False))
    given = {"state_dtype": "bfloat16"}
    optimizer = built(name, body, **given)
    train(body, optimizer, range(1))
    dense = 72 * 2 * (1 if name in BESIDE else 2) + 4  # the third, with Lion's and SGD's momentum or AdamW's two
    held = state_bytes(optimizer)
    assert held == matrix_state_bytes(OPTIMIZERS[name], body, RANK, given)
    assert state_bytes(optimizer, [body[2].weight]) == dense


# What becomes of the recipe's options.


@pytest.mark.parametrize("name", OURS)
def test_the_rest_of_the_model_takes_torchs_adamw_with_the_runs_betas(name: str) -> None:
    model, twin = net(), net()
    optimizer = built(name, model)
    dense = {"embed.weight": 0.1, "wide.bias": 0.0, "conv.bias": 0.0, "norm.weight": 0.0, "norm.bias": 0.0}
    named = dict(twin.named_parameters())
    groups = [{"params": [named[key]], "weight_decay": decay} for key, decay in dense.items()]
    adamw = AdamW(groups, lr=DENSE_LR, betas=(0.7, 0.8), eps=1e-8)
    train(model, optimizer, range(3))
    train(twin, adamw, range(3))
    for key in dense:
        assert_same_bits(dict(model.named_parameters())[key], named[key])


def by_hand(name: str, model: nn.Module) -> list[Optimizer]:
    named = list(model.named_parameters())
    matrices = [(key, param) for key, param in named if "_proj" in key]
    dense = [(key, param) for key, param in named if "embed" in key or "lm_head" in key]
    norms = [(key, param) for key, param in named if "norm" in key]
    assert len(matrices) + len(dense) + len(norms) == len(named)
    rest: list[dict[str, Any]] = [
        {"params": dense, "lr": DENSE_LR, "weight_decay": 0.1},
        {"params": norms, "lr": DENSE_LR, "weight_decay": 0.0},
    ]
    common: dict[str, Any] = {"lr": LR, "rank": RANK, "weight_decay": 0.1, "seed": 5}
    if name in BESIDE:
        kind: Any = {"lorapre-sgd": LoRAPreSGD, "lorapre-lion": LoRAPreLion}[name]
        return [kind(matrices, **common), AdamW(rest, betas=(0.7, 0.8))]
    make: Any = {
        "lorapre-adamw": LoRAPreAdamW,
        "lorapre-adamw-paper": LoRAPreAdamW.paper,
        "lorapre-muon": LoRAPreMuon,
        "lorapre-muon-paper": LoRAPreMuon.paper,
    }[name]
    whole = [{"params": matrices}, *({**group, "compress": False} for group in rest)]
    return [make(whole, betas=(0.7, 0.8), **common)]


@pytest.mark.parametrize("name", OURS)
def test_a_row_trains_a_model_as_the_class_does_that_is_called_by_hand(name: str) -> None:
    model, twin = llama(), llama()
    optimizers: dict[nn.Module, list[Optimizer]] = {model: [built(name, model)], twin: by_hand(name, twin)}
    for step in range(3):
        tokens = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(step))
        for each, steppers in optimizers.items():
            each.zero_grad()
            each(input_ids=tokens, labels=tokens).loss.backward()
            for optimizer in steppers:
                optimizer.step()
    start = dict(llama().named_parameters())
    for (key, param), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_same_bits(param, other)
        assert not torch.equal(param, start[key]), key


@pytest.mark.parametrize(
    ("name", "momentum"), [("lorapre-muon", 0.9), ("lorapre-muon-paper", 0.95), ("lorapre-sgd", 0.9)]
)
def test_the_momentum_of_a_sum_is_set_by_its_own_option_and_not_by_beta1(name: str, momentum: float) -> None:
    for given, expected in (({}, momentum), ({"momentum": 0.5}, 0.5)):
        (group, *_) = built(name, net(), **given).param_groups
        assert group["momentum"] == expected
    assert f"omentum {momentum} whatever --beta1 says" in OPTIMIZERS[name].limitations


def test_lions_betas_are_set_by_its_own_option_and_not_by_the_runs() -> None:
    for given, expected in (({}, (0.9, 0.99)), ({"betas": [0.95, 0.98]}, (0.95, 0.98))):
        optimizer = built("lorapre-lion", net(), **given)
        betas = [group["betas"] for group in optimizer.param_groups]
        matrices = sum(group.get("compress", False) for group in optimizer.param_groups)
        assert betas == [expected] * matrices + [(0.7, 0.8)] * (len(betas) - matrices)
        assert matrices == 2  # and a convolution, which is viewed in its own way


def test_muons_eps_is_no_option_for_its_update_has_none() -> None:
    assert [name for name in OURS if "eps" in OPTIMIZERS[name].options] == ["lorapre-adamw", "lorapre-adamw-paper"]


@pytest.mark.parametrize("name", BESIDE)
def test_every_group_follows_a_schedule(name: str) -> None:
    model = net()
    optimizer = built(name, model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = {key: param.detach().clone() for key, param in model.named_parameters()}
    train(model, optimizer, range(2))
    assert_same_bits({key: param.detach() for key, param in model.named_parameters()}, before)


@pytest.mark.parametrize("name", OURS)
def test_a_run_resumes_to_the_bit_from_a_file_of_plain_tensors(name: str) -> None:
    model, resumed = net(), net()
    optimizer, second = built(name, model), built(name, resumed)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"weights": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved["weights"])
    second.load_state_dict(saved["optimizer"])
    train(model, optimizer, range(3, 6))
    train(resumed, second, range(3, 6))
    assert_same_bits(resumed.state_dict(), model.state_dict())


# What they compute: on gradients that the factors can hold, the method with a dense momentum.


def polar(M: Tensor) -> Tensor:
    """Muon's five Newton-Schulz iterations."""
    X = M / M.norm()
    for _ in range(5):
        S = X @ X.T
        X = 3.4445 * X + (-4.7750 * S + 2.0315 * S @ S) @ X
    return X


def dense_step(name: str, W: Tensor, G: Tensor, M: Tensor) -> tuple[Tensor, Tensor]:
    """The new weight and momentum of a wide or square matrix."""
    kept = W * (1 - LR * 0.1)
    if name == "lorapre-sgd":
        M = 0.8 * M + G
        return kept - LR * M, M
    if name == "lorapre-lion":
        return kept - LR * (0.6 * M + 0.4 * G).sign(), 0.8 * M + 0.2 * G
    M = 0.8 * M + G
    return kept - LR * 0.2 * math.sqrt(max(W.shape)) * polar(G + 0.8 * M), M


DENSE_CASES: dict[str, dict[str, Any]] = {
    "lorapre-sgd": {"momentum": 0.8, "nesterov": False},
    "lorapre-lion": {"betas": [0.6, 0.8]},
    "lorapre-muon": {
        "momentum": 0.8,
        "nesterov": True,
        "adjust_lr_fn": "match_rms_adamw",
        "normalization": "none",
        "scale": 1.0,
    },
}


@pytest.mark.parametrize("name", DENSE_CASES)
def test_gradients_of_the_factors_rank_are_stepped_on_as_with_a_dense_momentum(name: str) -> None:
    torch.manual_seed(1)
    body = nn.Sequential(nn.Linear(30, 9, bias=False)).double()
    W, M = body[0].weight.detach().clone(), torch.zeros(9, 30, dtype=torch.float64)
    optimizer = built(name, body, regression="subspace", residual_gain=None, **DENSE_CASES[name])
    left, right = torch.randn(9, RANK, dtype=torch.float64), torch.randn(RANK, 30, dtype=torch.float64)
    for step in range(8):
        G = left @ torch.randn(RANK, RANK, dtype=torch.float64) @ right
        body[0].weight.grad = G
        optimizer.step()
        W, M = dense_step(name, W, G, M)
        assert_close(body[0].weight, W, 1e-9, f"step {step}")


@pytest.mark.parametrize("shape", [(24, 10), (9, 30)])
def test_the_papers_row_is_algorithm_2_as_printed(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    body = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False)).double()
    optimizer = built("lorapre-muon-paper", body)
    weight = body[0].weight
    W, B, A = (tensor.detach().clone() for tensor in (weight, *(optimizer.state[weight][k] for k in ("m_B", "m_A"))))
    for step in range(6):
        weight.grad = torch.randn(shape, dtype=torch.float64)
        optimizer.step()
        W, B, A = reference.lorapre_muon_step(W, weight.grad, B, A, lr=LR, mu=0.95, weight_decay=0.1, damping=1e-6)
        assert_close(weight, W, 1e-7, f"step {step}")


# What the recipes ask of them.


def test_the_registry_says_which_optimizers_keep_factors() -> None:
    def keeps_factors(entry: OptimizerEntry) -> bool:
        optimizer = built(entry.name, llama()) if entry.prepare is None else None
        return optimizer is not None and any(isinstance(part, FactoredOptimizer) for part in parts_of(optimizer))

    installed = [entry for entry in OPTIMIZERS.values() if entry.installed_version() is not None]
    assert [entry.name for entry in installed if keeps_factors(entry)] == list(OURS)
    assert [entry.name for entry in OPTIMIZERS.values() if entry.factored] == list(OURS)


def test_a_group_that_no_part_would_step_is_refused() -> None:
    optimizer = built("lorapre-lion", net())
    assert isinstance(optimizer, HybridOptimizer)
    groups = list(optimizer.param_groups)
    with pytest.raises(RuntimeError, match=r"its parts \(LoRAPreLion, AdamW\).*when the optimizer is built"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert optimizer.param_groups == groups
