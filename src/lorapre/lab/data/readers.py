"""From one file on disk to the documents in it.

Plain text, JSON lines and Parquet, each bare or compressed. Everything is read as a stream: memory holds one
document of plain text, one line of JSON or one batch of Parquet rows at a time (a compressed Parquet file is
first unpacked into an unnamed temporary file, since Parquet is read from its end).
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from lorapre.lab.errors import UserError
from lorapre.lab.text import half_pair

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

SEPARATOR = "<|endoftext|>"
# Not lzma.open and bz2.open, which end without a word where a second stream of the file is damaged, nor
# zstandard.open, which takes a truncated file for a complete one.
_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".xz": lzma.LZMADecompressor,
    ".bz2": bz2.BZ2Decompressor,
    ".zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
}
COMPRESSIONS = (*_DECOMPRESSORS, ".gz")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 18
_PACKED = 1 << 14  # a thousand times as much may come out of it
_PARQUET_ROWS = 1024
_CORRUPT = (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)


def inner_suffix(path: Path) -> str:
    """The suffix that tells the format, below that of the compression: `.jsonl` for `a.JSONL.gz`."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSIONS else suffix


def read_documents(path: Path, text_field: str) -> Iterator[str]:
    """Yield the documents of `path` in order, none of them empty or only white space.

    `text_field` names the field of JSON lines and the column of Parquet.
    Raises UserError that names the file, and the place in it, for anything that cannot be read as text.
    """
    suffix = inner_suffix(path)
    try:
        with _open(path) as stream:
            if suffix in JSON_SUFFIXES:
                texts = _json_lines(stream, path, text_field)
            elif suffix == ".parquet":
                texts = _parquet(stream, path, text_field)
            else:
                texts = _plain_text(stream, path)
            for text in texts:
                if text and not text.isspace():
                    yield text
    except _CORRUPT as error:
        raise UserError(
            f"{path} is damaged and cannot be unpacked ({_say(error)}); copy or download it again, "
            "or leave it out of the data."
        ) from error
    except OSError as error:
        # bz2 reports damage as a bare OSError without an errno.
        what = "cannot be read" if error.errno else "is damaged and cannot be unpacked"
        raise UserError(
            f"{path} {what} ({_say(error)}); repair it or its permissions, or leave it out of the data."
        ) from error


