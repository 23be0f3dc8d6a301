"""A small corpus for the tests of the data layer."""

from __future__ import annotations

from pathlib import Path

from lorapre.lab.data import TextCorpus, load_corpus

DOCUMENTS = [f"Document {n} holds the square {n * n} and <|endoftext|> within a line.\nEnd of {n}." for n in range(300)]


def load(*data: Path | str, **settings: object) -> TextCorpus:
    defaults: dict[str, object] = {"tokenizer": "bpe:300", "sequence_length": 16}
    return load_corpus([str(entry) for entry in data], **(defaults | settings))  # type: ignore[arg-type]
