"""Means over seeds and paired differences between arms, with 95 % intervals.

Intervals are Student's t over seeds: the values of a score over seeds, or their differences between
two arms, are taken as independent draws from a normal distribution. With three seeds this
assumption cannot be checked, and the t quantile (4.3 in place of 1.96) pays for the few draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

_LEVEL = 0.95
_POWER = 0.8
_MOST_SEEDS = 1000


@dataclass(frozen=True)
class Interval:
    """Mean over ``n`` values with its 95 % interval, which is infinite for one value."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Difference:
    """Difference of a score between an arm and the reference, on the same seeds.

    ``over_items`` is over the clips or prompts that the score averages, of differences averaged
    over the seeds; ``None`` for a score of the run as a whole. ``verdict`` is ``better``,
    ``worse``, or ``undecided, about N more seeds``; empty for a score without a direction.
    """

    arm: str
    score: str
    over_seeds: Interval
    over_items: Interval | None
    verdict: str


def t_interval(values: Sequence[float]) -> Interval:
    """Return the mean of ``values`` with Student's 95 % interval.

    Raises ``ValueError`` if there are none.
    """
    if not len(values):
        raise ValueError("no values: an interval needs at least one")
    n, mean = len(values), float(np.mean(values))
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = stats.t.ppf((1 + _LEVEL) / 2, n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def seeds_needed(differences: Sequence[float]) -> int | None:
    """Return how many seeds a paired t-test needs to find a difference of this mean and standard
    deviation with a power of 80 %; ``None`` for more than 1,000, or fewer than two differences.
    """
    if len(differences) < 2:
        return None
    effect = abs(float(np.mean(differences))) / max(float(np.std(differences, ddof=1)), 1e-300)
    for n in range(2, _MOST_SEEDS + 1):
        critical = stats.t.ppf((1 + _LEVEL) / 2, n - 1)
        if stats.nct.sf(critical, n - 1, effect * math.sqrt(n)) >= _POWER:
            return n
    return None


def paired_difference(
    arm: str,
    score: str,
    values: Mapping[int, Sequence[float]],
    reference: Mapping[int, Sequence[float]],
    better: str,
) -> Difference:
    """Compare an arm with the reference on the seeds that both have.

    ``values`` and ``reference`` hold by seed the value of each clip or prompt in one order, or
    one value of the whole run. A verdict is given only if the interval over seeds excludes 0, and
    that over items too.

    Raises ``ValueError`` if no seed has both, or their items differ in number.
    """
    seeds = sorted(values.keys() & reference.keys())
    if not seeds:
        raise ValueError(f"{score}: no seed has both {arm} and the reference")
    rows = np.array([np.subtract(values[seed], reference[seed]) for seed in seeds], dtype=float)
    means = rows.mean(axis=1)
    over_seeds = t_interval(means.tolist())
    over_items = t_interval(rows.mean(axis=0).tolist()) if rows.shape[1] > 1 else None
    verdict = _verdict(over_seeds, over_items, means.tolist(), better)
    return Difference(arm, score, over_seeds, over_items, verdict)


def _verdict(
    over_seeds: Interval, over_items: Interval | None, differences: list[float], better: str
) -> str:
    if not better:
        return ""
    if over_seeds.excludes_zero and (over_items is None or over_items.excludes_zero):
        return "better" if (over_seeds.mean > 0) == (better == "higher") else "worse"
    if over_seeds.excludes_zero:
        return "undecided, the clips or prompts are too few"
    needed = seeds_needed(differences)
    if needed is None:
        return f"undecided, more than {_MOST_SEEDS} seeds" if len(differences) > 1 else "one seed"
    more = max(1, needed - len(differences))
    return f"undecided, about {more} more seed{'s' if more > 1 else ''}"
