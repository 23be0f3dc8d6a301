"""Rivals from torch and from packages move matrices as their papers say, and everything else as AdamW does."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import _peer_formulas as formulas
import pytest
import torch
from _peer_formulas import Formula, Run, State
from _peers import DENSE_LR, ENTRIES, LR, Net, drawn, installed, llama, make, matrix_part, step, train
from torch import nn

from _support import assert_close, assert_same_bits, gradients, relative_difference
from lorapre.lab.errors import UserError

FORMULAS: dict[str, Formula] = {
    "adam-beta1-0": formulas.adam_beta1_0,
    "stable-adamw": formulas.stable_adamw,
    "muon": formulas.muon,
    "adafactor": formulas.adafactor,
    "sgd": formulas.sgd,
    "galore": formulas.galore,
    "fira": formulas.fira,
    "apollo": formulas.apollo,
    "apollo-mini": formulas.apollo_mini,
    "flora": formulas.flora,
    "adam-mini": formulas.adam_mini,
    "came": formulas.came,
}
EIGHT_BIT = ("adamw-8bit", "adamw-8bit-bnb")
SHAPES = [(40, 16), (16, 40), (24, 24), (50, 10)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMULAS)
def test_a_matrix_moves_as_the_paper_says(name: str, shape: tuple[int, int]) -> None:
    entry = installed(name)
    run, state = Run(rank=1 if name == "apollo-mini" else 3), State()
    model = Net(*shape, dtype=torch.float64)
    optimizer = make(entry, model, run)
    param = model.mlp.weight
    W = param.detach().clone()
    for t, G in enumerate(gradients(shape, 8), start=1):
        before = param.detach().clone()
        param.grad = G.clone()
        step(optimizer)
        run.drawn = drawn(matrix_part(optimizer), param)
        expected = FORMULAS[name](W, G, state, t, LR, run)
        # The step, not the weight, which would hide it.
        assert_close(param - before, expected - W, 2e-2 if name == "muon" else 1e-6, f"{name} {shape} step {t}")
        W = expected


def test_lora_rite_moves_its_factors_as_the_paper_says() -> None:
    run, state = Run(), State()
    model = Net(40, 16, dtype=torch.float64)
    optimizer = make(installed("lora-rite"), model, run)
    A, B = model.mlp.lora_A, model.mlp.lora_B
    expected_A, expected_B = A.detach().clone(), B.detach().clone()
    for t, drawn_G in enumerate(gradients((40, 16), 8), start=1):
        before = A.detach().clone(), B.detach().clone()
        G = drawn_G * (0.001 if t % 2 else 0.1)  # on both sides of the clipping
        A.grad, B.grad = before[1].mT @ G, G @ before[0].mT  # what the chain rule makes of G
        step(optimizer)
        previous = expected_A, expected_B
        expected_A, expected_B = formulas.lora_rite(*previous, A.grad, B.grad, state, t, LR, run)
        assert_close(A - before[0], expected_A - previous[0], 1e-6, f"A, step {t}")
        assert_close(B - before[1], expected_B - previous[1], 1e-6, f"B, step {t}")


@pytest.mark.parametrize("shape", [(64, 80), (96, 64)])
@pytest.mark.parametrize("name", EIGHT_BIT)
def test_eight_bits_are_adamw_up_to_quantisation_and_no_closer(name: str, shape: tuple[int, int]) -> None:
    run, state = Run(), State()
    model = Net(*shape)
    optimizer = make(installed(name), model, run)
    param = model.mlp.weight
    start = param.detach().double()
    W = start
    for t, G in enumerate(gradients(shape, 10), start=1):
        param.grad = G.float()
        step(optimizer)
        W = formulas.adamw(W, G.float().double(), state, t, LR, run)
    gap = relative_difference(param - start, W - start)
    assert 1e-4 < gap < 0.02, f"{name}: {gap}"


def test_fira_takes_a_quarter_of_the_projected_gradient_from_the_residual() -> None:
    run, states = Run(), (State(), State())
    model = Net(40, 16, dtype=torch.float64)
    optimizer = make(installed("fira"), model, run)
    start = model.mlp.weight.detach().clone()
    G = next(gradients((40, 16), 1))
    model.mlp.weight.grad = G.clone()
    step(optimizer)
    moved = model.mlp.weight - start
    assert relative_difference(moved, formulas.fira(start, G, states[0], 1, LR, run) - start) < 1e-6
    assert relative_difference(moved, formulas.fira_paper(start, G, states[1], 1, LR, run) - start) > 0.1


@pytest.mark.parametrize("name", ["apollo", "apollo-mini"])
def test_apollo_draws_gaussian_projections_anew_every_gap(name: str) -> None:
    rank = 1 if name == "apollo-mini" else 16
    model = Net(64, 3000)
    optimizer = make(installed(name), model, Run(rank=rank))
    seen = []
    for _ in range(6):
        train(model, optimizer, 1)
        P = drawn(matrix_part(optimizer), model.mlp.weight)
        assert P is not None
        seen.append(P.clone())
    other_seed = Net(64, 3000)
    repeated = make(ENTRIES[name], other_seed, Run(rank=rank, seed=5))
    train(other_seed, repeated, 1)
    assert_same_bits(drawn(matrix_part(repeated), other_seed.mlp.weight), seen[0])  # as the row says
    changed = [not torch.equal(one, other) for one, other in pairwise(seen)]
    assert changed == [False, False, True, False, False]
    everything = torch.cat([P.flatten() for P in (seen[0], seen[3])]) * rank**0.5
    error = len(everything) ** -0.5
    assert abs(float(everything.mean())) < 4 * error
    assert abs(float(everything.var()) - 1) < 4 * 2**0.5 * error


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 2, 32), (4, 2, 16), (2, 1, 48)])
def test_adam_mini_gives_each_head_of_query_and_key_one_second_moment(heads: int, kv_heads: int, head_dim: int) -> None:
    entry = installed("adam-mini")
    model = llama(num_key_value_heads=kv_heads, head_dim=head_dim)
    model.config.num_attention_heads = heads
    attention = model.model.layers[0].self_attn
    for linear, rows in ((attention.q_proj, heads * head_dim), (attention.k_proj, kv_heads * head_dim)):
        linear.weight = nn.Parameter(torch.randn(rows, 64))
    optimizer = make(entry, model)
    for linear, block in ((attention.q_proj, head_dim), (attention.k_proj, head_dim), (attention.v_proj, 0)):
        param, state, run = linear.weight, State(), Run(head_dim=block)
        W = param.detach().double()
        start = W
        for t, G in enumerate(gradients(tuple(param.shape), 4), start=1):
            param.grad = G.float()
            step(optimizer)
            W = formulas.adam_mini(W, G.float().double(), state, t, LR, run)
        assert_close(param - start, W - start, 1e-5)
        param.grad = None


def test_adam_mini_refuses_a_query_that_does_not_consist_of_heads() -> None:
    model = llama()
    model.model.layers[0].self_attn.q_proj.weight = nn.Parameter(torch.randn(65, 64))
    with pytest.raises(UserError, match=r"q_proj.* of shape \(65, 64\) does not consist of heads of 32 rows"):
        make(installed("adam-mini"), model)


@pytest.mark.parametrize(("shape", "momentum"), [((80, 20), (80, 3)), ((81, 20), (81, 20)), ((20, 80), (3, 80))])
def test_flora_compresses_up_to_an_aspect_ratio_of_four(shape: tuple[int, int], momentum: tuple[int, int]) -> None:
    model = Net(*shape)
    optimizer = make(installed("flora"), model)
    train(model, optimizer, 1)
    assert optimizer.state[model.mlp.weight]["exp_avg"].shape == momentum
    assert model.mlp.weight.grad is None


@pytest.mark.parametrize("name", ENTRIES)
def test_everything_else_moves_as_torch_adamw_moves_it(name: str) -> None:
    entry = installed(name)
    model, twin = Net(), Net()
    twin.load_state_dict(model.state_dict())
    optimizer = make(entry, model)
    biases = [twin.narrow_mlp.bias, twin.norm.weight, twin.norm.bias]
    groups: list[dict[str, Any]] = [
        {"params": [twin.embed.weight], "lr": DENSE_LR},
        {"params": biases, "lr": DENSE_LR, "weight_decay": 0.0},
    ]
    if entry.ranked:  # two rows are not above a rank of three
        groups.append({"params": [twin.narrow_mlp.weight]})
    reference = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    start = {name: param.detach().clone() for name, param in twin.named_parameters()}
    moved = {name for name, param in twin.named_parameters() if any(param is p for g in groups for p in g["params"])}
    for number in range(4):
        generator = torch.Generator().manual_seed(number)
        for name, param in twin.named_parameters():
            if name in moved:
                param.grad = torch.randn(param.shape, generator=generator)
                dict(model.named_parameters())[name].grad = param.grad.clone()
        step(optimizer)
        reference.step()
    assert len(moved) == 4 + entry.ranked
    for name in moved:
        assert not torch.equal(start[name], dict(twin.named_parameters())[name])
        assert_same_bits(dict(model.named_parameters())[name].detach(), dict(twin.named_parameters())[name].detach())
