"""Runs of the command: what they leave opens elsewhere, resumes to the bit, merges, and says what it did."""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.rich_utils
from _finetune import finetune, pairs, write_lines
from _lab import cut_before_step, exit_code, optimizer_steps, options, records, summary, timeless, tree
from peft import AutoPeftModelForCausalLM, PeftModel
from rich.cells import cell_len
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorapre import LoRAPreAdamW
from lorapre.lab.config import option_name
from lorapre.lab.finetune.config import FinetuneConfig
from lorapre.lab.finetune.methods import LORAPLUS_RATIO, METHODS, PRETRAINED_LR
from lorapre.lab.finetune.presets import PRESETS
from lorapre.lab.finetune.tiny import additions, tiny_model, tiny_tokenizer
from lorapre.lab.optimizers import OPTIMIZERS

#: Two passes and a part over 24 examples in batches of 8.
SHORT: dict[str, Any] = {
    "data": "own.jsonl", "valid_examples": 4, "max_examples": 20, "batch_size": 8, "steps": 7, "log_every": 1,
    "save_every": 2, "max_length": 64,
}  # fmt: skip
ADAPTED = {"method": "lorapre-adamw", "adapter": "lora", "adapter_rank": 8, "rank": 2, "lr": 0.01}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "packed": {"packing": True, "accumulation": 2},
    "lora": {"method": "lora", "dropout": 0.1, "lr": 0.01},
    "lora+": {"method": "lora+", "lr": 0.01},
    "dora": {"method": "dora", "lr": 0.01},
    "lorapre on lora": ADAPTED,
    "galore": {"method": "galore-ours", "rank": 4},
}


@pytest.fixture
def own(here: Path) -> Path:
    write_lines(here / "own.jsonl", pairs())
    return here


def logits(model: Any, tokenizer: Any, prompt: str = "say xx2") -> torch.Tensor:
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    with torch.no_grad():
        found: torch.Tensor = model.eval()(ids).logits
    return found


