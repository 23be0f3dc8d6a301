"""The bigram model against a dictionary of counts and fractions."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

import lorapre.lab.data.bigram as bigram
from lorapre.lab.data import BigramModel


def by_hand(tokens: list[int], vocabulary: int) -> list[list[Fraction]]:
    """P[u][v] by the textbook, in exact fractions."""

    def discount(counts: list[int]) -> Fraction:
        once, twice = counts.count(1), counts.count(2)
        return Fraction(once, once + 2 * twice) if once else Fraction(1, 2)

    pairs = Counter(pairwise(tokens))
    followers: dict[int, set[int]] = defaultdict(set)
    preceding: dict[int, set[int]] = defaultdict(set)
    for u, v in pairs:
        followers[u].add(v)
        preceding[v].add(u)
    high, low = discount(list(pairs.values())), discount([len(us) for us in preceding.values()])
    types = len(pairs)

    def lower(v: int) -> Fraction:
        direct = max(len(preceding[v]) - low, Fraction(0)) if v in preceding else Fraction(0)
        return direct / types + low * sum(1 for us in preceding.values() if us) / types / vocabulary

    table = []
    for u in range(vocabulary):
        total = sum(count for (first, _), count in pairs.items() if first == u)
        row = []
        for v in range(vocabulary):
            if total == 0:
                row.append(lower(v))
                continue
            direct = max(pairs[u, v] - high, Fraction(0))
            row.append(direct / total + high * len(followers[u]) / total * lower(v))
        table.append(row)
    return table


CASES = {
    "random": (np.random.default_rng(0).integers(0, 9, 60), 12),
    "zipf": (np.minimum(np.random.default_rng(1).zipf(1.5, 400), 30), 31),
    "nothing once": (np.array([0, 1] * 20 + [0]), 3),
    "nothing twice": (np.array([0, 1, 2, 3, 4, 5]), 6),
    "two tokens": (np.array([2, 2]), 4),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk", [5, 1 << 22])
def test_probabilities_equal_those_by_hand_and_sum_to_one(
    name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bigram, "_CHUNK", chunk)
    tokens, vocabulary = CASES[name]
    model = BigramModel.fit(tokens.astype(np.uint16), vocabulary)
    first, second = np.divmod(np.arange(vocabulary**2), vocabulary)
    found = model.probabilities(first, second).reshape(vocabulary, vocabulary)
    expected = by_hand(tokens.tolist(), vocabulary)
    assert all(sum(row) == 1 for row in expected)
    np.testing.assert_allclose(found, np.array(expected, dtype=float), rtol=1e-12)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-12)
    assert found.min() > 0


@pytest.mark.parametrize("length", [2, 5, 16])
@pytest.mark.parametrize("chunk", [7, 1 << 22])
def test_cross_entropy_scores_all_but_the_first_of_each_whole_block(
    length: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bigram, "_CHUNK", chunk)
    tokens, vocabulary = CASES["zipf"]
    valid = np.random.default_rng(2).integers(0, vocabulary, 83).astype(np.uint32)
    table = by_hand(tokens.tolist(), vocabulary)
    losses = [
        -math.log(table[valid[start + j - 1]][valid[start + j]])
        for start in range(0, len(valid) // length * length, length)
        for j in range(1, length)
    ]
    model = BigramModel.fit(tokens, vocabulary)
    assert model.cross_entropy(valid, length) == pytest.approx(sum(losses) / len(losses), rel=1e-12)


def test_pairs_whose_code_exceeds_32_bits() -> None:
    vocabulary = 200_000
    tokens = np.array([199_999, 199_998] * 3 + [7, 7], dtype=np.uint32)
    model = BigramModel.fit(tokens, vocabulary)
    seen, unseen = model.probabilities(np.array([199_999, 199_999]), np.array([199_998, 5]))
    assert seen > 0.5
    assert 0 < unseen < 1e-5


def test_inputs_that_hold_nothing_to_count_or_score() -> None:
    with pytest.raises(ValueError, match="shape"):
        BigramModel.fit(np.array([1]), 4)
    with pytest.raises(ValueError, match="vocabulary of 4"):
        BigramModel.fit(np.array([1, 4]), 4)
    model = BigramModel.fit(np.array([1, 2, 3]), 4)
    with pytest.raises(ValueError, match="nothing to predict"):
        model.cross_entropy(np.array([1, 2]), 3)
    with pytest.raises(ValueError, match="nothing to predict"):
        model.cross_entropy(np.array([1, 2]), 1)
