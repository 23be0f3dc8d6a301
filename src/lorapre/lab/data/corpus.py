"""`load_corpus`: from what the user names to two datasets of blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from lorapre.lab.data.bigram import BigramModel
from lorapre.lab.data.cache import Cache, default_cache_dir, make_key
from lorapre.lab.data.encode import Encoder, batches, id_count
from lorapre.lab.data.hub import HELD_OUT_DOCUMENTS, HubData, open_hub
from lorapre.lab.data.local import LocalDocuments, megabytes, open_local
from lorapre.lab.data.sources import HUB_PREFIX, TextFiles, check_data_spec, find_files
from lorapre.lab.data.split import Side
from lorapre.lab.data.stream import StreamBlockDataset
from lorapre.lab.data.tokenizer import TrainingText, bpe_vocabulary, load_tokenizer
from lorapre.lab.data.tokens import (
    BlockDataset,
    TokenArray,
    TokenFiles,
    read_token_files,
    store_tokens,
    write_token_files,
)
from lorapre.lab.errors import UserError

# The protocol of GaLore and of those who compare with it: C4 in the tokens of T5.
HUB_TOKENIZER = "t5-base"
BIGRAM_STREAM_TOKENS = 5_000_000


@dataclass(frozen=True)
class TextCorpus:
    """What a model is trained and validated on.

    train: blocks; a `StreamBlockDataset` (without end) for `hf:` data, else a `BlockDataset`.
    valid: blocks of the documents that were held out.
    tokenizer: `save_pretrained` of it writes what `AutoTokenizer` loads.
    train_tokens, valid_tokens: tokens in whole blocks; train_tokens is None for a stream.
    description: one short line for people.
    max_token_id: the largest id that occurs; for a stream the largest that text can have.
    """

    train: Dataset[dict[str, torch.Tensor]]
    valid: BlockDataset
    tokenizer: PreTrainedTokenizerBase
    train_tokens: int | None
    valid_tokens: int
    description: str
    max_token_id: int
    _cache: Cache = field(repr=False)
    _key: str = field(repr=False)

    def bigram_cross_entropy(self) -> float:
        """Nats per predicted token of `valid` under a bigram model of `train`; computed once, then cached.

        Of a stream the first BIGRAM_STREAM_TOKENS are used, in the dataset's own order.
        """
        name = f"bigram-{make_key(self._key, self.valid.sequence_length, self.valid_tokens)}.json"
        record = self._cache.read_json(name)
        if record is None:
            model = BigramModel.fit(self._bigram_tokens(), id_count(self.tokenizer))
            value = model.cross_entropy(self.valid.tokens, self.valid.sequence_length)
            record = {"nats_per_token": value}
            self._cache.write_json(name, record)
        return float(record["nats_per_token"])

    def _bigram_tokens(self) -> TokenArray:
        if isinstance(self.train, BlockDataset):
            return self.train.tokens
        assert isinstance(self.train, StreamBlockDataset)
        encoder = Encoder(self.tokenizer)
        arrays: list[TokenArray] = []
        count = 0
        for group in batches(("train", text) for text in self.train.stream.documents()):
            arrays.extend(encoder.encode([text for _, text in group]))
            count += sum(map(len, arrays[-len(group) :]))
            if count >= BIGRAM_STREAM_TOKENS:
                break
        return np.concatenate(arrays)[:BIGRAM_STREAM_TOKENS]


def load_corpus(
    data: Sequence[str],
    *,
    tokenizer: str | None,
    sequence_length: int,
    text_field: str = "text",
    valid_data: Sequence[str] = (),
    valid_fraction: float = 0.05,
    max_valid_tokens: int | None = None,
    seed: int = 0,
    shuffle_stream: bool = True,
    cache_dir: Path | None = None,
    status: Callable[[str], None] = lambda _: None,
) -> TextCorpus:
    """Read, divide and tokenize `data`, or find all of that in the cache.

    data: `["stdlib"]` (the source of this Python's standard library), files, folders and globs, or
        `["hf:<dataset>[:config]"]`, which is streamed.
    tokenizer: see `load_tokenizer`; None means `bpe`, and `t5-base` for `hf:`.
    sequence_length: tokens of a block, at least 2.
    text_field: field of JSON lines and of hub datasets, column of Parquet.
    valid_data: files, folders and globs to validate on; without them, `valid_fraction` of the documents of
        local data are held out (see `split_documents`), and `hf:` uses its own validation split (see `open_hub`).
    max_valid_tokens: validate on no more than this many tokens, in whole blocks; None for all.
    seed, shuffle_stream: order of a stream (see `StreamBlockDataset`); local data has the order of its files,
        which is for the sampler of the training loop to shuffle.
    cache_dir: default `$LORAPRE_CACHE`, `$XDG_CACHE_HOME/lorapre` or `~/.cache/lorapre`.
    status: receives short lines about what is being done.

    Several processes may call this at once; one that comes later finds the work of the first.
    Raises UserError for whatever its reader can put right.
    """
    kind = check_data_spec(data)
    _check_numbers(sequence_length, valid_fraction, max_valid_tokens)
    _check_valid_data(valid_data)
    if tokenizer is not None:
        bpe_vocabulary(tokenizer)
    cache = Cache(default_cache_dir() if cache_dir is None else cache_dir)
    if kind == "hub":
        hub = open_hub(data[0], text_field, explicit_valid=bool(valid_data))
        valid = find_files(valid_data, text_field, "valid_data") if valid_data else None
        return _load_stream(
            hub,
            valid,
            tokenizer=HUB_TOKENIZER if tokenizer is None else tokenizer,
            sequence_length=sequence_length,
            max_valid_tokens=max_valid_tokens,
            seed=seed,
            shuffle=shuffle_stream,
            cache=cache,
            status=status,
        )
    local = open_local(data, text_field=text_field, valid_data=valid_data, valid_fraction=valid_fraction, status=status)
    return _load_local(
        local,
        tokenizer="bpe" if tokenizer is None else tokenizer,
        sequence_length=sequence_length,
        max_valid_tokens=max_valid_tokens,
        cache=cache,
        status=status,
    )


def _load_local(
    local: LocalDocuments,
    *,
    tokenizer: str,
    sequence_length: int,
    max_valid_tokens: int | None,
    cache: Cache,
    status: Callable[[str], None],
) -> TextCorpus:
    identity = local.identity()
    text = TrainingText(identity, local.train, local.utf8_bytes)
    loaded = load_tokenizer(tokenizer, text, cache=cache, status=status)
    encoder = Encoder(loaded)
    key = make_key("tokens", identity, encoder.serialized, encoder.end)
    files = read_token_files(cache, key)
    if files is None:
        size = megabytes(local.utf8_bytes())
        status(f"encoding {size}")
        files = write_token_files(cache, key, local.sides(), encoder, local.description())
    assert files.train is not None
    train = BlockDataset(files.train, sequence_length, what="the training part of data")
    valid = _valid_blocks(files, sequence_length, max_valid_tokens)
    return TextCorpus(
        train,
        valid,
        loaded,
        train_tokens=len(train) * sequence_length,
        valid_tokens=len(valid) * sequence_length,
        description=files.description,
        max_token_id=files.max_token_id,
        _cache=cache,
        _key=key,
    )


def _load_stream(
    hub: HubData,
    valid_files: TextFiles | None,
    *,
    tokenizer: str,
    sequence_length: int,
    max_valid_tokens: int | None,
    seed: int,
    shuffle: bool,
    cache: Cache,
    status: Callable[[str], None],
) -> TextCorpus:
    text = TrainingText(hub.identity, hub.train.documents, None)
    loaded = load_tokenizer(tokenizer, text, cache=cache, status=status)
    encoder = Encoder(loaded)
    valid_identity = valid_files.identity() if valid_files else []
    key = make_key("stream", hub.identity, valid_identity, max_valid_tokens, encoder.serialized, encoder.end)
    files = read_token_files(cache, key)
    if files is None:
        status("encoding the validation documents")
        documents, what = _stream_valid(hub, valid_files)
        arrays = _until(_encoded(documents, encoder), max_valid_tokens)
        description = f"{hub.label} (streamed), validated on {what}"
        files = store_tokens(cache, key, arrays, ("valid",), encoder.dtype, description)
    valid = _valid_blocks(files, sequence_length, max_valid_tokens)
    return TextCorpus(
        StreamBlockDataset(hub.train, loaded, sequence_length, seed=seed, shuffle=shuffle),
        valid,
        loaded,
        train_tokens=None,
        valid_tokens=len(valid) * sequence_length,
        description=files.description,
        max_token_id=_largest_ordinary_id(loaded),
        _cache=cache,
        _key=key,
    )


def _largest_ordinary_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id that text can have: T5 keeps a hundred sentinels behind it, which only its own training uses."""
    special = set(tokenizer.all_special_ids) - {tokenizer.eos_token_id}
    return max(index for index in tokenizer.get_vocab().values() if index not in special)


def _stream_valid(hub: HubData, valid_files: TextFiles | None) -> tuple[Iterator[str], str]:
    """Documents to validate on and what they are; UserError where they would leave none to train on."""
    if next(hub.train.documents(), None) is None:
        remedy = (
            f"its first {HELD_OUT_DOCUMENTS:,} records are for validation, since it has no split 'validation' or "
            "'test': name its files instead, which are divided by valid_fraction, or give valid_data"
            if hub.train.skip
            else "give another dataset"
        )
        raise UserError(f"{hub.train.where} leaves no document to train on; {remedy}.")
    if valid_files is not None:
        return valid_files.documents(), valid_files.label
    what = f"its first {hub.train.skip:,} records" if hub.train.skip else f"its split {hub.valid_split!r}"
    return hub.valid.documents(), what


def _encoded(documents: Iterator[str], encoder: Encoder) -> Iterator[tuple[Side, TokenArray]]:
    for group in batches((None, text) for text in documents):
        for ids in encoder.encode([text for _, text in group]):
            yield "valid", ids


def _until(arrays: Iterator[tuple[Side, TokenArray]], tokens: int | None) -> Iterator[tuple[Side, TokenArray]]:
    """Stop once there are `tokens` of them: a validation split can be far larger than what is asked for."""
    count = 0
    for side, ids in arrays:
        yield side, ids
        count += len(ids)
        if tokens is not None and count >= tokens:
            return


def _valid_blocks(files: TokenFiles, sequence_length: int, max_valid_tokens: int | None) -> BlockDataset:
    return BlockDataset(files.valid, sequence_length, max_tokens=max_valid_tokens, what="the validation part of data")


def _check_numbers(sequence_length: int, valid_fraction: float, max_valid_tokens: int | None) -> None:
    if sequence_length < 2:
        raise UserError(
            f"sequence_length={sequence_length} is too small; it must be at least 2, so that a block holds a token "
            "to predict and one to predict it from."
        )
    if not 0 < valid_fraction < 1:
        raise UserError(
            f"valid_fraction={valid_fraction} must be above 0 and below 1; write 0.05 for 5 % of the documents, or "
            "give valid_data to train on all of data."
        )
    if max_valid_tokens is not None and max_valid_tokens < sequence_length:
        raise UserError(
            f"max_valid_tokens={max_valid_tokens:,} is less than one block of sequence_length={sequence_length:,}; "
            "raise it, or leave it out to validate on everything that is held out."
        )


def _check_valid_data(valid_data: Sequence[str]) -> None:
    for entry in valid_data:
        if entry == "stdlib" or entry.startswith(HUB_PREFIX):
            raise UserError(
                f"valid_data={entry!r} is no file; give files, folders or globs to validate on, or leave "
                "valid_data out."
            )
