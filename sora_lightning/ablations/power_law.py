"""Power laws of a score in the FLOPs of a training (arXiv 2001.08361, 2203.15556)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_NUM_ARMS, _RANGE = 4, 10.0
_MOST_RESAMPLES = 2000


@dataclass(frozen=True)
class PowerLaw:
    """``score = factor * flops ** -exponent``; ``low`` to ``high`` holds 95 % of the exponents that
    resampled seeds give.
    """

    factor: float
    exponent: float
    low: float
    high: float

    def __call__(self, flops: float) -> float:
        return float(self.factor * flops**-self.exponent)


def fit_power_law(
    flops: Mapping[str, float], values: Mapping[str, Mapping[int, float]]
) -> PowerLaw | None:
    """Fit the scores of arms, by arm and seed, to the FLOPs of their trainings, by least squares on
    logarithms.

    The interval is a bootstrap over the seeds that all arms have: each resample draws as many of
    them with replacement, the same for all arms. With three seeds it has 27 resamples, and is
    narrow.

    Returns ``None`` where it would say little: for fewer than four arms, for FLOPs that span less
    than a factor of 10, without a seed that all arms have, and for scores that are not positive.
    """
    arms = [name for name in flops if values.get(name)]
    if len(arms) < _NUM_ARMS:
        return None
    costs = [flops[name] for name in arms]
    seeds = sorted(set.intersection(*(set(values[name]) for name in arms)))
    scores = np.array([[values[name][seed] for name in arms] for seed in seeds])
    if max(costs) < _RANGE * min(costs) or not seeds or not (scores > 0).all():
        return None
    exponents = [_line(costs, scores[list(one)].mean(0))[0] for one in _resamples(len(seeds))]
    exponent, factor = _line(costs, scores.mean(0))
    low, high = np.quantile(exponents, [0.025, 0.975])
    return PowerLaw(factor, exponent, float(low), float(high))


def _line(flops: Sequence[float], scores: np.ndarray) -> tuple[float, float]:
    slope, intercept = np.polyfit(np.log(flops), np.log(scores), 1)
    return -float(slope), float(np.exp(intercept))


def _resamples(n: int) -> list[tuple[int, ...]]:
    """Return all draws of ``n`` from ``n`` with replacement, or 2,000 of them."""
    if n**n <= _MOST_RESAMPLES:
        return list(itertools.product(range(n), repeat=n))
    drawn = np.random.default_rng(0).integers(n, size=(_MOST_RESAMPLES, n))
    return [tuple(row) for row in drawn.tolist()]
