"""Wilson's interval: the equation that defines it, and values that are known in closed form."""

from __future__ import annotations

import math

import pytest

from lorapre.lab.evaluate.intervals import wilson_interval

Z = 1.959963984540054


@pytest.mark.parametrize(("right", "total"), [(1, 10), (5, 10), (659, 1319), (1318, 1319), (3, 7), (499, 500)])
def test_the_ends_are_the_probabilities_from_which_the_share_is_z_deviations_away(right: int, total: int) -> None:
    low, high = wilson_interval(right, total)
    assert low < right / total < high
    for end in (low, high):
        assert abs(right / total - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / total), rel=1e-9)


def test_the_ends_of_none_and_all_right_have_a_closed_form() -> None:
    assert wilson_interval(0, 10) == (0.0, pytest.approx(Z**2 / (10 + Z**2)))
    assert wilson_interval(10, 10) == (pytest.approx(10 / (10 + Z**2)), 1.0)


def test_a_narrower_confidence_takes_its_own_quantile() -> None:
    z = 1.6448536269514722
    low, high = wilson_interval(40, 100, confidence=0.9)
    for end in (low, high):
        assert abs(0.4 - end) == pytest.approx(z * math.sqrt(end * (1 - end) / 100), rel=1e-9)


@pytest.mark.parametrize(("right", "total", "confidence"), [(2, 1, 0.95), (-1, 3, 0.95), (0, 0, 0.95), (1, 2, 1.0)])
def test_what_is_no_share_is_refused(right: int, total: int, confidence: float) -> None:
    with pytest.raises(ValueError, match=r"share|confidence"):
        wilson_interval(right, total, confidence)
