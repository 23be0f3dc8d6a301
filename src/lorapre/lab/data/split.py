"""Which documents are held out for validation: decided by their content alone."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lorapre.lab.errors import UserError

Side = Literal["train", "valid"]
_HASH_RANGE = 1 << 64


def content_hash(text: str) -> int:
    """64 bits of `text`, the same on every machine and in every order of documents."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Split:
    """The rule that `split_documents` found, and the size of what it looked at.

    threshold: documents whose hash is below it are held out. Unused where `cut_fraction` is set.
    cut_fraction: set where all documents are one and the same text: that share of its end is held out.
    documents, utf8_bytes: of the whole, both sides together.
    """

    threshold: int
    cut_fraction: float | None
    documents: int
    utf8_bytes: int

    def sides(self, text: str) -> list[tuple[Side, str]]:
        """`text` with the side it is on; for a cut document its two parts."""
        if self.cut_fraction is not None:
            position = _cut_position(text, self.cut_fraction)
            return [("train", text[:position]), ("valid", text[position:])]
        return [("valid" if content_hash(text) < self.threshold else "train", text)]

    def apply(self, documents: Iterable[str]) -> Iterator[tuple[Side, str]]:
        for text in documents:
            yield from self.sides(text)


def split_documents(documents: Iterable[str], valid_fraction: float) -> Split:
    """Find the rule that holds out about `valid_fraction` (between 0 and 1) of `documents`, at least one.

    One pass; memory holds 8 bytes a document. A document is held out when the hash of its text is small, so
    that the answer does not depend on order, seed or machine, exact copies stay together, and adding documents
    moves none of the others (as long as both sides have one anyway).
    Raises UserError where there is no document, or a single one too short to cut.
    """
    count = total = 0
    hashes = array("Q")
    first = ""
    for text in documents:
        first = first or text
        count += 1
        total += len(text.encode("utf-8"))
        hashes.append(content_hash(text))
    if not hashes:
        raise UserError("data holds no text: every document is empty; give files with text in them.")
    ordered = np.unique(np.frombuffer(hashes, dtype=np.uint64))
    if len(ordered) == 1:
        if len(first) < 2:
            raise UserError(
                f"data holds a single document of {len(first)} character, which cannot be divided into a part to "
                "train on and one to validate on; give more text, or valid_data."
            )
        return Split(0, valid_fraction, count, total)
    threshold = int(valid_fraction * _HASH_RANGE)
    # At least one distinct text on each side: the smallest hash is always out, the largest never.
    threshold = min(max(threshold, int(ordered[0]) + 1), int(ordered[-1]))
    return Split(threshold, None, count, total)


def _cut_position(text: str, fraction: float) -> int:
    """Where to cut so that about `fraction` of the characters follow: after a line break where there is one.

    The last break at or before the ideal place, else the first one after it, else the ideal place itself.
    The result is at least 1 and at most len(text) - 1.
    """
    ideal = min(max(round(len(text) * (1 - fraction)), 1), len(text) - 1)
    before = text.rfind("\n", 0, ideal) + 1
    if before:
        return before
    after = text.find("\n", ideal, len(text) - 1) + 1
    return after or ideal
