"""How far a share of right answers may be from the model's own."""

from __future__ import annotations

import math
from statistics import NormalDist


def wilson_interval(right: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927) of a probability, after ``right`` successes of ``total`` >= 1.

    Its ends are the p for which |right / total - p| is z standard deviations sqrt(p (1 - p) / total).

    Raises:
        ValueError: the counts are not 0 <= right <= total, total >= 1, or confidence is not between 0 and 1.
    """
    if not 0 <= right <= total or total < 1:
        raise ValueError(f"{right} of {total} is no share.")
    if not 0 < confidence < 1:
        raise ValueError(f"Invalid confidence value: {confidence}.")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = right / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    # At the ends rounding would leave 1e-17 where the formula has 0 or 1.
    low = 0.0 if right == 0 else centre - half
    high = 1.0 if right == total else centre + half
    return low, high
