"""Documents streamed from a dataset of the Hugging Face hub, or from a local folder that looks like one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets

from lorapre.lab.data.readers import check_text
from lorapre.lab.data.sources import HUB_PREFIX
from lorapre.lab.errors import UserError

# Of a dataset without a validation or test split, this many documents at the beginning are for validation.
HELD_OUT_DOCUMENTS = 1000
_READ_AT_ONCE = 64


@dataclass(frozen=True)
class DocumentStream:
    """One split of a dataset, read as it arrives.

    dataset: a `datasets.IterableDataset`.
    skip: records at its beginning that are not part of this stream; take: how many are after them, None for all.
    where: names the stream in error messages.
    """

    dataset: Any
    skip: int
    take: int | None
    text_field: str
    where: str

    def documents(self) -> Iterator[str]:
        """Its documents in the dataset's own order, none empty; UserError where the dataset cannot be read."""
        stop = None if self.take is None else self.skip + self.take
        try:
            for text in islice(self.records(self.dataset), self.skip, stop):
                if usable(text):
                    yield text
        except UserError:
            raise
        except Exception as error:  # hub, network, file and format errors have no common class
            raise UserError(
                f"{self.where} cannot be read ({first_line(error)}); check the connection and the dataset, or give "
                "'stdlib' or files that are on this machine."
            ) from error

    def records(self, dataset: Any) -> Iterator[str]:
        """The text of every record of `dataset`, a form of the same dataset, also of those to be skipped.

        Reads through `iter`, which knows nothing of DataLoader workers, where plain iteration would deal out
        the files of the dataset among them and leave some workers without any.
        """
        place = f"{self.where}: field {self.text_field!r} of a record"
        for batch in dataset.iter(batch_size=_READ_AT_ONCE):
            if self.text_field not in batch:
                raise UserError(
                    f"{self.where} has no field {self.text_field!r}, only {', '.join(map(repr, batch))}; name the "
                    "field that holds the text with text_field."
                )
            for value in batch[self.text_field]:
                yield check_text(value, place)


@dataclass(frozen=True)
class HubData:
    """The two sides of `hf:...`; `valid_split` names the split that `valid` reads, `identity` serves cache keys."""

    train: DocumentStream
    valid: DocumentStream
    valid_split: str
    identity: list[object]
    label: str


def usable(text: str) -> bool:
    return bool(text) and not text.isspace()


def first_line(error: Exception) -> str:
    return " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]])


def open_hub(entry: str, text_field: str, *, explicit_valid: bool) -> HubData:
    """Open `hf:<dataset>[:config]` for streaming.

    Validation reads the split `validation`, else `test`, else the first HELD_OUT_DOCUMENTS records of `train`,
    which training then skips (it skips none with `explicit_valid`: the caller has other documents).
    Raises UserError where the dataset cannot be opened or has no split `train`.
    """
    name, _, config = entry.removeprefix(HUB_PREFIX).partition(":")
    if not name:
        raise UserError(f"data={entry!r} names no dataset; write 'hf:<dataset>' or 'hf:<dataset>:<config>'.")
    try:
        builder = datasets.load_dataset_builder(str(Path(name).expanduser()), config or None)
        splits = builder.as_streaming_dataset()
    except Exception as error:  # hub, network, file and format errors have no common class
        raise UserError(
            f"data={entry!r} cannot be opened ({first_line(error)}); check the name, the config after "
            "the second colon and the connection, or give 'stdlib' or files that are on this machine."
        ) from error
    if "train" not in splits:
        raise UserError(
            f"data={entry!r} has no split 'train', only {', '.join(map(repr, splits))}; give a dataset that has "
            "one, or download its files and name them."
        )
    valid_split = next((split for split in ("validation", "test") if split in splits), "train")
    held_out = HELD_OUT_DOCUMENTS if valid_split == "train" and not explicit_valid else None
    skip = held_out or 0
    return HubData(
        DocumentStream(splits["train"], skip, None, text_field, f"data={entry!r}, split 'train'"),
        DocumentStream(splits[valid_split], 0, held_out, text_field, f"data={entry!r}, split {valid_split!r}"),
        valid_split,
        [HUB_PREFIX, name, config, builder.hash, valid_split, skip, text_field],
        name + (f":{config}" if config else ""),
    )
