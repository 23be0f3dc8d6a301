"""Token ids and labels of examples: what is learned, and what is cut."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lorapre.lab.errors import UserError
from lorapre.lab.finetune.formats import Example
from lorapre.lab.finetune.templates import Segment, Template

#: The label of a token that is not learned, torch's.
IGNORED = -100


@dataclass(frozen=True)
class Tokenized:
    """One example: ``prompt`` tokens come before its last answer."""

    ids: list[int]
    labels: list[int]
    prompt: int


@dataclass(frozen=True)
class Encoded:
    """A side of the data in tokens.

    Attributes:
        rows: ``input_ids`` and ``labels`` of each example that is kept.
        kept: the examples of the rows.
        cut: where examples come from whose answer was cut at the end.
        dropped: where those come from of which no answer was left.
    """

    rows: list[Tokenized]
    kept: list[Example]
    cut: list[str]
    dropped: list[str]

    @property
    def tokens(self) -> int:
        return sum(len(row.ids) for row in self.rows)

    @property
    def learned(self) -> int:
        """Tokens that have a label."""
        return sum(label != IGNORED for row in self.rows for label in row.labels)

    def digest(self) -> str:
        """Of all ids and labels, in order."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(np.asarray([len(row.ids), *row.ids, *row.labels], dtype=np.int64).tobytes())
        return digest.hexdigest()

    def dataset(self) -> Dataset:
        """The rows as the trainer takes them."""
        return Dataset.from_dict(
            {
                "input_ids": [np.asarray(row.ids, dtype=np.int32) for row in self.rows],
                "labels": [np.asarray(row.labels, dtype=np.int32) for row in self.rows],
            }
        )


def tokenize(
    segments: Sequence[Segment], tokenizer: PreTrainedTokenizerBase, *, special: bool, completion_only: bool
) -> Tokenized:
    """Ids and labels of one example.

    The tokens before an answer are exactly those that the text before it has alone, which is what the model is given
    when it answers. Where a tokenizer would join letters across that border, the answer is tokenized by itself.

    Args:
        segments: text in pieces, answers marked.
        tokenizer: of the model.
        special: the text has the model's special tokens in it; else they are put around it.
        completion_only: label the answers (and what ends them) alone, else everything.
    """
    ids = [] if special else _first_tokens(tokenizer)
    begin = list(ids)
    labels = [IGNORED] * len(ids)
    text, prompt = "", 0
    for piece, answer in segments:
        text += piece
        whole = begin + _ids(tokenizer, text)
        if whole[: len(ids)] != ids:
            whole = ids + _ids(tokenizer, piece)
        if answer:
            prompt = len(ids)
        labels += whole[len(ids) :] if answer else [IGNORED] * (len(whole) - len(ids))
        ids = whole
    if not special:
        ids, labels = [*ids, _end(tokenizer)], [*labels, _end(tokenizer)]
    return Tokenized(ids, labels if completion_only else list(ids), prompt)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def _first_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-text token, where the tokenizer puts one."""
    first = tokenizer("a")["input_ids"][:1]
    return list(first) if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else []


def _end(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError(
            "The model's tokenizer has no end-of-text token, so no answer could end. Set eos_token in its "
            "tokenizer_config.json."
        )
    return int(tokenizer.eos_token_id)


def encode(
    examples: Sequence[Example],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    completion_only: bool,
) -> Encoded:
    """All examples in tokens, at most ``max_length`` each; what is cut or dropped for that is named in the result.

    Raises:
        UserError: the template cannot take an example.
    """
    encoded = Encoded([], [], [], [])
    for example in examples:
        row = tokenize(template.segments(example), tokenizer, special=template.special, completion_only=completion_only)
        if len(row.ids) > max_length:
            if row.prompt >= max_length:
                encoded.dropped.append(example.where)
                continue
            encoded.cut.append(example.where)
            row = Tokenized(row.ids[:max_length], row.labels[:max_length], row.prompt)
        encoded.rows.append(row)
        encoded.kept.append(example)
    return encoded


def truncation_warning(encoded: Encoded, max_length: int) -> str:
    """What ``max_length`` took from the examples, in words; empty if it took nothing."""
    parts = []
    if encoded.cut:
        parts.append(f"{_count(encoded.cut, 'answer')} cut short ({_first(encoded.cut)})")
    if encoded.dropped:
        parts.append(
            f"{_count(encoded.dropped, 'example')} left out, whose prompt alone fills it ({_first(encoded.dropped)})"
        )
    return f"--max-length {max_length}: {' and '.join(parts)}. Give more to keep them." if parts else ""


def _count(places: list[str], noun: str) -> str:
    return f"{len(places):,} {noun}{'s are' if len(places) > 1 else ' is'}"


def _first(places: list[str]) -> str:
    return ", ".join(places[:3]) + (", ..." if len(places) > 3 else "")


def fingerprint(train: Encoded, valid: Encoded, tokenizer: Any) -> dict[str, Any]:
    """What tells one run's data from another's."""
    vocabulary = "\n".join(f"{token}\t{index}" for token, index in sorted(tokenizer.get_vocab().items()))
    return {
        "train_examples": len(train.rows),
        "valid_examples": len(valid.rows),
        "train_tokens": train.tokens,
        "train_sha256": train.digest(),
        "valid_sha256": valid.digest(),
        "vocabulary_sha256": hashlib.sha256(vocabulary.encode("utf-8", "surrogatepass")).hexdigest(),
    }
