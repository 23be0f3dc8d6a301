"""Models: presets against counts by hand, files, checkpoints, and how they fit tokenizer and sequence."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from _lab import TINY, Cli, losses, options, write_model
from rich.console import Console
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lorapre.lab.config import build_config
from lorapre.lab.errors import UserError
from lorapre.lab.models import LLAMAS, resolve_model
from lorapre.lab.preparation import load_planned_corpus, plan_run

# GaLore's configurations: hidden, MLP, layers, heads, and the size in millions that follows.
PUBLISHED = {
    "llama-60m": (512, 1376, 8, 8, 58.07),
    "llama-130m": (768, 2048, 12, 12, 134.11),
    "llama-350m": (1024, 2736, 24, 16, 367.97),
    "llama-1b": (2048, 5461, 24, 32, 1339.08),
    "llama-7b": (4096, 11008, 32, 32, 6738.42),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_size_has_as_many_parameters_as_its_shapes_say(name: str) -> None:
    hidden, mlp, layers, heads, millions = PUBLISHED[name]
    model = resolve_model(name).build(0, device="meta")
    attention, gated_mlp, norms = 4 * hidden * hidden, 3 * hidden * mlp, 2 * hidden
    expected = 2 * 32_000 * hidden + layers * (attention + gated_mlp + norms) + hidden
    assert sum(param.numel() for param in model.parameters()) == expected
    assert round(expected / 1e6, 2) == millions
    assert model.config.num_attention_heads == model.config.num_key_value_heads == heads


@pytest.mark.parametrize(("name", "low", "high"), [("llama-1m", 0.8e6, 1.2e6), ("llama-3m", 2.5e6, 3.5e6)])
def test_the_smallest_presets_have_their_size_with_their_own_vocabulary(name: str, low: float, high: float) -> None:
    spec = resolve_model(name)
    size = int(spec.default_tokenizer.removeprefix("bpe:"))
    model = spec.with_vocabulary(size, size - 1).build(0, device="meta")
    assert low < sum(param.numel() for param in model.parameters()) < high
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("name", sorted(set(LLAMAS) - {"llama-1m", "llama-3m"}))
def test_every_other_preset_is_named_after_its_size_at_the_published_vocabulary(name: str) -> None:
    count = sum(param.numel() for param in resolve_model(name).build(0, device="meta").parameters())
    text = name.removeprefix("llama-")
    claimed = float(text[:-1]) * {"m": 1e6, "b": 1e9}[text[-1]]
    assert claimed * 0.9 < count < claimed * 1.4


def test_the_same_seed_gives_the_same_weights_and_another_one_others(tmp_path: Path) -> None:
    spec = resolve_model(str(write_model(tmp_path / "tiny.json")))
    first, again, other = (list(spec.build(seed).parameters()) for seed in (4, 4, 5))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert {param.dtype for param in first} == {torch.float32}


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (TINY, 2 * 300 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 64) + 32),
        ({**TINY, "dtype": "bfloat16"}, 2 * 300 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 64) + 32),
        # wte, wpe, then a block's two norms, attention 3 + 1 and MLP 4 + 4, with biases, and the last norm
        (
            {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 300, "n_positions": 64},
            364 * 32 + (4 * 32 + 12 * 32 * 32 + (3 + 1 + 4 + 1) * 32) + 2 * 32,
        ),
    ],
    ids=["llama", "llama in bfloat16", "gpt2"],
)
def test_a_config_json_gives_that_model_in_float32(tmp_path: Path, config: dict[str, Any], count: int) -> None:
    (tmp_path / "c.json").write_text(json.dumps(config))
    spec = resolve_model(str(tmp_path / "c.json"))
    assert spec.checkpoint is None
    model = spec.build(0)
    assert sum(param.numel() for param in model.parameters()) == count
    assert {param.dtype for param in model.parameters()} == {torch.float32}


def test_training_goes_on_from_the_weights_of_a_checkpoint(pretrain: Cli, tiny: list[str], here: Path) -> None:
    assert pretrain(*tiny, "--out", "first").code == 0
    saved = load_file(here / "first" / "model" / "model.safetensors")
    started: list[list[bytes]] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not started:
            params = [param for group in optimizer.param_groups for param in group["params"]]
            started.append([param.detach().numpy().tobytes() for param in params])

    handle = register_optimizer_step_pre_hook(look)
    try:
        # The tokenizer is the checkpoint's own; the seed is another one, and must not matter.
        more = options(data="text.txt", batch_size=8, sequence_length=16, steps=4, log_every=1, seed=9, warmup=0)
        assert pretrain(*more, "--model", "first/model", "--out", "second").code == 0
    finally:
        handle.remove()
    assert Counter(started[0]) == Counter(value.numpy().tobytes() for value in saved.values())
    assert losses(here / "second")[0] < losses(here / "first")[0] - 0.1
    names = ("tokenizer.json", "tokenizer_config.json")
    first, second = (json.loads((here / run / "model" / names[0]).read_text()) for run in ("first", "second"))
    assert first["model"]["vocab"] == second["model"]["vocab"]


@pytest.mark.parametrize(
    ("tokenizer_size", "max_token_id", "expected"),
    [
        (4096, 4095, 4096),
        (4096, 17, 4096),  # ids that do not occur in the data may be asked for later
        (32_000, 31_999, 32_000),
        (32_100, 31_999, 32_000),  # T5: the hundred beyond are sentinels that no text holds
        (32_100, 32_000, 32_100),
        (32_100, 32_099, 32_100),
        (50_257, 50_256, 50_257),
        (31_999, 31_998, 31_999),
    ],
)
def test_a_preset_takes_the_tokenizers_vocabulary_or_the_published_one(
    tokenizer_size: int, max_token_id: int, expected: int
) -> None:
    assert resolve_model("llama-60m").with_vocabulary(tokenizer_size, max_token_id).config.vocab_size == expected


def test_a_preset_ends_its_texts_as_its_tokenizer_does(tmp_path: Path) -> None:
    spec = resolve_model("llama-1m").with_vocabulary(300, 299, 299)
    spec.build(0).save_pretrained(tmp_path)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / name).read_text())["eos_token_id"] == 299
    assert resolve_model(str(write_model(tmp_path / "tiny.json"))).with_vocabulary(300, 299, 5).config.eos_token_id == 0


def test_a_run_fits_a_preset_to_the_ids_and_the_end_of_its_tokenizer(here: Path) -> None:
    words = {"[unk]": 0, "the": 1, "<|endoftext|>": 70}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[unk]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.save("words.json")
    given = {"model": "llama-1m", "data": ["text.txt"], "tokenizer": "words.json", "sequence_length": 16}
    plan = plan_run(build_config(given))
    corpus = load_planned_corpus(plan, Console(quiet=True))
    assert (plan.model.config.vocab_size, plan.model.config.eos_token_id) == (71, 70)
    assert 0 < corpus.bigram_cross_entropy() < 1


def test_what_a_checkpoint_lacks_follows_from_the_seed(tmp_path: Path) -> None:
    model = resolve_model(str(write_model(tmp_path / "tiny.json"))).build(1)
    weights = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(tmp_path / "checkpoint", state_dict=weights)
    heads = [resolve_model(str(tmp_path / "checkpoint")).build(seed).lm_head.weight for seed in (4, 4, 5)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_the_shapes_of_a_model_that_is_saved_in_bfloat16_are_float32_too(tmp_path: Path) -> None:
    model = resolve_model(str(write_model(tmp_path / "tiny.json", dtype="bfloat16"))).build(0, device="meta")
    assert {param.dtype for param in model.parameters()} == {torch.float32}


def test_a_config_json_keeps_its_vocabulary_and_refuses_ids_beyond_it(tmp_path: Path) -> None:
    spec = resolve_model(str(write_model(tmp_path / "tiny.json")))
    assert spec.with_vocabulary(280, 279).config.vocab_size == 300
    assert spec.with_vocabulary(310, 299).config.vocab_size == 300
    with pytest.raises(UserError, match=r"300 entries.* id 300"):
        spec.with_vocabulary(310, 300)


def test_a_preset_takes_longer_sequences_and_a_file_refuses_them(tmp_path: Path) -> None:
    assert resolve_model("llama-3m").with_sequence(5000).config.max_position_embeddings == 5000
    assert resolve_model("llama-3m").with_sequence(16).config.max_position_embeddings >= 1024
    spec = resolve_model(str(write_model(tmp_path / "tiny.json")))
    assert spec.with_sequence(64).config.max_position_embeddings == 64
    with pytest.raises(UserError, match=r"--sequence-length 65.* 64 positions"):
        spec.with_sequence(65)
    (tmp_path / "g.json").write_text(json.dumps({"model_type": "gpt2", "n_positions": 48, "vocab_size": 300}))
    with pytest.raises(UserError, match=r"49.* 48 positions"):
        resolve_model(str(tmp_path / "g.json")).with_sequence(49)