def decode(raw: bytes, path: Path, start: int) -> str:
    """UTF-8 text of `raw`, which begins at byte `start` of the (unpacked) file `path`; UserError if it is not."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not valid UTF-8: byte 0x{raw[error.start]:02x} at offset {start + error.start:,} "
            f"({error.reason}); convert the file, for instance with `iconv -f {_guess(raw, start)} -t utf-8`, "
            "or leave it out of the data."
        ) from error


def _guess(raw: bytes, start: int) -> str:
    """What text that is not UTF-8 is most likely: UTF-16 by its byte order mark, else of one byte a character."""
    return "utf-16" if start == 0 and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "latin1"


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


class _Unpacked(io.RawIOBase):
    """The bytes of all streams (frames) of a compressed file; what follows them and is none of them is an error."""

    def __init__(self, source: BinaryIO, new: Callable[[], Any]) -> None:
        self._source = source
        self._new = new
        self._stream = new()
        self._fed = False  # whether the current stream has been given any input
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        while not self._ready:
            packed = b""
            if self._stream.eof:
                packed = self._stream.unused_data
                self._stream = self._new()
                self._fed = False
            packed = packed or self._source.read(_PACKED)
            if not packed:
                if self._fed:
                    raise EOFError("the file ends inside a compressed stream")
                return 0
            if not self._fed and self._new is lzma.LZMADecompressor:
                packed = packed.lstrip(b"\0")  # padding between streams, and behind the last
            if packed:
                self._fed = True
                self._ready = self._stream.decompress(packed)
        count = min(len(view), len(self._ready))
        view[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """The unpacked bytes of `path` as a buffered stream."""
    suffix = path.suffix.lower()
    with path.open("rb") as raw:
        if suffix in COMPRESSIONS and not raw.peek(1):
            raise EOFError("the file is empty, which no compressed file is")
        if suffix in _DECOMPRESSORS:
            yield _buffered(_Unpacked(raw, _DECOMPRESSORS[suffix]))
        elif suffix == ".gz":
            with gzip.open(raw) as unpacked:
                yield _buffered(unpacked)
        else:
            yield raw


def _buffered(stream: object) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, stream), _CHUNK))


def _plain_text(stream: BinaryIO, path: Path) -> Iterator[str]:
    """Documents that lines of exactly `<|endoftext|>` end, or the whole file where there is no such line.

    The line break before the separator belongs to the separator, not to the document.
    """
    separator = SEPARATOR.encode()
    lines: list[bytes] = []
    start = offset = 0
    for line in stream:
        if offset == 0 and line.startswith(_BOM):
            line = line[len(_BOM) :]
            start = offset = len(_BOM)
        offset += len(line)
        if line.startswith(separator) and line in (separator, separator + b"\n", separator + b"\r\n"):
            document = b"".join(lines)
            newline = b"\r\n" if line.endswith(b"\r\n") and document.endswith(b"\r\n") else b"\n"
            yield decode(document.removesuffix(newline), path, start)
            lines = []
            start = offset
        else:
            lines.append(line)
    yield decode(b"".join(lines), path, start)


def _json_lines(stream: BinaryIO, path: Path, text_field: str) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(stream, start=1):
        text = decode(line, path, offset)
        offset += len(line)
        if number == 1:
            text = text.removeprefix("\ufeff")
        if text.isspace():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:  # a ValueError alone: a whole number of too many digits
            raise UserError(
                f"{path}, line {number:,}: not valid JSON ({error}); the file must hold one JSON object a line: "
                "correct the line, or give the file the suffix .txt if it is plain text."
            ) from error
        if not isinstance(record, dict):
            raise UserError(
                f"{path}, line {number:,}: holds a JSON {type(record).__name__}, not an object; the file must hold "
                f'one object a line, such as {{"{text_field}": "..."}}.'
            )
        if text_field not in record:
            raise UserError(
                f"{path}, line {number:,}: has no field {text_field!r}, only {_names(record)}; name the field that "
                "holds the text with text_field, or correct the line."
            )
        yield check_text(record[text_field], f"{path}, line {number:,}: field {text_field!r}")


def _parquet(stream: BinaryIO, path: Path, text_field: str) -> Iterator[str]:
    with tempfile.TemporaryFile() as unpacked:
        if path.suffix.lower() in COMPRESSIONS:
            shutil.copyfileobj(stream, unpacked)
            unpacked.seek(0)
            stream = cast(BinaryIO, unpacked)
        row = 0
        try:
            table = pq.ParquetFile(stream)
            columns = list(table.schema_arrow.names)
            if text_field not in columns:
                raise UserError(
                    f"{path} has no column {text_field!r}, only {_names(columns)}; name the column that holds the "
                    "text with text_field."
                )
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_field]):
                for value in batch.column(0):
                    row += 1
                    yield check_text(value.as_py(), f"{path}, row {row:,}: column {text_field!r}")
        except pa.ArrowException as error:
            raise UserError(
                f"{path} is damaged or no Parquet file ({_say(error)}); copy or download it again, or leave it out "
                "of the data."
            ) from error
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}, row {row:,}: column {text_field!r} is not valid UTF-8 (byte offset {error.start:,} of "
                "the value); write the file again with UTF-8 strings, or leave it out of the data."
            ) from error


def check_text(value: object, where: str) -> str:
    """`value` if it is a string that UTF-8 can hold; else UserError that begins with `where`."""
    if not isinstance(value, str):
        raise UserError(
            f"{where} holds {'null' if value is None else type(value).__name__}, not a string; remove that record, "
            "or name another field with text_field."
        )
    if (place := half_pair(value)) is not None:
        raise UserError(
            f"{where} holds half a surrogate pair ({value[place]!a} at character {place:,}), which no UTF-8 text can "
            "hold; correct or remove that record."
        )
    return value


def _names(fields: object) -> str:
    return ", ".join(repr(name) for name in cast("list[str]", fields)) or "no field at all"
