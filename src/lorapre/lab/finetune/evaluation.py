"""Answers by generation, and how many of them are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lorapre.lab.evaluate.generation import end_tokens, without_settings
from lorapre.lab.finetune.tokens import Encoded

_BATCH = 50


@dataclass(frozen=True)
class Question:
    """Token ids of a prompt, and the final answer that is right."""

    prompt: list[int]
    expected: str


def questions(valid: Encoded, final: Callable[[str], str], count: int) -> list[Question]:
    """The first ``count`` examples that are whole and whose answer has a final part."""
    found = []
    for row, example in zip(valid.rows, valid.kept, strict=True):
        expected = final(example.answer)
        if expected and example.where not in valid.cut:
            found.append(Question(row.ids[: row.prompt], expected))
    return found[:count]


def answer_room(valid: Encoded) -> int:
    """Tokens to answer with: twice the longest answer held out."""
    return 2 * max(len(row.ids) - row.prompt for row in valid.rows)


@torch.no_grad()
def exact_match(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Question],
    final: Callable[[str], str],
    room: int,
) -> float:
    """Share of ``asked`` whose greedy answer of at most ``room`` tokens is right.

    As in ``lorapre evaluate``, of the model's own generation settings only the end tokens are kept.

    Args:
        model: answers in evaluation mode, and is left in it.
        tokenizer: its own.
        asked: at least one.
        final: what is compared of an answer.
        room: most tokens of an answer.
    """
    model.eval()
    padding = tokenizer.pad_token_id
    greedy = GenerationConfig(
        max_new_tokens=room, do_sample=False, eos_token_id=end_tokens(model, tokenizer) or None, pad_token_id=padding
    )
    right = 0
    for start in range(0, len(asked), _BATCH):
        part = asked[start : start + _BATCH]
        longest = max(len(question.prompt) for question in part)
        ids = [[padding] * (longest - len(question.prompt)) + question.prompt for question in part]
        mask = [[0] * (longest - len(question.prompt)) + [1] * len(question.prompt) for question in part]
        with without_settings(model):
            written = model.generate(
                input_ids=torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                generation_config=greedy,
            )
        texts = tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
        right += sum(final(text) == question.expected for text, question in zip(texts, part, strict=True))
    return right / len(asked)
