"""From ``--data`` to examples for training and, apart from them, for validation."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from lorapre.lab.data.hub import first_line
from lorapre.lab.errors import UserError
from lorapre.lab.finetune.config import ARITHMETIC, FinetuneConfig
from lorapre.lab.finetune.formats import FORMATS, OWN, Example, Format, read_examples
from lorapre.lab.finetune.records import Record, expand_files, read_records
from lorapre.lab.finetune.tiny import additions


@dataclass(frozen=True)
class Examples:
    """Both sides of the data.

    Attributes:
        train: to learn.
        valid: held out.
        form: of the records.
        description: names both sides in reports.
        unanswered: records of the hub without an answer, which are left out.
    """

    train: list[Example]
    valid: list[Example]
    form: Format
    description: str
    unanswered: int = 0


def data_format(config: FinetuneConfig) -> Format:
    """What ``--data`` means; nothing is read but, for a file, whether it is there.

    Raises:
        UserError: it is neither a known format nor a file.
    """
    if config.data in FORMATS:
        return FORMATS[config.data]
    if config.data_files:
        raise UserError(
            f"--data {config.data}: --data-files needs the name of a format there, one of {', '.join(FORMATS)}. Give "
            "your own files with --data alone."
        )
    if config.data != ARITHMETIC:
        _own_files(config.data)
    return OWN


def _own_files(name: str) -> list[Path]:
    try:
        return expand_files([name], "--data")
    except UserError:
        if "." in Path(name).name or "*" in name:
            raise
        raise UserError(
            f"--data {name}: is neither a format ({', '.join(FORMATS)}), nor {ARITHMETIC}, nor a file."
        ) from None


def reads_hub(config: FinetuneConfig) -> bool:
    """Whether the examples come from the Hugging Face hub."""
    return config.data in FORMATS and not config.data_files


def load_examples(config: FinetuneConfig) -> Examples:
    """All examples, each checked.

    Without ``--valid-data`` (or, on the hub, a split for it) the held-out examples are those whose keys have the
    smallest hashes: the same whatever the order of the file, and a prompt that occurs twice is on one side alone.

    Raises:
        UserError: something in the data is wrong, or there is too little of it.
    """
    form = data_format(config)
    found, place, unanswered = _train_examples(config, form)
    if config.valid_data:
        valid = [example for path in expand_files(config.valid_data, "--valid-data") for example in _file(path, form)]
        train = found
    elif reads_hub(config) and form.valid_split is not None:
        valid, more = _hub(form, form.valid_split)
        train, unanswered = found, unanswered + more
    else:
        train, valid = _split(found, config, place)
    train = _ordered(train, f"train {config.seed}")[: config.max_examples]
    valid = _ordered(valid, "valid")[: config.valid_examples]
    if not train or not valid:
        side = "training" if not train else "validation"
        raise UserError(
            f"{place}: of {len(found)} examples none is left for {side}. Give more data, or hold fewer out with "
            "--valid-examples."
        )
    left_out = f", {unanswered:,} without an answer left out" if unanswered else ""
    description = f"{config.data} ({len(train):,} examples, {len(valid):,} held out{left_out})"
    return Examples(train, valid, form, description, unanswered)


def _train_examples(config: FinetuneConfig, form: Format) -> tuple[list[Example], str, int]:
    """The examples, where they are from, and how many records are left out."""
    if config.data == ARITHMETIC:
        return additions(), "--data arithmetic", 0
    if reads_hub(config):
        examples, unanswered = _hub(form, "train")
        return examples, f"--data {config.data}", unanswered
    option = "--data-files" if config.data_files else "--data"
    patterns = config.data_files or [config.data]
    examples = [example for path in expand_files(patterns, option) for example in _file(path, form)]
    return examples, f"{option} {' '.join(patterns)}", 0


def _file(path: Path, form: Format) -> list[Example]:
    examples = read_examples(read_records(path), form)
    if not examples:
        raise UserError(f"{path}: holds no example. Give a file with one object a line.")
    return examples


def _hub(form: Format, split: str) -> tuple[list[Example], int]:
    """The examples of a split, and how many of its records have no answer, which nobody here can fill in."""
    place = f"{form.repository}, split {split}"
    try:
        rows: Any = datasets.load_dataset(form.repository, form.configuration, split=split)
    except Exception as error:  # hub, network, file and format errors have no common class
        raise UserError(
            f"--data {form.name}: {place} cannot be loaded ({first_line(error)}). Check the connection, or give its "
            "files with --data-files."
        ) from error
    examples, unanswered = [], 0
    for record in _rows(rows, place):
        answer = record.fields.get(form.answer)
        if isinstance(answer, str) and not answer.strip():
            unanswered += 1
        else:
            examples.append(form.read(record))
    return examples, unanswered


def _rows(rows: Any, place: str) -> Iterator[Record]:
    for number, fields in enumerate(rows, start=1):
        yield Record(fields, f"{place}, row {number}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _ordered(examples: list[Example], salt: str) -> list[Example]:
    """In an order that ``salt`` and the examples decide, not the file."""
    return sorted(examples, key=lambda example: _digest(f"{salt}\n{json.dumps(example.messages)}"))


def _split(examples: list[Example], config: FinetuneConfig, place: str) -> tuple[list[Example], list[Example]]:
    """At most ``valid_examples`` and a tenth are held out, by whole keys: one that is too large for that is trained on.

    Raises:
        UserError: all keys are too large.
    """
    wanted = min(config.valid_examples, max(1, len(examples) // 10))
    counts = Counter(example.key for example in examples)
    rarest = min(counts.values(), default=0)
    if rarest > wanted:
        raise UserError(
            f"{place}: prompts repeat, each at least {rarest} times, so that none can be held out whole where {wanted} "
            f"of {len(examples)} examples may be. Give examples to validate on with --valid-data."
        )
    held = set()
    for key in sorted(counts, key=lambda key: _digest(f"held out\n{key}")):
        if counts[key] <= wanted:
            held.add(key)
            wanted -= counts[key]
    return (
        [example for example in examples if example.key not in held],
        [example for example in examples if example.key in held],
    )
