"""95 % confidence intervals of shares and means."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

_Z = 1.959963984540054  # the 97.5 % point of the normal distribution


def wilson_interval(num_right: int, n: int) -> tuple[float, float]:
    """Wilson interval (1927) of the share ``num_right / n``.

    It has a sensible width at shares of 0 and 1, unlike the normal interval. Raises ``ValueError``
    for n = 0 or a count outside 0..n.
    """
    if not 0 <= num_right <= n or n == 0:
        raise ValueError(f"{num_right} right of {n}: must be 0 <= right <= n, n > 0")
    part, weight = num_right / n, 1 + _Z**2 / n
    centre = (part + _Z**2 / (2 * n)) / weight
    half = _Z * math.sqrt(part * (1 - part) / n + _Z**2 / (4 * n**2)) / weight
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_interval(
    values: Float[np.ndarray, " n"], num_draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of ``values``, one value per video."""
    if len(values) == 0:
        raise ValueError("no values: an interval needs at least one")
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(values), size=(num_draws, len(values)))
    low, high = np.percentile(np.asarray(values, dtype=np.float64)[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)
