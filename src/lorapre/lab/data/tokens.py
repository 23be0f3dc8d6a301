"""Token files on disk, and the blocks that a model is trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib import format as npy
from torch.utils.data import Dataset

from lorapre.lab.data.cache import Cache
from lorapre.lab.data.encode import Encoder, batches
from lorapre.lab.data.split import Side
from lorapre.lab.errors import UserError

TokenArray = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class TokenFiles:
    """A cache entry: the tokens of both sides; `train` is None for a stream, which keeps none."""

    train: Path | None
    valid: Path
    max_token_id: int
    description: str


def read_token_files(cache: Cache, key: str) -> TokenFiles | None:
    """The entry `key`; None where it is missing, incomplete or not of the recorded sizes: then write it again."""
    record = cache.read_json(f"tokens-{key}.json")
    if record is None:
        return None
    paths: dict[str, Path] = {}
    for side, size in record["bytes"].items():
        path = paths[side] = cache.path(_file_name(key, side))
        if not path.is_file() or path.stat().st_size != size:
            return None
    return TokenFiles(paths.get("train"), paths["valid"], record["max_token_id"], record["description"])


def write_token_files(
    cache: Cache, key: str, documents: Iterable[tuple[Side, str]], encoder: Encoder, description: str
) -> TokenFiles:
    """Encode `documents` into the entry `key`, a batch at a time, and return it. Each side must have a document.

    The record is written last: a process that dies before leaves no entry.
    """
    arrays = (
        (side, ids)
        for group in batches(documents)
        for (side, _), ids in zip(group, encoder.encode([text for _, text in group]), strict=True)
    )
    return store_tokens(cache, key, arrays, ("train", "valid"), encoder.dtype, description)


def store_tokens(
    cache: Cache,
    key: str,
    arrays: Iterable[tuple[Side, TokenArray]],
    sides: tuple[Side, ...],
    dtype: np.dtype[Any],
    description: str,
) -> TokenFiles:
    """Write flat arrays of ids, each to the file of its side."""
    with ExitStack() as stack:
        writers = {side: stack.enter_context(_writer(cache, _file_name(key, side), dtype)) for side in sides}
        for side, ids in arrays:
            writers[side].add(ids)
    largest = max(writer.largest for writer in writers.values())
    record = {
        "bytes": {side: writer.file_bytes for side, writer in writers.items()},
        "tokens": {side: writer.count for side, writer in writers.items()},
        "max_token_id": largest,
        "description": description,
    }
    cache.write_json(f"tokens-{key}.json", record)
    paths = {side: cache.path(_file_name(key, side)) for side in sides}
    return TokenFiles(paths.get("train"), paths["valid"], largest, description)


def open_tokens(path: Path) -> TokenArray:
    """The tokens of `path` as a read-only memory map, shape (tokens,)."""
    tokens: TokenArray = np.load(path, mmap_mode="r", allow_pickle=False)
    return tokens


def _file_name(key: str, side: str) -> str:
    return f"tokens-{key}-{side}.npy"


@dataclass
class _Writer:
    file: BinaryIO
    dtype: np.dtype[Any]
    count: int = 0
    largest: int = 0
    file_bytes: int = field(default=0)

    def add(self, ids: TokenArray) -> None:
        self.file.write(ids.astype(self.dtype, copy=False).tobytes())
        self.count += len(ids)
        self.largest = max(self.largest, int(ids.max(initial=0)))

    def header(self) -> None:
        # numpy pads the header so that the first axis can grow: its length is the same before and after.
        npy.write_array_header_1_0(
            self.file,
            {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.count,)},
        )


@contextmanager
def _writer(cache: Cache, name: str, dtype: np.dtype[Any]) -> Iterator[_Writer]:
    with cache.write(name) as file:
        writer = _Writer(file, dtype)
        writer.header()
        yield writer
        writer.file_bytes = file.tell()
        file.seek(0)
        writer.header()


class BlockDataset(Dataset[dict[str, torch.Tensor]]):
    """Consecutive blocks of a token file: item i is tokens[i * L : (i + 1) * L], as inputs and as labels.

    Items are `{"input_ids": int64 (L,), "labels": int64 (L,)}`, equal in value: a causal model shifts the labels
    itself. What does not fill a block at the end is not used. Pickles as the file's name, without the tokens.

    path: a `.npy` file of ids, shape (tokens,).
    sequence_length: L, the tokens of a block.
    max_tokens: use no more than this many tokens from the beginning; None for all.
    what: what the tokens are, for the error message.
    Raises UserError where there are too few tokens for one block.
    """

    def __init__(self, path: Path, sequence_length: int, *, max_tokens: int | None = None, what: str = "data") -> None:
        self.path = path
        self.sequence_length = sequence_length
        self._tokens = open_tokens(path)
        available = len(self._tokens)
        usable = available if max_tokens is None else min(available, max_tokens)
        self._blocks = usable // sequence_length
        if self._blocks == 0:
            limit = "" if usable == available else f", of which {usable:,} may be used (max_valid_tokens)"
            raise UserError(
                f"{what} has {available:,} tokens{limit}, too few for one block of sequence_length="
                f"{sequence_length:,}; give more text or a smaller sequence_length."
            )

    def __len__(self) -> int:
        return self._blocks

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -self._blocks <= index < self._blocks:
            raise IndexError(f"block {index} of {self._blocks}")
        start = index % self._blocks * self.sequence_length
        block = torch.from_numpy(self._tokens[start : start + self.sequence_length].astype(np.int64))
        return {"input_ids": block, "labels": block.clone()}

    @property
    def tokens(self) -> TokenArray:
        """The tokens of all whole blocks, read-only, shape (len(self) * L,)."""
        return self._tokens[: self._blocks * self.sequence_length]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_tokens"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tokens = open_tokens(self.path)
