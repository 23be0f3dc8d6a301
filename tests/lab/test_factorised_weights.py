"""Layers whose weight is made of smaller parts: maps, gradients, starts, state, and the plain model at the end."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _lab import TINY
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from _support import assert_close, assert_same_bits
from lorapre import param_groups
from lorapre.lab.baselines.factorised import FactorisedLinear, factorise, merge_factorised
from lorapre.lab.baselines.lora import LoRALinear
from lorapre.lab.baselines.loro import xavier_stds
from lorapre.lab.baselines.low_rank_weights import LowRankLinear
from lorapre.lab.baselines.sltrain import SLTrainLinear
from lorapre.lab.config import PretrainConfig
from lorapre.lab.errors import UserError
from lorapre.lab.optimizers.measure import state_bytes
from lorapre.lab.optimizers.weights import ENTRIES

ROWS = {entry.name: entry for entry in ENTRIES}
RANK, SHAPES = 5, [(24, 17), (17, 24), (20, 20)]
LAYERS: dict[str, Callable[[nn.Linear], FactorisedLinear]] = {
    "low-rank": lambda layer: LowRankLinear(layer, RANK, name="some.layer", seed=7),
    "lora": lambda layer: LoRALinear(layer, RANK, name="some.layer", seed=7, alpha=3.0),
    "sltrain": lambda layer: SLTrainLinear(layer, RANK, name="some.layer", seed=7, alpha=3.0, density=0.1),
}


def plain_layer(p: int, q: int, dtype: torch.dtype = torch.float64, bias: bool = True) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(q, p, bias=bias, dtype=dtype)


def trained(layer: FactorisedLinear) -> FactorisedLinear:
    """``layer`` away from its start, where one factor may be zero."""
    torch.manual_seed(2)
    with torch.no_grad():
        for param in layer.parameters():
            param.add_(torch.randn_like(param), alpha=0.3)
    return layer


def effective_weight(layer: FactorisedLinear) -> Tensor:
    """W as the papers write it, of ``layer``'s parameters: a dense matrix that autograd can go through."""
    if isinstance(layer, LowRankLinear):
        return layer.B @ layer.A
    if isinstance(layer, LoRALinear):
        return layer.weight + 3.0 / RANK * layer.lora_B @ layer.lora_A
    assert isinstance(layer, SLTrainLinear)
    p, q = layer.out_features, layer.in_features
    rows, columns = layer.support // q, layer.support % q
    sparse = torch.sparse_coo_tensor(torch.stack([rows, columns]), layer.values, (p, q), check_invariants=True)
    return 3.0 / RANK * layer.B @ layer.A + sparse.to_dense()


def small_llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**TINY, "attention_dropout": 0.0, **changes}))


def config(**changes: Any) -> PretrainConfig:
    return PretrainConfig(**{"rank": 8, "steps": 1000, "seed": 3, **changes})


def prepared(name: str, **changes: Any) -> Any:
    model = small_llama()
    prepare = ROWS[name].prepare
    assert prepare is not None
    prepare(model, config(**changes))
    return model


def optimizer_of(name: str, model: nn.Module, lr: float = 1e-2, dense_lr: float = 2e-3) -> torch.optim.Optimizer:
    cls, kwargs = ROWS[name].build(model, config(), lr, dense_lr)
    return cls(kwargs.pop("params"), **kwargs)


def backward(model: Any, seed: int = 0) -> None:
    tokens = torch.randint(0, 300, (4, 16), generator=torch.Generator().manual_seed(seed))
    model(input_ids=tokens, labels=tokens).loss.backward()


def factorised_layers(model: nn.Module) -> dict[str, FactorisedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FactorisedLinear)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_output_and_all_gradients_are_those_of_the_dense_effective_weight(kind: str, shape: tuple[int, int]) -> None:
    layer = trained(LAYERS[kind](plain_layer(*shape)))
    x = torch.randn(2, 6, shape[1], dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 6, shape[0], dtype=torch.float64)
    wanted = [x, *(param for param in layer.parameters() if param.requires_grad)]
    y = layer(x)
    assert layer.bias is not None
    reference = x @ effective_weight(layer).mT + layer.bias
    assert_close(y, reference, 1e-14)
    assert_close(layer.merged_weight(), effective_weight(layer), 1e-14)
    for actual, expected in zip(
        torch.autograd.grad(y, wanted, dy), torch.autograd.grad(reference, wanted, dy), strict=True
    ):
        assert_close(actual, expected, 1e-13)