def weights(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in sorted(folder.glob("*/*.safetensors"))}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_interrupted_ends_in_the_same_bits(
    own: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    given = options(**{**SHORT, **KINDS[kind]})
    assert finetune(capsys, *given, "--out", "alone").code == 0
    with cut_before_step(6, run="cut"):
        outcome = finetune(capsys, *given, "--out", "cut")
    assert outcome.code == 130
    assert "lorapre finetune --resume --out cut" in " ".join(outcome.out.split())
    assert not (own / "cut" / "summary.json").exists()
    assert finetune(capsys, "--resume", "--out", "cut").code == 0
    assert weights(own / "cut") == weights(own / "alone")
    assert set(weights(own / "alone")) >= {"base", "adapter" if "lora" in kind or kind == "dora" else "model"}
    ignored = {"sequences_per_second", "examples_per_second"}

    def plain(content: Any) -> Any:
        dropped = timeless(content)
        if isinstance(dropped, list):
            return [{key: value for key, value in one.items() if key not in ignored} for one in dropped]
        return {key: value for key, value in dropped.items() if key not in ignored}

    assert plain(records(own / "cut")) == plain(records(own / "alone"))
    assert plain(summary(own / "cut")) == plain(summary(own / "alone"))
    changed = weights(own / "alone")
    assert changed["base"] != changed.get("model", changed.get("adapter"))


def test_a_resumed_run_refuses_other_options_and_other_data(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with cut_before_step(6):
        assert finetune(capsys, *options(**SHORT), "--out", "run").code == 130
    refused = finetune(capsys, "--resume", "--out", "run", "--lr", "0.5")
    assert refused.code == 2
    assert "--lr 0.5: the run in run began with None" in refused.message
    write_lines(own / "own.jsonl", [{**pair, "response": "changed"} for pair in pairs()])
    before = tree(own)
    refused = finetune(capsys, "--resume", "--out", "run")
    assert refused.code == 2
    assert "the data is not what the run began with" in refused.message
    assert tree(own) == before
    assert "there is no run to resume" in finetune(capsys, "--resume", "--out", "none").message


def test_a_fully_trained_folder_opens_in_transformers_and_gives_the_loss_that_was_reported(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(capsys, *options(**SHORT, valid_data="own.jsonl"), "--out", "run").code == 0
    model = AutoModelForCausalLM.from_pretrained(own / "run" / "model").double().eval()
    tokenizer = AutoTokenizer.from_pretrained(own / "run" / "model")
    # The reported loss is the mean over the learned tokens of four of the forty; which ones, the run knows.
    total, count = [], []
    for pair in pairs():
        prompt = tokenizer(f"<|user|>{pair['prompt']}<|end|><|assistant|>")["input_ids"]
        answer = tokenizer(f"{pair['response']}<|end|>")["input_ids"]
        with torch.no_grad():
            scores = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total.append(-scores[torch.arange(len(answer)), torch.tensor(answer)].sum().item())
        count.append(len(answer))
    from lorapre.lab.finetune.data import load_examples

    held = load_examples(FinetuneConfig(**{**SHORT, "valid_data": ["own.jsonl"]})).valid
    places = [int(example.where.rpartition(" ")[2]) - 1 for example in held]
    assert len(places) == 4
    expected = sum(total[place] for place in places) / sum(count[place] for place in places)
    assert summary(own / "run")["valid_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_an_adapter_folder_opens_in_peft_from_anywhere_and_merges_to_the_same_logits(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    assert finetune(capsys, *options(**SHORT, method=kind, lr=0.02), "--merge", "--out", "run").code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    adapted = AutoPeftModelForCausalLM.from_pretrained(own / "run" / "adapter")
    assert isinstance(adapted, PeftModel)
    tokenizer = AutoTokenizer.from_pretrained(own / "run" / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(own / "run" / "merged")
    base = AutoModelForCausalLM.from_pretrained(own / "run" / "base")
    with_adapter = logits(adapted, tokenizer)
    torch.testing.assert_close(logits(merged, tokenizer), with_adapter, rtol=1e-4, atol=1e-5)
    assert (logits(base, tokenizer) - with_adapter).abs().max() > 1e-2
    settings = adapted.peft_config["default"]
    assert (settings.r, settings.lora_alpha) == (8, 16)
    assert (settings.use_rslora, settings.use_dora) == (kind == "rslora", kind == "dora")


def test_a_finished_adapter_is_merged_on_demand_once(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune(capsys, *options(**SHORT, method="lora"), "--out", "run").code == 0
    before = tree(own / "run")
    assert finetune(capsys, "--merge", "--out", "run").code == 0
    after = tree(own / "run")
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in set(after) - set(before)} == {"merged"}
    again = finetune(capsys, "--merge", "--out", "run")
    assert again.code == 2
    assert "exists already" in again.message
    shutil.rmtree(own / "run" / "merged")
    shutil.rmtree(own / "run" / "base")
    lost = finetune(capsys, "--merge", "--out", "run")
    assert lost.code == 2
    assert "base model" in lost.message
    assert not (own / "run" / "merged").exists()


def test_merging_weights_that_have_no_adapter_is_refused_before_training(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(own)
    outcome = finetune(capsys, *options(**SHORT), "--merge", "--out", "run")
    assert outcome.code == 2
    assert "there is nothing to merge" in outcome.message
    assert tree(own) == before


def test_lora_pre_on_an_adapter_moves_the_adapter_alone_and_compresses_it(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with optimizer_steps() as taken:
        assert finetune(capsys, *options(**SHORT, **ADAPTED), "--out", "run").code == 0
    kinds = {type(one) for one in taken if not type(one).__name__.startswith("Accelerated")}
    assert kinds == {LoRAPreAdamW}
    facts = summary(own / "run")
    # 2 layers of q, k, v, o (64 x 64), gate, up (128 x 64) and down (64 x 128), each as A (8, in) and B (out, 8).
    shapes = 2 * (4 * [(64, 64)] + 2 * [(128, 64)] + [(64, 128)])
    assert facts["trainable_parameters"] == sum(8 * (p + q) for p, q in shapes)
    assert facts["compressed_matrices"] == 2 * len(shapes)
    # Rank 2 of an (8, q) matrix: two factors, a row and a column of v, a counter.
    sides = [side for shape in shapes for side in shape]
    assert facts["state_bytes"] == sum(4 * ((8 + side) * 2 + 8 + side) + 4 for side in sides)
    assert facts["adamw_state_bytes"] == sum(2 * 4 * 8 * side + 4 for side in sides)
    assert facts["parameters"] == sum(p.numel() for p in tiny_model(0).parameters())


def test_it_is_said_when_nothing_of_an_adapter_is_compressed(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = options(**{**SHORT, **ADAPTED, "rank": 8, "steps": 1, "save_every": 1})
    outcome = finetune(capsys, *given, "--out", "run")
    assert outcome.code == 0
    assert "Warning: --rank 8: nothing is compressed" in " ".join(outcome.out.split())
    assert "--adapter-rank 8" in outcome.out
    assert summary(own / "run")["compressed_matrices"] == 0
    assert "nothing is compressed" not in finetune(capsys, *options(**SHORT, **ADAPTED), "--dry-run").out


def test_lora_plus_moves_b_sixteen_times_as_fast_as_a(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with optimizer_steps() as taken:
        given = {**SHORT, "method": "lora+", "lr": 0.01, "schedule": "constant", "warmup": 0}
        assert finetune(capsys, *options(**given), "--out", "run").code == 0
    (optimizer,) = {id(one): one for one in taken}.values()
    rates = {
        (8 if shape[0] == 8 else "out", group["lr"])
        for group in optimizer.param_groups
        for shape in [tuple(param.shape) for param in group["params"]]
    }
    assert rates == {(8, 0.01), ("out", 0.16)}


def test_every_optimizer_that_keeps_the_weights_is_a_method_and_adapters_are_too() -> None:
    rows = {name for name, entry in OPTIMIZERS.items() if entry.prepare is None} - {"adamw"} | {"full-adamw"}
    assert set(METHODS) == rows | {"lora", "rslora", "lora+", "dora"}
    assert FinetuneConfig(method="adamw").method == "full-adamw"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "adagrad"}, "--method adagrad: there is no such method. Choose one of"),
        ({"method": "lora", "adapter": "dora"}, "--adapter dora: --method lora brings its own adapter"),
        ({"method": "lora", "rank": "1/4"}, "--rank 0.25: an adapter's rank is a whole number"),
        ({"method": "lora", "adapter_rank": 4}, "--adapter-rank 4: --method lora takes its rank from --rank"),
        ({"adapter": "lora"}, "--adapter lora: of which rank?"),
        ({"alpha": 16}, "--alpha: is an adapter's, and --method lorapre-adamw trains all weights"),
        ({"loraplus_ratio": 4}, "--loraplus-ratio 4.0: is for --method lora+ alone"),
        ({"method": "lora", "target_modules": "nothing"}, "--target-modules nothing"),
        ({"method": "lora", "set": "beta=1"}, "--set: --method lora takes no options"),
        ({"rank": 64}, "--rank 64: no matrix of --model tiny has a smaller side above it"),
        ({"set": "second_moment=half"}, "--set second_moment=half"),
        ({"batch_size": 9, "accumulation": 2}, "--batch-size 9: cannot be split"),
        ({"steps": 3, "epochs": 2}, "--steps 3 and --epochs 2.0 exclude each other"),
        ({"model": "no-such-folder"}, "--model no-such-folder: is neither tiny, nor a folder, nor a hub name"),
        ({"preset": "metamath"}, "--preset metamath: there is no such preset"),
        ({"template": "qa", "chat_template": "x.jinja"}, "--chat-template x.jinja: is not used by --template qa"),
        ({"chat_template": "x.jinja"}, "--chat-template x.jinja: cannot be read"),
        ({"save_every": 3, "log_every": 2}, "--save-every 3: must be a multiple of --log-every 2"),
        ({"max_length": 3}, "--max-length 3: 20 examples are left out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_options_that_do_not_fit_are_refused_before_anything_is_made(
    own: Path, capsys: pytest.CaptureFixture[str], given: dict[str, Any], words: str
) -> None:
    before = tree(own)
    base = {key: value for key, value in SHORT.items() if key != "steps" or "epochs" not in given}
    outcome = finetune(capsys, *options(**{**base, **given}), "--out", "run")
    assert outcome.code == 2, outcome
    assert words in outcome.message
    assert tree(own) == before


def test_cut_answers_are_counted_in_the_summary_and_said(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = finetune(capsys, *options(**{**SHORT, "max_length": 12, "steps": 1, "save_every": 1}), "--out", "run")
    lengths = [(len(pair["prompt"]) + 3, len(pair["response"]) + 1) for pair in pairs()]
    kept = summary(own / "run")["examples"]
    named = re.findall(r"(training|validation): --max-length 12: (\d+) answers? (?:are|is) cut", outcome.out)
    assert sum(int(count) for _, count in named) == kept["cut"]
    # All examples, of which 20 and 4 were drawn.
    assert 0 < kept["cut"] <= sum(prompt < 12 < prompt + answer for prompt, answer in lengths)
    assert kept["train"] + kept["valid"] + kept["dropped"] == 24


def test_bf16_checkpointing_and_bfloat16_weights_change_no_more_than_rounding(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for name, given in {
        "plain": [],
        "checkpointed": ["--gradient-checkpointing"],
        "bf16": ["--bf16"],
        "weights": ["--dtype", "bfloat16"],
    }.items():
        arguments = options(**{**SHORT, "method": "lora", "lr": 0.01, "steps": 3, "save_every": 3})
        assert finetune(capsys, *arguments, *given, "--out", name).code == 0
        found[name] = summary(own / name)["valid_loss"]
    assert found["checkpointed"] == pytest.approx(found["plain"], rel=1e-6)
    for name in ("bf16", "weights"):
        assert found[name] != found["plain"]
        assert found[name] == pytest.approx(found["plain"], rel=5e-3)


def test_a_model_folder_is_trained_further_from_its_own_weights(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model(7).save_pretrained(own / "mine")
    tiny_tokenizer().save_pretrained(own / "mine")
    given = options(**{**SHORT, "model": "mine", "method": "lora", "lr": 1e-9})
    assert finetune(capsys, *given, "--out", "run").code == 0
    adapted = AutoPeftModelForCausalLM.from_pretrained(own / "run" / "adapter")
    expected = logits(tiny_model(7), tiny_tokenizer())
    torch.testing.assert_close(logits(adapted, tiny_tokenizer()), expected, rtol=1e-3, atol=1e-4)
    assert not (own / "run" / "base").exists()


@pytest.mark.parametrize("command", [["finetune", "--help"]])
def test_help_fits_80_columns_and_lists_every_option(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(typer.rich_utils, "MAX_WIDTH", 80)
    assert exit_code(*command) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    assert max(cell_len(line) for line in text.splitlines()) <= 80
    names = {option_name(name).removeprefix("--") for name in FinetuneConfig.model_fields}
    names |= {"preset", "config", "out", "resume", "dry-run", "help"}
    assert names - set(re.findall(r"--([a-z0-9-]+)", text)) == set()
    assert "…" not in text
    words = " ".join(re.sub("[│]", " ", text).split())
    for preset in PRESETS:
        assert preset in words


@pytest.mark.usefixtures("here")
def test_help_names_the_true_defaults(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typer.rich_utils, "MAX_WIDTH", 2000)
    monkeypatch.setenv("COLUMNS", "2000")
    assert exit_code("finetune", "--help") == 0
    text = capsys.readouterr().out
    config, checked = FinetuneConfig(), 0
    for line in re.findall(r"^│ --.*$", text, re.MULTILINE):
        name = re.match(r"│ --([a-z0-9-]+)", line)[1].replace("-", "_")  # type: ignore[index]
        stated = re.search(r"default (\d[\d.]*\d|\d)(?=[ ;)])(?! %)", line)
        if stated and getattr(config, name, None) is not None:
            assert float(stated[1]) == getattr(config, name), name
            checked += 1
    assert checked >= 12
    assert (PRETRAINED_LR, LORAPLUS_RATIO, config.total_epochs, FinetuneConfig(data="x").total_epochs) == (
        2e-5,
        16,
        20,
        1,
    )


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize(
    ("preset", "vocabulary", "mlp", "keys"),
    [("metamath-llama2-7b", 32_000, 11_008, 4096), ("metamath-llama3.1-8b", 128_256, 14_336, 1024)],
)
def test_a_dry_run_of_a_preset_needs_no_weights_and_says_the_papers_protocol(
    here: Path, capsys: pytest.CaptureFixture[str], preset: str, vocabulary: int, mlp: int, keys: int
) -> None:
    before = tree(here)
    outcome = finetune(capsys, "--preset", preset, "--dry-run")
    assert outcome.code == 0
    assert tree(here) == before
    words = " ".join(outcome.out.split())
    d = 4096
    shapes = 32 * ([(d, d)] * 2 + [(keys, d)] * 2 + [(d, mlp)] * 3)
    dense, vectors = 2 * vocabulary * d, 65 * d
    parameters = dense + vectors + sum(p * q for p, q in shapes)
    # Algorithm 1 at rank 8: four factors and a counter a matrix; AdamW for the rest.
    state = sum(2 * 4 * (p + q) * 8 + 4 for p, q in shapes) + 8 * (dense + vectors) + 4 * (2 + 65)
    assert f"{parameters:,} parameters, {parameters:,} trained" in words
    assert f"{state / 1e9:.2f} GB (AdamW:" in words
    assert f"{math.ceil(100_000 / 32):,}, of 32 sequences" in words
    assert "at most 100,000 examples, at most 102,400,000 tokens (1,024 each)" in words
    assert "lorapre-adamw-paper, rank 8, 224 of 224 matrices compressed" in words


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize("kind", KINDS)
def test_a_dry_run_says_what_the_run_then_does(own: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    given = options(**{**SHORT, **KINDS[kind]})
    words = " ".join(finetune(capsys, *given, "--dry-run").out.split())
    assert finetune(capsys, *given, "--out", "run").code == 0
    facts = summary(own / "run")
    from lorapre.optim.summary import format_bytes

    assert f"steps {facts['steps']:,}, of 8 sequences" in words
    assert f"{facts['trainable_parameters']:,} trained" in words
    assert f"optimizer state {format_bytes(facts['state_bytes'])} " in words
    assert f"(AdamW: {format_bytes(facts['adamw_state_bytes'])})" in words


def test_epochs_take_every_example_and_the_last_step_what_is_left(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {key: value for key, value in SHORT.items() if key not in ("steps", "save_every")}
    assert finetune(capsys, *options(**given, epochs=2), "--out", "run").code == 0
    assert summary(own / "run")["steps"] == 2 * math.ceil(20 / 8)


@pytest.mark.slow
@pytest.mark.usefixtures("_offline")
def test_without_arguments_a_tiny_model_learns_to_add_numbers_that_it_was_not_shown(here: Path) -> None:
    assert exit_code("finetune", "--out", "run") == 0
    facts = summary(here / "run")
    assert facts["exact_match_before"] == 0
    assert facts["exact_match"] > 0.9
    assert facts["seconds"] < 170
    # By hand, from the folder, in plain transformers.
    model = AutoModelForCausalLM.from_pretrained(here / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(here / "run" / "model")
    right = 0
    for example in additions()[7::50]:
        ids = tokenizer(f"<|user|>{example.messages[0]['content']}<|end|><|assistant|>", return_tensors="pt")
        written = model.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids["input_ids"].shape[1] :]
        right += tokenizer.decode(written, skip_special_tokens=True) == example.answer
    assert right >= 45
    assert json.loads((here / "run" / "provenance.json").read_text())["versions"].keys() >= {"trl", "peft", "torch"}


def test_an_interruption_before_the_first_checkpoint_starts_again(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = options(**SHORT)
    assert finetune(capsys, *given, "--out", "alone").code == 0
    with cut_before_step(2, run="cut"):
        assert finetune(capsys, *given, "--out", "cut").code == 130
    assert finetune(capsys, "--resume", "--out", "cut").code == 0
    assert weights(own / "cut") == weights(own / "alone")
