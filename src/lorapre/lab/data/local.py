"""Documents on this machine, divided into those to train on and those to validate on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

from lorapre.lab.data.sources import Source, StandardLibrary, TextFiles, check_disjoint, find_files
from lorapre.lab.data.split import Side, Split, split_documents
from lorapre.lab.errors import UserError


class LocalDocuments:
    """A source and the rule that divides it, or two sources.

    source: what `data` names. valid: what `valid_data` names, None where `valid_fraction` of `source` is held
    out instead. status: receives a line when reading begins.
    """

    def __init__(
        self, source: Source, valid: TextFiles | None, valid_fraction: float, status: Callable[[str], None]
    ) -> None:
        self._source = source
        self._valid = valid
        self._valid_fraction = valid_fraction
        self._status = status

    def identity(self) -> list[object]:
        """What decides which documents are on which side; reads none of them."""
        rule: list[object] = ["fraction", self._valid_fraction]
        return [self._source.identity(), self._valid.identity() if self._valid else rule]

    @cached_property
    def _split(self) -> Split:
        self._status(f"reading {self._source.label}")
        return split_documents(self._source.documents(), self._valid_fraction)

    @cached_property
    def _totals(self) -> tuple[int, int]:
        """Documents that `data` names, and their UTF-8 bytes."""
        if self._valid is None:
            return self._split.documents, self._split.utf8_bytes
        self._status(f"reading {self._source.label}")
        documents = utf8_bytes = 0
        for text in self._source.documents():
            documents += 1
            utf8_bytes += len(text.encode("utf-8"))
        if not documents:
            raise UserError(
                f"data ({self._source.label}) holds no text: every document is empty; give files with text."
            )
        return documents, utf8_bytes

    def sides(self) -> Iterator[tuple[Side, str]]:
        """Every document with its side. Raises UserError where `valid_data` holds no text."""
        if self._valid is None:
            yield from self._split.apply(self._source.documents())
            return
        for text in self._source.documents():
            yield "train", text
        empty = True
        for text in self._valid.documents():
            empty = False
            yield "valid", text
        if empty:
            raise UserError(
                f"valid_data ({self._valid.label}) holds no text: every document is empty; give files with text."
            )

    def train(self) -> Iterator[str]:
        if self._valid is None:
            return (text for side, text in self.sides() if side == "train")
        return self._source.documents()

    def utf8_bytes(self) -> int:
        """Of all that `data` names."""
        return self._totals[1]

    def description(self) -> str:
        (documents, utf8_bytes), remark = self._totals, self._source.remark
        facts = f"{documents:,} document{'' if documents == 1 else 's'}, {megabytes(utf8_bytes)}"
        valid = f", validated on {self._valid.label}" if self._valid else ""
        return f"{self._source.label} ({facts}{'; ' if remark else ''}{remark}){valid}"


def megabytes(utf8_bytes: int) -> str:
    return f"{utf8_bytes / 1e6:,.1f} MB" if utf8_bytes >= 100_000 else f"{utf8_bytes / 1e3:,.1f} kB"


def open_local(
    data: Sequence[str],
    *,
    text_field: str,
    valid_data: Sequence[str],
    valid_fraction: float,
    status: Callable[[str], None],
) -> LocalDocuments:
    """Find what `data` (`["stdlib"]`, or files, folders and globs) and `valid_data` name, without reading it."""
    source: Source = StandardLibrary() if list(data) == ["stdlib"] else find_files(data, text_field, "data")
    valid = find_files(valid_data, text_field, "valid_data") if valid_data else None
    if valid is not None and isinstance(source, TextFiles):
        check_disjoint(source, valid)
    return LocalDocuments(source, valid, valid_fraction, status)