def test_sltrain_gives_gradients_where_only_some_are_wanted_and_none_to_a_frozen_input() -> None:
    layer = trained(LAYERS["sltrain"](plain_layer(24, 17)))
    assert isinstance(layer, SLTrainLinear)
    layer.B.requires_grad_(False)
    layer.A.requires_grad_(False)
    x = torch.randn(6, 17, dtype=torch.float64)
    layer(x).square().sum().backward()
    expected = torch.autograd.grad((x @ effective_weight(layer).mT + layer.bias).square().sum(), layer.values)[0]
    assert layer.values.grad is not None
    assert_close(layer.values.grad, expected, 1e-13)
    assert layer.B.grad is None


@pytest.mark.parametrize("kind", LAYERS)
def test_no_dense_weight_is_kept_for_the_backward_pass(kind: str) -> None:
    p, q = 24, 17
    layer = trained(LAYERS[kind](plain_layer(p, q)))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(6, q, dtype=torch.float64, requires_grad=True))
    frozen = [param.data_ptr() for param in layer.parameters() if not param.requires_grad]
    assert kept
    assert not [tensor for tensor in kept if tensor.numel() == p * q and tensor.data_ptr() not in frozen]


@pytest.mark.parametrize("kind", LAYERS)
def test_under_autocast_a_layer_computes_in_bfloat16_and_its_gradients_are_float32(kind: str) -> None:
    layer = trained(LAYERS[kind](plain_layer(24, 17, torch.float32)))
    x = torch.randn(32, 17)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype is torch.bfloat16
    assert layer.bias is not None
    reference = x @ effective_weight(layer).mT + layer.bias
    assert 1e-4 < (y.float() - reference).norm() / reference.norm() < 2e-2  # rounded, and by no more than bfloat16 does
    y.float().square().sum().backward()
    gradients = [param.grad for param in layer.parameters() if param.requires_grad]
    params = [param for param in layer.parameters() if param.requires_grad]
    expected = torch.autograd.grad(reference.square().sum(), params)
    for actual, exact in zip(gradients, expected, strict=True):
        assert actual is not None
        assert actual.dtype is torch.float32
        assert_close(actual, exact, 3e-2)


@pytest.mark.parametrize("name", ["lora", "relora"])
def test_a_lora_model_begins_with_the_outputs_of_the_model_it_replaces(name: str) -> None:
    tokens = torch.arange(40).reshape(2, 20)
    assert_same_bits(prepared(name)(tokens).logits, small_llama()(tokens).logits)


def test_lora_starts_with_a_zero_product_and_kaiming_uniform_A() -> None:
    layer = LoRALinear(plain_layer(400, 300), 64, name="x", seed=0)
    assert layer.scaling == 32 / 64
    assert not layer.lora_B.any()
    bound = 300**-0.5
    assert layer.lora_A.abs().max() <= bound
    assert_close(layer.lora_A.var(), torch.tensor(bound**2 / 3), 0.03)
    assert not layer.weight.requires_grad


def test_low_rank_weights_start_with_the_variance_of_what_they_replace() -> None:
    layer = plain_layer(400, 300)
    with torch.no_grad():
        layer.weight.normal_(std=0.02)
    new = LowRankLinear(layer, 64, name="x", seed=0)
    assert_close(new.merged_weight().var(), torch.tensor(0.02**2), 0.03)
    assert_close(new.B.var(), new.A.var(), 0.03)


def test_loro_starts_xavier_normal() -> None:
    layer = LowRankLinear(plain_layer(400, 300), 64, name="x", seed=0, stds=xavier_stds(400, 300, 64))
    assert_close(layer.B.var(), torch.tensor(2 / 464), 0.03)
    assert_close(layer.A.var(), torch.tensor(2 / 364), 0.03)


