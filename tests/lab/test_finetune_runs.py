"""Runs of the command: what they leave opens elsewhere, resumes to the bit, merges, and says what it did."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from _finetune import KINDS, SHORT, finetune, pairs, write_lines
from _lab import cut_before_step, options, records, summary, timeless, tree
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorapre.lab.config import option_name
from lorapre.lab.finetune.config import FinetuneConfig
from lorapre.lab.finetune.methods import METHODS
from lorapre.lab.finetune.tiny import tiny_model, tiny_tokenizer


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
    adapted = "method" in KINDS[kind] and METHODS[KINDS[kind]["method"]].adapter is not None
    adapted |= "adapter" in KINDS[kind]
    assert set(weights(own / "alone")) >= {"base", "adapter" if adapted else "model"}
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


def test_an_interruption_before_the_first_checkpoint_starts_again(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = options(**SHORT)
    assert finetune(capsys, *given, "--out", "alone").code == 0
    with cut_before_step(2, run="cut"):
        assert finetune(capsys, *given, "--out", "cut").code == 130
    assert finetune(capsys, "--resume", "--out", "cut").code == 0
    assert weights(own / "cut") == weights(own / "alone")


def test_a_resumed_run_refuses_other_options_and_other_data(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with cut_before_step(6):
        assert finetune(capsys, *options(**SHORT), "--out", "run").code == 130
    refused = finetune(capsys, "--resume", "--out", "run", "--lr", "0.5")
    assert refused.code == 2
    assert "--lr 0.5: the run in run began with None" in refused.message
    for name in ("warmup", "max_grad_norm"):
        refused = finetune(capsys, "--resume", "--out", "run", *options(**{name: 0}))
        assert refused.code == 2
        assert (
            f"{option_name(name)} 0.0: the run in run began with {getattr(FinetuneConfig(), name)}" in refused.message
        )
    refused = finetune(capsys, "--resume", "--out", "run", "--epochs", "3")
    assert refused.code == 2
    assert "--epochs 3.0: the run in run began with --steps 7, and a resumed run keeps its" in refused.message
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


def test_a_model_folder_is_trained_further_from_its_own_weights(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model(7).save_pretrained(own / "mine")
    tiny_tokenizer().save_pretrained(own / "mine")
    given = options(**{**SHORT, "model": "mine", "method": "lora", "lr": 1e-9})
    assert finetune(capsys, *given, "--out", "run").code == 0
    adapted = AutoPeftModelForCausalLM.from_pretrained(own / "run" / "adapter")
    expected = logits(tiny_model(7), tiny_tokenizer())
    torch.testing.assert_close(logits(adapted, tiny_tokenizer()), expected, rtol=1e-3, atol=1e-4)
    assert not (own / "run" / "base").exists()


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
    others = {"--dry-run": [], "--preset": ["metamath-llama2-7b"], "--config": ["run/config.yaml"]}
    for name, value in others.items():
        refused = finetune(capsys, "--merge", "--out", "run", name, *value)
        assert refused.code == 2
        assert f"{name}: --merge --out run merges the adapter of the finished run there" in refused.message
    assert tree(own / "run") == before
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


def test_merging_an_interrupted_run_names_the_command_that_finishes_it(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with cut_before_step(6):
        assert finetune(capsys, *options(**SHORT, method="lora"), "--out", "run").code == 130
    refused = finetune(capsys, "--merge", "--out", "run")
    assert refused.code == 2
    assert "--merge --out run: the run there is unfinished" in refused.message
    assert "`lorapre finetune --resume --merge --out run`" in refused.message
    assert finetune(capsys, "--resume", "--merge", "--out", "run").code == 0
    assert (own / "run" / "merged").exists()


def test_merging_weights_that_have_no_adapter_is_refused_before_training(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(own)
    outcome = finetune(capsys, *options(**SHORT), "--merge", "--out", "run")
    assert outcome.code == 2
    assert "there is nothing to merge" in outcome.message
    assert tree(own) == before


def test_bf16_checkpointing_and_bfloat16_weights_change_no_more_than_rounding(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for name, given in {
        "plain": [],
        "checkpointed": ["--checkpointing"],
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


@pytest.mark.parametrize("given", [[], ["--accumulation", "4"], ["--packing", "--max-length", "64"]], ids=" ".join)
def test_a_step_is_that_of_adamw_on_the_mean_over_the_learned_tokens_of_the_batch(
    own: Path, capsys: pytest.CaptureFixture[str], given: list[str]
) -> None:
    rows = pairs(8)
    write_lines(own / "eight.jsonl", rows)
    shared = {"data": "eight.jsonl", "valid_data": "own.jsonl", "batch_size": 8, "steps": 1, "schedule": "constant"}
    rates = {"method": "full-adamw", "lr": 0.01, "dense_lr": 0.003, "warmup": 0, "max_grad_norm": 0.5, "seed": 4}
    assert finetune(capsys, *options(**shared, **rates), *given, "--out", "run").code == 0
    trained = AutoModelForCausalLM.from_pretrained(own / "run" / "model")

    model, tokenizer = tiny_model(4), tiny_tokenizer()
    total, count = torch.zeros(()), 0
    for row in rows:
        prompt = tokenizer(f"<|user|>{row['prompt']}<|end|><|assistant|>")["input_ids"]
        answer = tokenizer(f"{row['response']}<|end|>")["input_ids"]
        scores = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total = total - scores[torch.arange(len(answer)), torch.tensor(answer)].sum()
        count += len(answer)
    (total / count).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    dense = {"embed_tokens", "norm", "input_layernorm", "post_attention_layernorm"}
    for name, param in model.named_parameters():
        rate = 0.003 if name.split(".")[-2] in dense else 0.01
        gradient = param.grad
        assert gradient is not None
        # The first step of Adam: both moments corrected are the gradient and its square.
        expected = param - rate * gradient / (gradient.abs() + 1e-8)
        known = gradient.abs() > 1e-5  # below, the sign itself is rounding
        torch.testing.assert_close(trained.get_parameter(name)[known], expected[known], rtol=0, atol=2e-5, msg=name)
        assert known.float().mean() > 0.2 or name.endswith("embed_tokens.weight")
