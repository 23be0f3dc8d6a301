"""Accuracy over seeds and questions, and how far another choice of both might have led."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lorapre.lab.evaluate.intervals import wilson_interval

#: Of a normal distribution, 95 % within.
Z = 1.959964


@dataclass(frozen=True)
class Accuracy:
    """A mean, and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def accuracy(verdicts: Sequence[Sequence[bool]]) -> Accuracy:
    """Of verdicts (seeds, questions), the same questions for every seed.

    Of one seed Wilson's interval over the questions; of several, `standard_error` on either side. With three seeds
    their share of it rests on two degrees of freedom, and is rough.

    Raises:
        ValueError: there is no verdict, or seeds have answered different numbers of questions.
    """
    table = _table(verdicts)
    mean = float(table.mean())
    if len(table) == 1:
        return Accuracy(mean, *wilson_interval(int(table.sum()), table.shape[1]))
    half = Z * standard_error(table)
    return Accuracy(mean, max(0.0, mean - half), min(1.0, mean + half))


def difference(ours: Sequence[Sequence[bool]], theirs: Sequence[Sequence[bool]]) -> Accuracy:
    """Of our mean minus theirs, on the same questions: what makes a question hard for both cancels.

    Seeds are paired by their place, as both were given the same ones.

    Raises:
        ValueError: as `accuracy`.
    """
    one, other = _table(ours), _table(theirs)
    if one.shape[1] != other.shape[1]:
        raise ValueError(f"{one.shape[1]} questions cannot be compared with {other.shape[1]}.")
    seeds = min(len(one), len(other))
    table = one[:seeds] - other[:seeds]
    mean = float(table.mean())
    half = Z * standard_error(table)
    return Accuracy(mean, mean - half, mean + half)


def standard_error(table: np.ndarray) -> float:
    """Of the mean of a table (S seeds, n questions) when both are drawn anew.

    With random effects of seeds, questions and what is left, x_si = mu + a_s + b_i + e_si, the mean's variance is
    var(a)/S + var(b)/n + var(e)/(S n). The variance of the questions' means over n, plus that of the seeds' means over
    S, has the last term twice; it is taken off once. Never below either of the two.
    """
    seeds, questions = table.shape
    of_questions = _variance(table.mean(axis=0)) / questions
    if seeds == 1:
        return math.sqrt(of_questions)
    of_seeds = _variance(table.mean(axis=1)) / seeds
    rest = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
    freedom = (seeds - 1) * max(questions - 1, 1)
    of_rest = float((rest**2).sum()) / freedom / (seeds * questions)
    return math.sqrt(max(of_questions + of_seeds - of_rest, of_questions, of_seeds))


def _variance(values: np.ndarray) -> float:
    return float(values.var(ddof=1)) if len(values) > 1 else 0.0


def _table(verdicts: Sequence[Sequence[bool]]) -> np.ndarray:
    if not verdicts or len({len(each) for each in verdicts}) != 1 or not verdicts[0]:
        raise ValueError(f"Verdicts on {[len(each) for each in verdicts]} questions are no table.")
    return np.asarray(verdicts, dtype=np.float64)
