"""What JSON can write and no tokenizer can read."""

from __future__ import annotations


def broken_character(text: str) -> str:
    """What is wrong with a ``text`` that has half of a surrogate pair, in words; empty where nothing is."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"has half of a character at place {error.start + 1}, {text[error.start]!r}"
    return ""