@pytest.mark.parametrize("density", [0.03, 0.2])
def test_sltrains_support_has_the_density_without_repetition_and_covers_the_matrix(density: float) -> None:
    p, q = 60, 50
    layer = SLTrainLinear(plain_layer(p, q), 4, name="x", seed=0, density=density)
    support = layer.support.tolist()
    assert len(support) == len(set(support)) == layer.values.numel() == int(density * p * q)
    assert support == sorted(support)
    assert support[0] >= 0
    assert support[-1] < p * q
    halves = sum(place < p * q / 2 for place in support) / len(support)
    assert abs(halves - 0.5) < 5 * 0.5 / math.sqrt(len(support))
    assert layer.values.abs().max() <= q**-0.5
    assert_close(layer.values.var(), torch.tensor(1 / (3 * q)), 0.3)


def test_sltrains_support_stays_while_its_values_train_and_is_in_the_checkpoint() -> None:
    model = prepared("sltrain")
    before = {name: (layer.support.clone(), layer.values.clone()) for name, layer in factorised_layers(model).items()}
    optimizer = optimizer_of("sltrain", model)
    for step in range(3):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    state = model.state_dict()
    for name, (support, values) in before.items():
        assert_same_bits(state[f"{name}.support"], support)
        # Not all of them: at this width S begins with empty rows, behind which gradients are zero.
        assert (state[f"{name}.values"] != values).float().mean() > 0.5


@pytest.mark.parametrize("name", ROWS)
def test_every_process_builds_the_same_factors_from_a_seed_and_other_seeds_give_others(name: str) -> None:
    first, again, other = prepared(name), prepared(name), prepared(name, seed=4)
    torch.manual_seed(99)  # the global generator has no say
    assert_same_bits(prepared(name).state_dict(), first.state_dict())
    assert_same_bits(again.state_dict(), first.state_dict())
    for layer, mine in factorised_layers(first).items():
        changed = [
            not torch.equal(a, b)
            for (_, a), (_, b) in zip(mine.factors(), factorised_layers(other)[layer].factors(), strict=True)
            if a.any()
        ]
        assert changed
        assert all(changed)


@pytest.mark.parametrize("name", ROWS)
def test_layers_of_one_shape_do_not_share_their_draws(name: str) -> None:
    state = prepared(name).state_dict()
    places = [f"model.layers.{index}.self_attn.{part}_proj" for index in (0, 1) for part in "qk"]
    drawn = {label.rsplit(".")[-1] for label, tensor in state.items() if label.startswith(places[0]) and tensor.any()}
    assert drawn
    for label in drawn:
        for one, other in itertools.combinations([state[f"{place}.{label}"] for place in places], 2):
            assert not torch.equal(one, other)


@pytest.mark.parametrize("name", ROWS)
def test_preparing_leaves_the_global_generator_alone(name: str) -> None:
    model = small_llama()
    before = torch.get_rng_state()
    prepare = ROWS[name].prepare
    assert prepare is not None
    prepare(model, config())
    merge_factorised(model)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ROWS)
