"""What a completion answers, and whether that is the right answer: math-verify on a marked piece of the text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from math_verify import parse, verify

from lorapre.lab.evaluate.tasks import Marking

_BOX = "\\boxed"

#: A number and the words of its unit; to LaTeX each letter would be a factor.
_QUANTITY = re.compile(r"([-+]?\$?[0-9][0-9.,/]*%?) +[A-Za-z]{2,}[A-Za-z ]*")


@dataclass(frozen=True)
class Score:
    """The verdict on one completion.

    Attributes:
        answer: the text that was read as the answer; None where there is none.
        rule: how it was found: ``hashes``, ``boxed``, or ``text`` (math-verify's search of the whole completion).
        correct: whether it equals the gold answer.
    """

    answer: str | None
    rule: str | None
    correct: bool


def after_hashes(completion: str) -> str | None:
    """What follows the first ``#### `` on its line, without a final full stop."""
    _, marker, rest = completion.partition("#### ")
    return (rest.partition("\n")[0].strip().rstrip(".").rstrip() or None) if marker else None


def last_box(completion: str) -> str | None:
    """The content of the last ``\\boxed{...}`` whose braces close; escaped braces do not count."""
    start = completion.rfind(_BOX + "{")
    while start >= 0:
        begin = start + len(_BOX) + 1
        depth, place = 1, begin
        while place < len(completion) and depth:
            if completion[place] == "\\":
                place += 1
            elif completion[place] in "{}":
                depth += 1 if completion[place] == "{" else -1
            place += 1
        if not depth:
            return completion[begin : place - 1].strip().rstrip(".").rstrip() or None
        start = completion.rfind(_BOX + "{", 0, start)
    return None


def score(completion: str, gold: str, marking: Marking) -> Score:
    """Find the answer of ``completion`` and compare it with ``gold``, as math-verify does.

    The answer is what the task's marking encloses; without a mark of this kind, one of the other kind, and else what
    math-verify finds in the text (a phrase such as "the answer is", else the last expression).
    Equal up to value: 0.5 and 1/2, 1,234 and 1234, 50% and either 50 or 0.5, numbers rounded to six digits.
    """
    found = {"hashes": after_hashes(completion), "boxed": last_box(completion)}
    for rule in sorted(found, key=lambda kind: kind != marking):
        answer = found[rule]
        if answer is not None:
            return Score(answer, rule, equal(gold, answer))
    parsed = parse(completion)
    if not parsed:
        return Score(None, None, False)
    return Score(str(parsed[-1]), "text", bool(verify(_parsed(gold), parsed)))


def equal(gold: str, answer: str) -> bool:
    """Whether two answers, numbers or LaTeX without its dollars, are the same; the same text always is."""
    return gold == answer or bool(verify(_parsed(gold), _parsed(answer)))


def _parsed(answer: str) -> list[Any]:
    """What math-verify makes of an answer; the words after a number (18 dollars) are a unit, and left out."""
    quantity = _QUANTITY.fullmatch(answer)
    parsed: list[Any] = parse(f"{_BOX}{{{quantity[1] if quantity else answer}}}")
    return parsed
