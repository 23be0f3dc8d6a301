"""Tokenizers: one trained here on the spot, a file, a folder, or a name on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lorapre.lab.data.cache import Cache, make_key
from lorapre.lab.data.encode import pieces
from lorapre.lab.errors import UserError

END_OF_TEXT = "<|endoftext|>"
DEFAULT_VOCABULARY = 4096
_SMALLEST_VOCABULARY = 257  # 256 bytes and the end of text
_LARGEST_VOCABULARY = 10_000_000  # the trainer makes room for all of it in advance
BPE_TRAINING_BYTES = 50_000_000


@dataclass(frozen=True)
class TrainingText:
    """What a `bpe` tokenizer is trained on.

    identity: as of a source, with everything that decides which documents these are; it names the cached file.
    documents: gives the documents, in order; called only where the cached file is missing.
    utf8_bytes: gives their size; None where the end is not known (a stream).
    """

    identity: list[object]
    documents: Callable[[], Iterator[str]]
    utf8_bytes: Callable[[], int] | None


def bpe_vocabulary(spec: str) -> int | None:
    """The vocabulary that `bpe` or `bpe:N` asks for; None for any other spec. UserError for a bad N."""
    name, colon, number = spec.partition(":")
    if name != "bpe":
        return None
    if not colon:
        return DEFAULT_VOCABULARY
    # Digits are counted first: Python turns no more than 4,300 of them into a number.
    plain = number.isascii() and number.isdigit() and len(number) <= len(str(_LARGEST_VOCABULARY))
    if not plain or not _SMALLEST_VOCABULARY <= int(number) <= _LARGEST_VOCABULARY:
        raise UserError(
            f"tokenizer={spec!r}: the vocabulary after 'bpe:' must be a whole number of at least "
            f"{_SMALLEST_VOCABULARY} (256 bytes and {END_OF_TEXT}) and at most {_LARGEST_VOCABULARY:,}; write for "
            f"instance 'bpe:{DEFAULT_VOCABULARY}'."
        )
    return int(number)


def load_tokenizer(
    spec: str, training_text: TrainingText, *, cache: Cache, status: Callable[[str], None]
) -> PreTrainedTokenizerBase:
    """Load or train the tokenizer that `spec` describes; its `eos_token_id` is set.

    spec: `bpe` or `bpe:VOCABULARY` (byte-level BPE trained on `training_text`, see `train_bpe`, and cached), a
        `tokenizer.json` file, a folder that `save_pretrained` wrote, or a name on the hub.

    Where the tokenizer declares no end of text, `<|endoftext|>` is taken if its vocabulary has it.
    Raises UserError where there is no such tokenizer, it has no end of text, or it is none of the fast kind.
    """
    vocabulary = bpe_vocabulary(spec)
    if vocabulary is not None:
        return _with_end(_cached_bpe(vocabulary, training_text, cache, status), spec)
    return read_tokenizer(spec)


def is_local(spec: str) -> bool:
    """Whether `spec`, which is not `bpe`, names a file or folder on this machine, there or not, and none of the hub."""
    return Path(spec).expanduser().exists() or spec.startswith((".", "/", "~")) or spec.endswith(".json")


def read_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """`load_tokenizer` of a `spec` for which nothing is trained.

    Raises UserError where there is no such tokenizer, it has no end of text, or it is none of the fast kind.
    """
    path = Path(spec).expanduser()
    if path.is_dir() and not (path / "tokenizer_config.json").exists() and (path / "tokenizer.json").exists():
        path = path / "tokenizer.json"
    if path.is_file():
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises bare Exception
            raise UserError(
                f"tokenizer={spec!r} cannot be read as a tokenizer.json file ({error}); give a file that the "
                "`tokenizers` library saved, or a folder, or 'bpe'."
            ) from error
        return _with_end(backend, spec)
    return _from_pretrained(spec, path)


def train_bpe(documents: Iterable[str], vocabulary: int) -> tokenizers.Tokenizer:
    """Byte-level BPE with `<|endoftext|>` as id 0 and all 256 bytes, so that any text can be encoded.

    The same documents give the same tokenizer in every process. The vocabulary is smaller than asked for where
    the documents hold too few different pairs.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer=trainer)
    return tokenizer


def training_sample(text: TrainingText, limit: int = BPE_TRAINING_BYTES) -> Iterator[str]:
    """About `limit` bytes of `text`: all of it if there are no more, else an evenly spaced sample.

    Every k-th document is taken, where a document above one million characters counts as several; of a stream,
    whose length is unknown, the beginning is taken.
    """
    parts = (part for document in text.documents() for part in pieces(document))
    if text.utf8_bytes is None:
        return _beginning(parts, limit)
    return islice(parts, 0, None, max(1, -(-text.utf8_bytes() // limit)))


def _beginning(parts: Iterable[str], limit: int) -> Iterator[str]:
    taken = 0
    for part in parts:
        yield part
        taken += len(part.encode("utf-8"))
        if taken >= limit:
            return


def _cached_bpe(
    vocabulary: int, text: TrainingText, cache: Cache, status: Callable[[str], None]
) -> tokenizers.Tokenizer:
    name = f"bpe-{make_key('bpe', vocabulary, BPE_TRAINING_BYTES, text.identity)}.json"
    if cache.read_json(name) is None:
        sample = training_sample(text)  # measures the text first, which is a step of its own
        status(f"training a {vocabulary:,}-entry tokenizer")
        trained = train_bpe(sample, vocabulary)
        with cache.write(name) as file:
            file.write(trained.to_str().encode())
    return tokenizers.Tokenizer.from_file(str(cache.path(name)))


def _with_end(backend: tokenizers.Tokenizer, spec: str) -> PreTrainedTokenizerBase:
    if backend.token_to_id(END_OF_TEXT) is None:
        raise UserError(
            f"tokenizer={spec!r} declares no end of text and has no {END_OF_TEXT} in its vocabulary, so documents "
            "cannot be separated; give the folder with its tokenizer_config.json, or another tokenizer."
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False)


def _from_pretrained(spec: str, path: Path) -> PreTrainedTokenizerBase:
    local = path.is_dir()
    if not local and is_local(spec):
        raise UserError(
            f"tokenizer={spec!r} does not exist (looked from {Path.cwd()}); correct the path, or give 'bpe'."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path if local else spec)
    except Exception as error:  # hub, network, configuration and parsing errors have no common class
        remedy = (
            "give a folder that save_pretrained wrote, a tokenizer.json file, or 'bpe'"
            if local
            else "check the name and the connection, or give a local folder or tokenizer.json file, or 'bpe'"
        )
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"tokenizer={spec!r} cannot be loaded ({reason[0]}); {remedy}.") from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not tokenizer.is_fast:
        raise UserError(
            f"tokenizer={spec!r} has no fast (Rust) version, which encoding a corpus needs; give one that has a "
            "tokenizer.json, or 'bpe'."
        )
    if tokenizer.eos_token_id is None:
        if tokenizer.get_vocab().get(END_OF_TEXT) is None:
            raise UserError(
                f"tokenizer={spec!r} declares no end of text and has no {END_OF_TEXT} in its vocabulary, so "
                "documents cannot be separated; set eos_token in its tokenizer_config.json, or give another one."
            )
        tokenizer.eos_token = END_OF_TEXT
    return tokenizer
