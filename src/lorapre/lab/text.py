"""What JSON can write and no tokenizer can read."""

from __future__ import annotations


def half_pair(text: str) -> int | None:
    """Where ``text`` has half of a surrogate pair, which UTF-8 cannot hold; None where it has none."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return error.start
    return None


def broken_character(text: str) -> str:
    """What is wrong with a ``text`` that has half of a surrogate pair, in words; empty where nothing is."""
    place = half_pair(text)
    return "" if place is None else f"has half of a character at place {place + 1}, {text[place]!r}"
