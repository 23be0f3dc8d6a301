"""From text to token ids."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import tokenizers
from transformers import PreTrainedTokenizerBase

from lorapre.lab.errors import UserError

_PIECE_CHARACTERS = 1_000_000
_BATCH_CHARACTERS = 4_000_000
_BATCH_DOCUMENTS = 4096
# A single space between two words: every pre-tokenizer in use starts a new token there.
_SAFE_CUT = re.compile(r"(?<=\S) (?=\S)")

T = TypeVar("T")


def pieces(text: str, length: int = _PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a long `text` into parts of about `length` characters, so that memory holds the tokens of a part.

    Cuts come before single spaces only, where byte-level BPE and the usual SentencePiece models give the tokens
    that they give for the whole. A text without such a space beyond `length` is not cut.
    """
    start = 0
    while len(text) - start > length and (cut := _SAFE_CUT.search(text, start + length)):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:] if start else text


def batches(items: Iterable[tuple[T, str]]) -> Iterator[list[tuple[T, str]]]:
    """Group labelled texts so that a group is worth encoding in parallel and yet fits in memory."""
    group: list[tuple[T, str]] = []
    characters = 0
    for item in items:
        group.append(item)
        characters += len(item[1])
        if characters >= _BATCH_CHARACTERS or len(group) >= _BATCH_DOCUMENTS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def id_count(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id of `tokenizer`; `len` of it is less where its vocabulary has gaps."""
    return 1 + max(tokenizer.get_vocab().values())


class Encoder:
    """Encodes documents, each followed by the end of text and by no other special token.

    What looks like a special token inside a text is encoded as the characters it is made of, so that no text
    can end its own document. `tokenizer` is not changed and its truncation and padding are not used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.no_truncation()
        backend.no_padding()
        self.serialized = backend.to_str()
        backend.encode_special_tokens = True
        self._backend = backend
        self.end = int(tokenizer.eos_token_id)
        self.vocabulary = id_count(tokenizer)

    @property
    def dtype(self) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
        """The smallest of uint16 and uint32 that holds every id."""
        return np.dtype(np.uint16) if self.vocabulary <= 1 << 16 else np.dtype(np.uint32)

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.unsignedinteger]]:
        """One flat array of ids for each text, the end of text included.

        Raises UserError where the tokenizer has neither a token for what it meets nor one for the unknown.
        """
        parts = [(index, piece) for index, text in enumerate(texts) for piece in pieces(text)]
        encoded: list[list[npt.NDArray[np.unsignedinteger]]] = [[] for _ in texts]
        for group in batches(parts):
            try:
                encodings = self._backend.encode_batch_fast([piece for _, piece in group], add_special_tokens=False)
            except Exception as error:  # the Rust side raises bare Exception
                raise UserError(
                    f"the tokenizer cannot encode the data ({error}); give one that has an unknown token or knows all "
                    "bytes, such as 'bpe'."
                ) from error
            for (index, _), encoding in zip(group, encodings, strict=True):
                encoded[index].append(np.array(encoding.ids, dtype=self.dtype))
        end = np.array([self.end], dtype=self.dtype)
        return [np.concatenate([*arrays, end]) for arrays in encoded]
