"""Intervals and numbers of seeds against closed forms and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from sora_lightning.ablations.statistics import (
    paired_difference,
    seeds_needed,
    t_interval,
)


def test_the_interval_is_students() -> None:
    found = t_interval([1.0, 2.0, 3.0])
    assert found.mean == pytest.approx(2)
    assert found.high - 2 == pytest.approx(4.302652729911275 / math.sqrt(3))
    assert found.low + found.high == pytest.approx(4)
    assert found.n == 3
    one = t_interval([5.0])
    assert (one.mean, one.low, one.high) == (5, -math.inf, math.inf)
    with pytest.raises(ValueError, match="needs at least one"):
        t_interval([])


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    found = [t_interval(rng.normal(1.0, 2.0, 3).tolist()) for _ in range(2000)]
    covered = np.mean([one.low <= 1.0 <= one.high for one in found])
    assert covered == pytest.approx(0.95, abs=0.015)


def test_a_paired_difference_is_the_paired_t_test() -> None:
    rng = np.random.default_rng(1)
    shared = rng.normal(0, 10, 5)  # what a seed does to both arms
    a = {seed: [shared[seed] + rng.normal(1, 0.1)] for seed in range(5)}
    b = {seed: [shared[seed] + rng.normal(0, 0.1)] for seed in range(5)}
    found = paired_difference("a", "loss", a, b, "lower")
    expected = stats.ttest_rel([v[0] for v in a.values()], [v[0] for v in b.values()])
    interval = expected.confidence_interval(0.95)
    assert found.over_seeds.low == pytest.approx(interval.low)
    assert found.over_seeds.high == pytest.approx(interval.high)
    assert found.verdict == "worse"
    assert found.over_items is None
    assert paired_difference("a", "psnr", a, b, "higher").verdict == "better"
    assert paired_difference("a", "count", a, b, "").verdict == ""


def test_only_seeds_that_both_have_are_compared() -> None:
    found = paired_difference("a", "s", {0: [1.0], 1: [3.0], 2: [9.0]}, {1: [1.0], 2: [2.0]}, "")
    assert (found.over_seeds.mean, found.over_seeds.n) == (4.5, 2)
    with pytest.raises(ValueError, match="no seed has both"):
        paired_difference("a", "s", {0: [1.0]}, {1: [1.0]}, "")


def test_a_verdict_needs_the_interval_over_items_too() -> None:
    even = {seed: [1.0 + 0.01 * seed, 1.1] for seed in range(3)}
    zeros = {seed: [0.0, 0.0] for seed in range(3)}
    uneven = {seed: [3.0 + 0.01 * seed, -1.0] for seed in range(3)}
    assert paired_difference("a", "s", even, zeros, "lower").verdict == "worse"
    found = paired_difference("a", "s", uneven, zeros, "lower")
    assert found.over_seeds.excludes_zero
    assert found.over_items is not None
    assert not found.over_items.excludes_zero
    assert found.verdict == "undecided, the clips or prompts are too few"


def test_the_seeds_needed_reach_the_power_and_one_less_does_not() -> None:
    differences = [0.5, 1.5, -0.2, 0.9]
    needed = seeds_needed(differences)
    assert needed is not None
    effect = np.mean(differences) / np.std(differences, ddof=1)
    rng = np.random.default_rng(0)
    for n, reaches in ((needed, True), (needed - 1, False)):
        draws = rng.normal(effect, 1, (40000, n))
        t = draws.mean(1) / (draws.std(1, ddof=1) / math.sqrt(n))
        power = np.mean(t > stats.t.ppf(0.975, n - 1))
        assert (power > 0.8) == reaches
    assert seeds_needed([1e-9, -1e-9, 2e-9, 1.0, -1.0]) is None
    assert seeds_needed([1.0]) is None


def test_an_undecided_verdict_says_how_many_seeds_are_missing() -> None:
    values = {0: [0.5], 1: [1.5], 2: [-0.2]}
    zeros = {seed: [0.0] for seed in values}
    needed = seeds_needed([0.5, 1.5, -0.2])
    assert needed is not None
    found = paired_difference("a", "s", values, zeros, "lower")
    assert found.verdict == f"undecided, about {needed - 3} more seeds"
    assert paired_difference("a", "s", {0: [1.0]}, {0: [0.0]}, "lower").verdict == "one seed"
