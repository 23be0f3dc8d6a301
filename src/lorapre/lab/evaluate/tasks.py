"""Sets of mathematical questions: where they are, what their records must hold, how a model is asked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets

from lorapre.lab.errors import UserError
from lorapre.lab.text import broken_character

#: How an answer is written: after ``#### ``, or in the last ``\boxed{...}``.
Marking = Literal["hashes", "boxed"]


@dataclass(frozen=True)
class Item:
    """One question. ``record`` is as it was read; ``labels`` are what summaries group by."""

    id: str
    question: str
    gold: str
    record: Mapping[str, Any]
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A set of questions.

    Attributes:
        name: what ``--tasks`` takes.
        hub: dataset, configuration and split on the Hugging Face hub.
        fields: what every record must hold, as non-empty text.
        item: makes an item of a record that has passed, at a position that counts from 0.
        marking: how answers are written.
        prompt: for a model that only completes text, with ``{question}``.
        stop: what ends an answer to ``prompt``: the model begins the next question.
    """

    name: str
    hub: tuple[str, str, str]
    fields: tuple[str, ...]
    item: Callable[[Mapping[str, Any], int], Item]
    marking: Marking
    prompt: str
    stop: tuple[str, ...]


def _gsm8k_item(record: Mapping[str, Any], position: int) -> Item:
    _, marker, gold = record["answer"].rpartition("#### ")
    if not marker or not re.fullmatch(r"-?([0-9][0-9,]*(\.[0-9]+)?|\.[0-9]+)", gold.strip()):
        raise ValueError("its 'answer' does not end in '#### ' and a number")
    return Item(str(position), record["question"], gold.strip().replace(",", ""), record)


def _math500_item(record: Mapping[str, Any], position: int) -> Item:
    labels = {"subject": record["subject"], "level": str(record["level"])}
    return Item(record["unique_id"], record["problem"], record["answer"].strip(), record, labels)


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            "gsm8k",
            ("openai/gsm8k", "main", "test"),
            ("question", "answer"),
            _gsm8k_item,
            "hashes",
            "Question: {question}\nAnswer:",
            ("Question:",),
        ),
        Task(
            "math500",
            ("HuggingFaceH4/MATH-500", "default", "test"),
            ("problem", "solution", "answer", "subject", "level", "unique_id"),
            _math500_item,
            "boxed",
            "Problem:\n{question}\n\nSolution:",
            ("Problem:",),
        ),
    )
}


def read_items(task: Task, path: str | None, limit: int | None) -> list[Item]:
    """The first ``limit`` items of a task, from a ``.jsonl`` file in the original's format, or from the hub.

    Every record of the file is checked, beyond ``limit`` too.

    Raises:
        UserError: the data cannot be had, or a record is not as it should be; file and line are named.
    """
    records = _hub_records(task) if path is None else _file_records(Path(path), task)
    items: list[Item] = []
    seen: dict[str, str] = {}
    for where, record in records:
        item = _checked(task, record, len(items), where)
        if item.id in seen:
            raise UserError(f"{where}: its unique_id {item.id!r} is that of {seen[item.id]} too. Remove one of them.")
        seen[item.id] = where
        items.append(item)
    if not items:
        raise UserError(f"--data {path or task.hub[0]}: holds no record. Give a file that does.")
    return items[:limit]


def _checked(task: Task, record: Any, position: int, where: str) -> Item:
    format_is = f"A record of {task.name} is an object with {', '.join(task.fields)}."
    if not isinstance(record, dict):
        raise UserError(f"{where}: is a {type(record).__name__}, not an object. {format_is}")
    for name in task.fields:
        if name not in record:
            raise UserError(f"{where}: has no field {name!r}, only {', '.join(map(repr, record))}. {format_is}")
        value = record[name]
        number = name == "level" and isinstance(value, int) and not isinstance(value, bool)
        if not number and (not isinstance(value, str) or not value.strip()):
            shown = "is empty" if isinstance(value, str) else f"is {value!r}, not text"
            raise UserError(f"{where}: its field {name!r} {shown}. Correct it, or take the record out.")
        if isinstance(value, str) and (broken := broken_character(value)):
            raise UserError(f"{where}: its field {name!r} {broken}. Correct it, or take the record out.")
    try:
        return task.item(record, position)
    except ValueError as error:
        raise UserError(f"{where}: {error}. Correct it, or take the record out.") from None


def _file_records(path: Path, task: Task) -> Iterator[tuple[str, Any]]:
    if path.is_dir():
        raise UserError(f"--data {path}: is a folder. Give one .jsonl file with the records of {task.name}.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"--data {path}: cannot be read ({error.strerror}). Give an existing .jsonl file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--data {path}: is not UTF-8 text (byte {error.start}). Give a .jsonl file.") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"--data {path}, line {number}"
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where}: is not valid JSON ({error.msg}, column {error.colno}), as a line that was cut short. Each "
                "line is one whole record; copy the file again."
            ) from None
        except RecursionError:
            raise UserError(f"{where}: is nested too deeply to be read. Take the line out.") from None


def _hub_records(task: Task) -> Iterable[tuple[str, Any]]:
    name, config, split = task.hub
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # hub, network, file and format errors have no common class
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"--tasks {task.name}: {name} cannot be loaded from the hub ({reason}). Check the connection, or give its "
            f"records as a file: --data {task.name}=FILE.jsonl."
        ) from error
    return ((f"{name}, split {split!r}, record {number}", row) for number, row in enumerate(rows, 1))
