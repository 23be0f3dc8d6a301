"""Which parameters are compressed, which are dense, which decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorapre import LoRAPreAdamW, param_groups
from lorapre.routing import check_rank, matrix_view, resolve_rank


def sorting(groups: list[dict[str, Any]]) -> dict[str, str]:
    """Parameter name -> compressed | flattened | dense | vector (dense without decay)."""
    kinds = {}
    for group in groups:
        if group.get("compress", True):
            kind = "flattened" if group.get("view_3d") == "flatten" else "compressed"
        else:
            kind = "vector" if group.get("weight_decay") == 0.0 else "dense"
        for name, _ in group["params"]:
            assert name not in kinds, "a parameter is in one group only"
            kinds[name] = kind
    return kinds


class LanguageModel(nn.Module):
    """Plain torch; the head is the last Linear, as wide as the vocabulary."""

    def __init__(self, vocabulary: int = 100, width: int = 32, positions: int = 48, tied: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.position_embeddings = nn.Embedding(positions, width)
        self.up = nn.Linear(width, positions)  # a hidden layer as wide as there are positions
        self.down = nn.Linear(positions, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=not tied)
        if tied:
            self.head.weight = self.tokens.weight


@pytest.mark.parametrize("tied", [False, True])
def test_a_plain_language_model_is_sorted_by_module_type(tied: bool) -> None:
    expected = {
        "tokens.weight": "dense",
        "position_embeddings.weight": "dense",
        "up.weight": "compressed",
        "up.bias": "vector",
        "down.weight": "compressed",
        "down.bias": "vector",
        "norm.weight": "vector",
        "norm.bias": "vector",
    }
    if not tied:
        expected |= {"head.weight": "dense", "head.bias": "vector"}
    assert sorting(param_groups(LanguageModel(tied=tied))) == expected


class Encoder(nn.Module):
    """No head: the last Linear is a hidden layer, and happens to be as wide as there are positions."""

    def __init__(self, position_name: str) -> None:
        super().__init__()
        self.tokens = nn.Embedding(100, 48)
        self.add_module(position_name, nn.Embedding(48, 48))
        self.up = nn.Linear(48, 96)
        self.down = nn.Linear(96, 48)


@pytest.mark.parametrize("name", ["position_embeddings", "embed_positions", "pos_emb", "wpe", "pos"])
def test_a_hidden_layer_as_wide_as_there_are_positions_is_no_head(name: str) -> None:
    kinds = sorting(param_groups(Encoder(name)))
    assert kinds[f"{name}.weight"] == kinds["tokens.weight"] == "dense"
    assert kinds["up.weight"] == kinds["down.weight"] == "compressed"


def test_an_embedding_whose_name_merely_contains_pos_still_has_a_head() -> None:
    model = nn.Sequential()
    model.add_module("decomposer", nn.Embedding(100, 32))
    model.add_module("head", nn.Linear(32, 100))
    assert set(sorting(param_groups(model)).values()) == {"dense", "vector"}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_transformers_model_names_its_own_head(tied: bool, wrapped: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,  # as wide as the vocabulary
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM(config)
    trained = torch.nn.parallel.DataParallel(model) if wrapped else model
    kinds = {name.removeprefix("module."): kind for name, kind in sorting(param_groups(trained)).items()}
    dense = {name for name, kind in kinds.items() if kind == "dense"}
    assert dense == {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    compressed = {name for name, kind in kinds.items() if kind == "compressed"}
    assert compressed == {name for name in kinds if "_proj." in name}
    assert len(compressed) == 2 * 7
    assert all("norm" in name for name, kind in kinds.items() if kind == "vector")
    backbone = sorting(param_groups(model.model))  # without a head, nothing but the embedding is dense
    assert [name for name, kind in backbone.items() if kind == "dense"] == ["embed_tokens.weight"]


def test_convolutions_are_flattened_and_stacks_are_not() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv1d(16, 24, 3)
            self.transposed = nn.ConvTranspose1d(16, 24, 3)
            self.conv2 = nn.Conv2d(8, 24, 3)
            self.experts = nn.Parameter(torch.zeros(4, 16, 24))
            self.matrix = nn.Parameter(torch.zeros(16, 24))
            self.bag = nn.EmbeddingBag(30, 16)

    model = Mixed()
    groups = param_groups(model, rank=4)
    assert sorting(groups) == {
        "conv1.weight": "flattened",
        "transposed.weight": "flattened",
        "conv2.weight": "compressed",
        "experts": "compressed",
        "matrix": "compressed",
        "bag.weight": "dense",
        "conv1.bias": "vector",
        "transposed.bias": "vector",
        "conv2.bias": "vector",
    }
    optimizer = LoRAPreAdamW(groups, second_moment="hadamard")
    shapes = {
        "conv1.weight": ((24, 4), (4, 48)),
        "transposed.weight": ((16, 4), (4, 72)),
        "conv2.weight": ((24, 4), (4, 72)),
        "experts": ((4, 16, 4), (4, 4, 24)),
        "matrix": ((16, 4), (4, 24)),
    }
    for name, param in model.named_parameters():
        state = optimizer.state[param]
        if name in shapes:
            assert (state["m_B"].shape, state["m_A"].shape) == shapes[name], name
            assert (state["v_B"].shape, state["v_A"].shape) == shapes[name], name
        else:
            assert set(state) == {"step", "exp_avg", "exp_avg_sq"}, name


def test_options_reach_the_groups_they_are_for() -> None:
    groups = param_groups(
        LanguageModel(), 0.5, scale=0.25, second_moment="full", dense={"lr": 2.5e-3, "weight_decay": 0.1}
    )
    by_kind = {sorting([group]).popitem()[1]: group for group in groups}
    assert set(by_kind) == {"compressed", "dense", "vector"}
    assert {key: by_kind["compressed"][key] for key in by_kind["compressed"] if key != "params"} == {
        "rank": 0.5,
        "scale": 0.25,
        "second_moment": "full",
    }
    assert {key: by_kind["dense"][key] for key in by_kind["dense"] if key != "params"} == {
        "compress": False,
        "lr": 2.5e-3,
        "weight_decay": 0.1,
    }
    assert by_kind["vector"]["lr"] == 2.5e-3
    assert by_kind["vector"]["weight_decay"] == 0.0
    decaying = param_groups(LanguageModel(), decay_vectors=True, dense={"weight_decay": 0.1})
    assert all(group.get("weight_decay", 0.1) == 0.1 for group in decaying)
    assert "rank" not in param_groups(LanguageModel())[0], "the optimizer's own rank then holds"
    LoRAPreAdamW(groups, lr=1e-3)


def test_decay_reaches_matrices_and_embeddings_but_no_norm_or_bias() -> None:
    model = LanguageModel()
    optimizer = LoRAPreAdamW(param_groups(model), lr=0.1, weight_decay=0.5)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for name, param in model.named_parameters():
        expected = before[name] * (0.95 if param.ndim >= 2 else 1.0)
        torch.testing.assert_close(param.detach(), expected, rtol=1e-6, atol=0, msg=name)


def test_excluded_patterns_stay_dense() -> None:
    kinds = sorting(param_groups(LanguageModel(), exclude=["d*.weight", "norm.*"]))
    assert kinds["down.weight"] == "dense"
    assert kinds["up.weight"] == "compressed"
    assert kinds["norm.weight"] == "vector"
    with pytest.raises(ValueError, match=r"exclude='\*router\*' matches no trainable parameter.*'tokens.weight'"):
        param_groups(LanguageModel(), exclude=["up*", "*router*"])


def test_frozen_parameters_are_left_out() -> None:
    model = LanguageModel()
    model.tokens.requires_grad_(False)
    model.up.requires_grad_(False)
    kinds = sorting(param_groups(model))
    assert not any(name.startswith(("tokens", "up")) for name in kinds)
    with pytest.raises(ValueError, match="matches no trainable parameter"):
        param_groups(model, exclude=["up.weight"])
    with pytest.raises(ValueError, match="no trainable parameter"):
        param_groups(model.requires_grad_(False))


def test_tied_parameters_appear_once_and_are_dense_if_any_of_their_modules_is() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projection = nn.Linear(32, 64, bias=False)
            self.embed = nn.Embedding(64, 32)
            self.embed.weight = self.projection.weight
            self.one = nn.Linear(32, 32, bias=False)
            self.two = nn.Linear(32, 32, bias=False)
            self.two.weight = self.one.weight

    assert sorting(param_groups(Tied())) == {"projection.weight": "dense", "one.weight": "compressed"}


def test_a_model_without_embeddings_has_no_guessed_head() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
    assert sorting(param_groups(model)) == {
        "0.weight": "compressed",
        "1.weight": "compressed",
        "0.bias": "vector",
        "1.bias": "vector",
    }


@pytest.mark.parametrize(
    ("shape", "rank", "view_3d", "expected"),
    [
        ((10, 20), 4, "stack", (1, 10, 20, 4, False)),
        ((10, 20), 9, "stack", (1, 10, 20, 9, False)),
        ((10, 20), 10, "stack", None),  # r = min(p, q) saves nothing
        ((10, 20), 64, "stack", None),
        ((10, 20), 0.25, "stack", (1, 10, 20, 2, False)),
        ((2, 20), 0.25, "stack", (1, 2, 20, 1, False)),  # at least one
        ((1, 20), 0.25, "stack", None),
        ((3, 10, 20), 4, "stack", (3, 10, 20, 4, True)),
        ((3, 10, 20), 2, "flatten", (1, 3, 200, 2, False)),
        ((3, 10, 20), 4, "flatten", None),
        ((8, 4, 3, 3), 4, "stack", (1, 8, 36, 4, False)),
        ((8, 4, 3, 3, 3), 4, "flatten", (1, 8, 108, 4, False)),
        ((20,), 1, "stack", None),
        ((), 1, "stack", None),
        ((0, 20), 1, "stack", None),
        ((0, 10, 20), 1, "stack", None),
    ],
    ids=str,
)
def test_shapes_decide_what_is_compressed_and_how(shape: Any, rank: Any, view_3d: Any, expected: Any) -> None:
    view = matrix_view(shape, rank, view_3d)
    assert (view and (view.batch, view.p, view.q, view.rank, view.stacked)) == expected
    if view is not None:
        assert view.factor_numel == view.batch * (view.p + view.q) * view.rank
        assert torch.Size(view.left_shape).numel() + torch.Size(view.right_shape).numel() == view.factor_numel


def test_ranks_resolve_to_integers_within_the_smaller_side() -> None:
    assert [resolve_rank(rank, 64, 100) for rank in (8, 0.5, 0.001, 0.999)] == [8, 32, 1, 63]
    for rank in (1, 128, 0.5):
        check_rank(rank)
