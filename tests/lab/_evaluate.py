"""A tiny Llama of characters, random or taught a few sums, and questions for it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from _lab import Outcome, exit_code
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|end|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a character of ASCII, and the end; so every answer is text."""
    alphabet = ["Ġ", "Ċ", *map(chr, range(33, 127))]  # byte-level names of space and line feed
    vocabulary = {END: 0} | {symbol: place for place, symbol in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def random_llama(width: int = 64, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = {
        "vocab_size": 97,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": 0,
        "initializer_range": 0.2,  # so that answers are not all alike
    }
    return LlamaForCausalLM(LlamaConfig(**{**config, **changes})).eval()


#: What the taught model says to each question.
SAYS: Mapping[str, str] = {
    "What is 2+3?": " 2+3=5.\n#### 5",
    "What is 9+4?": " 9+4=13.\n#### 13",
    "Of 8 pens 5 go?": " 8-5=3.\n#### 3",
    "And 1,000 twice?": " #### 2,000",
    "Is that all?": " Yes.",
}


def gsm8k_records() -> list[dict[str, str]]:
    """Of the five that the taught model knows: it is wrong on the second and has no answer to the last."""
    golds = ("5", "14", "3", "2,000", "7")
    return [
        {"question": question, "answer": f"Think.\n#### {gold}"} for question, gold in zip(SAYS, golds, strict=True)
    ]


def math_record(**changes: Any) -> dict[str, Any]:
    record = {
        "problem": "What is $1/2$?",
        "solution": "It is $\\boxed{\\frac{1}{2}}$.",
        "answer": "\\frac{1}{2}",
        "subject": "Algebra",
        "level": 2,
        "unique_id": "test/algebra/1.json",
    }
    return {**record, **changes}


def write_jsonl(path: Path, records: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def teach(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Let the model learn `SAYS` by heart, after gsm8k's own prompt."""
    texts = [f"Question: {question}\nAnswer:{answer}{END}" for question, answer in SAYS.items()]
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    tokenizer.pad_token = None  # as it is of many models
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    model.train()
    for _ in range(150):
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def evaluate(capsys: Any, *arguments: Any) -> Outcome:
    """``lorapre evaluate ARGUMENTS`` in this process."""
    capsys.readouterr()
    code = exit_code("evaluate", *map(str, arguments))
    captured = capsys.readouterr()
    return Outcome(code, captured.out, captured.err)