def test_trainable_numbers_are_those_of_the_factors_and_of_everything_outside(name: str) -> None:
    attention, mlp = 4 * [(32, 32)], [(64, 32), (64, 32), (32, 64)]
    outside = 2 * 300 * 32 + 5 * 32  # embedding and head, norms
    inside = 2 * sum((p + q) * 8 + (int(0.03 * p * q) if name == "sltrain" else 0) for p, q in attention + mlp)
    model = prepared(name)
    assert sum(param.numel() for param in model.parameters() if param.requires_grad) == inside + outside
    frozen = sum(param.numel() for param in model.parameters() if not param.requires_grad)
    assert frozen == (2 * (4 * 32 * 32 + 3 * 64 * 32) if name in ("lora", "relora") else 0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_state_of_one_layer_has_the_bytes_of_the_formula(name: str, shape: tuple[int, int]) -> None:
    p, q = shape
    model = nn.Sequential(plain_layer(p, q, torch.float32, bias=False), nn.Linear(p, 3))
    prepare = ROWS[name].prepare
    assert prepare is not None
    prepare(model, config(rank=RANK))  # above the second layer's smaller side
    assert isinstance(model[0], FactorisedLinear)
    assert isinstance(model[1], nn.Linear)
    optimizer = optimizer_of(name, model)
    model(torch.randn(2, q)).square().sum().backward()
    optimizer.step()
    assert state_bytes(optimizer, model[0].parameters()) == ROWS[name].state_bytes(p, q, RANK)


@pytest.mark.parametrize("name", ROWS)
def test_state_of_a_small_llama_has_the_bytes_of_the_formula(name: str) -> None:
    model = prepared(name)
    optimizer = optimizer_of(name, model)
    backward(model)
    optimizer.step()
    inside = [param for layer in factorised_layers(model).values() for param in layer.parameters()]
    shapes = 2 * (4 * [(32, 32)] + [(64, 32), (64, 32), (32, 64)])
    assert state_bytes(optimizer, inside) == sum(ROWS[name].state_bytes(p, q, 8) for p, q in shapes)


@pytest.mark.parametrize("name", ROWS)
def test_factors_and_whole_layers_take_lr_and_everything_else_dense_lr(name: str) -> None:
    model = small_llama(num_key_value_heads=1)  # its keys and values are 16 x 32
    prepare = ROWS[name].prepare
    assert prepare is not None
    prepare(model, config(rank=16))
    rates: dict[int, float] = {}
    for group in optimizer_of(name, model, lr=1e-2, dense_lr=2e-3).param_groups:
        rates |= dict.fromkeys(map(id, group["params"]), group["lr"])
    for label, param in model.named_parameters():
        matrix = any(part in label for part in ("self_attn", "mlp"))
        expected = (1e-2 if matrix else 2e-3) if param.requires_grad else None
        assert rates.get(id(param)) == expected, label
    kept = {label.split(".")[-1] for label, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert kept == {"k_proj", "v_proj", "lm_head"}


@pytest.mark.parametrize("name", ROWS)
def test_a_merged_model_gives_the_same_logits_saved_and_loaded_as_a_plain_one(name: str, tmp_path: Path) -> None:
    model = prepared(name)
    optimizer = optimizer_of(name, model)
    for step in range(3):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    tokens = torch.arange(60).reshape(3, 20)
    before = model.eval()(tokens).logits
    merged = merge_factorised(model)
    assert merged is model
    assert not factorised_layers(merged)
    assert set(merged.state_dict()) == set(small_llama().state_dict())
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_close(loaded(tokens).logits, before, 1e-5)
    assert_same_bits(loaded.state_dict(), merged.state_dict())


@pytest.mark.parametrize("name", ROWS)
def test_no_two_tensors_of_a_checkpoint_share_memory(name: str) -> None:
    state = prepared(name).state_dict()
    assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == len(state)


def test_merging_keeps_the_trained_bias() -> None:
    layer = trained(LAYERS["low-rank"](plain_layer(24, 17)))
    merged = merge_factorised(nn.Sequential(layer))[0]
    assert isinstance(merged, nn.Linear)
    assert merged.bias is layer.bias
    assert merged.weight.requires_grad


def test_the_head_and_layers_not_above_the_rank_stay() -> None:
    model = small_llama()
    wanted = {label for group in param_groups(model, rank=8) if "compress" not in group for label, _ in group["params"]}
    factorise(model, 8, lambda name, layer, rank: LowRankLinear(layer, rank, name=name, seed=0))
    assert {f"{label}.weight" for label in factorised_layers(model)} == wanted
    assert isinstance(model.lm_head, nn.Linear)


def test_a_fraction_is_resolved_for_each_layer() -> None:
    model = nn.Sequential(nn.Linear(16, 40), nn.Linear(40, 24))
    factorise(model, 0.25, lambda name, layer, rank: LowRankLinear(layer, rank, name=name, seed=0))
    assert [tuple(layer.A.shape) for layer in model] == [(4, 16), (6, 40)]  # type: ignore[union-attr]


def test_nothing_to_factorise_is_an_error() -> None:
    with pytest.raises(UserError, match=r"--rank 32: .* no weight can be factorised"):
        prepared("low-rank", rank=32)


@pytest.mark.parametrize("share", ["the module", "the weight"])
def test_a_shared_weight_is_an_error_and_not_silently_parted(share: str) -> None:
    model = nn.ModuleDict({"first": nn.Sequential(nn.Linear(16, 16)), "second": nn.Sequential(nn.Linear(16, 16))})
    if share == "the module":
        model["second"][0] = model["first"][0]  # type: ignore[index,operator]
    else:
        model["second"][0].weight = model["first"][0].weight  # type: ignore[index]
    with pytest.raises(UserError, match=r"first\.0 and second\.0 share one weight"):
        factorise(model, 4, lambda name, layer, rank: LowRankLinear(layer, rank, name=name, seed=0))
