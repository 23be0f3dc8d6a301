"""Answers of a model to a batch of prompts, padded on the left; each as if it had been asked alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

#: Tokens after which rows that have ended leave a greedy batch. What the others have so far is read anew then, at the
#: price of one forward pass; without it the longest answer of a batch would have all rows computed to its end.
PIECE = 64


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded. A ``temperature`` of 0 takes the likeliest token each time.

    ``special_tokens`` says whether the tokenizer adds its own to a prompt; a chat template has written them already.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    stop: tuple[str, ...]
    special_tokens: bool


@dataclass(frozen=True)
class Completion:
    """One answer: its text up to a stop string, its tokens, and why it ended: ``eos``, ``stop`` or ``length``."""

    text: str
    tokens: int
    finish: str


class _Noise(LogitsProcessor):
    """Adds Gumbel noise to the logits, so that the largest sum is a sample of their softmax.

    Each row draws from its own generator: a sample depends on the row's seed, not on its neighbours in the batch.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log()


class _StopAt(StoppingCriteria):
    """Ends a row once its text has a stop string; ``lengths`` are the rows' tokens by then, or None."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], prompt_tokens: int, rows: int) -> None:
        self._tokenizer, self._stop, self._begin = tokenizer, stop, prompt_tokens
        # A token may be a single byte; four more for a character that began before the window.
        self._window = max(len(text.encode()) for text in stop) + 4
        self.lengths: list[int | None] = [None] * rows

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        done = input_ids.shape[1]
        tails = input_ids[:, max(self._begin, done - self._window) :].tolist()
        for row, tail in enumerate(tails):
            if self.lengths[row] is None:
                text = _decode(self._tokenizer, tail)
                if any(stop in text for stop in self._stop):
                    self.lengths[row] = done - self._begin
        return torch.tensor([length is not None for length in self.lengths], device=input_ids.device)


def _decode(tokenizer: Any, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def prompt_tokens(tokenizer: Any, prompts: Sequence[str], *, special_tokens: bool) -> list[int]:
    """How many tokens each prompt has."""
    return [len(tokens) for tokens in tokenizer(list(prompts), add_special_tokens=special_tokens)["input_ids"]]


def end_tokens(model: PreTrainedModel, tokenizer: Any, stop: Sequence[str] = ()) -> list[int]:
    """The tokens that end an answer: those of the model's generation settings, and the tokenizer's.

    A stop string that is one of the tokenizer's special tokens is among them, since no decoded text has it.
    """
    given = model.generation_config.eos_token_id
    special = set(tokenizer.all_special_tokens)
    ids = {*(given if isinstance(given, list) else [given]), tokenizer.eos_token_id}
    ids |= {tokenizer.convert_tokens_to_ids(text) for text in stop if text in special}
    return sorted(token for token in ids if token is not None)


@contextmanager
def without_settings(model: Any) -> Iterator[None]:
    """Within this, ``model`` has no generation settings, from which ``generate`` takes what it is not given.

    Read `end_tokens` before. ``model`` may have an adapter.
    """
    # Which of both are read, that around an adapter or that within, depends on the adapter's kind.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = model.generation_config
    model.generation_config = inner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = inner.generation_config = own


@torch.no_grad()
def complete(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    decoding: Decoding,
) -> list[Completion]:
    """Answer each prompt, in their order; where sampled, with the seed at its place.

    Of the model's own generation settings only the end tokens are kept: no penalty or default temperature applies.
    The same prompt and seed give the same answer in any batch, up to rounding of the model's arithmetic.
    """
    ends = end_tokens(model, tokenizer, decoding.stop)
    generate: Any = model.generate
    batch = tokenizer(
        list(prompts),
        add_special_tokens=decoding.special_tokens,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    ).to(model.device)
    width = batch["input_ids"].shape[1]
    processors = LogitsProcessorList()
    if decoding.temperature:
        processors.append(TemperatureLogitsWarper(decoding.temperature))
        if decoding.top_p < 1:
            processors.append(TopPLogitsWarper(decoding.top_p))
        processors.append(_Noise(seeds, model.device))
    stop = _StopAt(tokenizer, decoding.stop, width, len(prompts)) if decoding.stop else None
    # The noise and the stop strings know the rows by their place, which they keep then.
    piece = decoding.max_new_tokens if processors or stop else PIECE

    def go_on(ids: Tensor, mask: Tensor, count: int) -> Tensor:
        output: Tensor = generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=ends or None,
                pad_token_id=tokenizer.pad_token_id,
            ),
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([] if stop is None else [stop]),
        )
        return output

    with without_settings(model):
        rows = _in_pieces(go_on, batch["input_ids"], batch["attention_mask"], ends, decoding.max_new_tokens, piece)
    lengths = [None] * len(rows) if stop is None else stop.lengths
    return [_completion(tokenizer, row, length, ends, decoding.stop) for row, length in zip(rows, lengths, strict=True)]


def _in_pieces(
    go_on: Callable[[Tensor, Tensor, int], Tensor], ids: Tensor, mask: Tensor, ends: list[int], count: int, piece: int
) -> list[list[int]]:
    """At most ``count`` new tokens of each row; after each ``piece`` of them the rows that have ended are left out.

    Args:
        go_on: ``ids`` and at most so many tokens more, for token ids and attention mask (rows, tokens) padded on the
            left; padded on the right once a row has ended.
        ids: to begin with.
        mask: of ``ids``.
        ends: tokens that end a row.
        count: new tokens of a row at most.
        piece: of them.
    """
    rows: list[list[int]] = [[] for _ in range(len(ids))]
    places = torch.arange(len(ids), device=ids.device)
    left = count
    while left > 0 and len(places):
        output = go_on(ids, mask, min(piece, left))
        new = output[:, ids.shape[1] :]
        for place, tokens in zip(places.tolist(), new.tolist(), strict=True):
            rows[place] += tokens
        left -= new.shape[1]
        going = ~torch.isin(new, torch.tensor(ends, dtype=new.dtype, device=new.device)).any(dim=1)
        places, ids, mask = places[going], output[going], torch.cat([mask, torch.ones_like(new)], dim=1)[going]
        used = mask.any(dim=0)  # not the columns in which all that are left have padding
        ids, mask = ids[:, used], mask[:, used]
    return rows


def _completion(
    tokenizer: Any, row: list[int], stopped: int | None, ends: list[int], stop: tuple[str, ...]
) -> Completion:
    """``row`` without what follows its end: padding, which may be the end token too."""
    row = row[:stopped]
    end = next((place for place, token in enumerate(row) if token in ends), None)
    tokens = row[:end]
    text = _decode(tokenizer, tokens)
    cut = min((place for place in map(text.find, stop) if place >= 0), default=None)
    if cut is not None:
        return Completion(text[:cut], len(tokens), "stop")
    return Completion(text, len(tokens), "length" if end is None else "eos")
