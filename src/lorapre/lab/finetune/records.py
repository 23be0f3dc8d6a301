"""Records of a file, each with its place in it: JSON lines, one JSON array, or Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lorapre.lab.errors import UserError

_SPACE = " \t\r\n"


@dataclass(frozen=True)
class Record:
    """One record; ``where`` names its file and line, or row of Parquet."""

    fields: Mapping[str, Any]
    where: str


def expand_files(patterns: list[str], option: str) -> list[Path]:
    """The files that paths and globs name, in order.

    Raises:
        UserError: one names none; ``option`` is the one to name in the message.
    """
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            raise UserError(f"{option} {pattern}: is a folder. Give its files, such as '{pattern}/*.jsonl'.")
        names = [path] if path.exists() else sorted(Path(name) for name in glob(str(path)))  # noqa: PTH207 (a pattern may be absolute)
        if not names:
            raise UserError(f"{option} {pattern}: there is no such file. Give an existing one, or a quoted glob.")
        found += names
    return found


def read_records(path: Path) -> Iterator[Record]:
    """All records of ``path`` in order; its suffix, or else its first character, tells the format.

    Raises:
        UserError: it cannot be read, or a record is no JSON object; the message names the line.
    """
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path)
            return
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Give a file that can.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 at byte {error.start}. Convert it, or leave it out.") from None
    except pa.ArrowException as error:
        raise UserError(f"{path}: is no valid Parquet file ({error}). Copy or download it again.") from None
    yield from (_array(path, text) if text.lstrip(_SPACE).startswith("[") else _lines(path, text))


def _lines(path: Path, text: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where}: is not valid JSON ({error.msg} at column {error.colno}): {_start(line)}. Complete or remove "
                "the line; each must hold one whole object."
            ) from None
        except RecursionError:
            raise UserError(f"{where}: is nested too deeply to be read. Remove the line.") from None
        yield _object(value, where)


def _array(path: Path, text: str) -> Iterator[Record]:
    """Element by element, so that each has its line."""
    decoder = json.JSONDecoder()
    position = _skip(text, text.index("[") + 1)
    line, counted = 1, 0
    while not text.startswith("]", position):
        line, counted = line + text.count("\n", counted, position), position
        where = f"{path}, line {line}"
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where}: an object of the array begins here, and is not valid JSON ({error.msg} at line "
                f"{error.lineno}). Complete or remove it."
            ) from None
        except RecursionError:
            raise UserError(
                f"{where}: an object of the array begins here, and is nested too deeply to be read. Remove it."
            ) from None
        yield _object(value, where)
        position = _skip(text, position)
        if text.startswith(",", position):
            position = _skip(text, position + 1)
        elif not text.startswith("]", position):
            raise UserError(f"{where}: no comma or ] follows the object that begins here. Is the file complete?")
    rest = _skip(text, position + 1)
    if rest < len(text):
        line = 1 + text.count("\n", 0, rest)
        raise UserError(
            f"{path}, line {line}: the array has ended, and something follows: {_start(text[rest:].splitlines()[0])}. "
            "Make it one array, or a file of JSON lines."
        )


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in _SPACE:
        position += 1
    return position


def _parquet(path: Path) -> Iterator[Record]:
    number = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(1024):
            for value in batch.to_pylist():
                number += 1
                yield Record(value, f"{path}, row {number}")


def _object(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise UserError(f'{where}: holds a {type(value).__name__}, not an object. Write one such as {{"prompt": ...}}.')
    return Record(value, where)


def _start(line: str) -> str:
    return repr(line if len(line) <= 60 else line[:57] + "...")
