import math

import numpy as np
import pytest

from sora_lightning.ablations.power_law import fit_power_law

FLOPS = {name: 10.0 ** (12 + i / 2) for i, name in enumerate("abcde")}


def law_of(exponent: float, factor: float, noise: float, seeds: int) -> dict:
    rng = np.random.default_rng(0)
    return {
        name: {
            seed: factor * flops**-exponent * math.exp(noise * rng.normal())
            for seed in range(seeds)
        }
        for name, flops in FLOPS.items()
    }


def test_an_exact_law_is_found() -> None:
    law = fit_power_law(FLOPS, law_of(0.07, 9.0, 0.0, 3))
    assert law is not None
    assert law.exponent == pytest.approx(0.07)
    assert law.factor == pytest.approx(9.0)
    assert law.low == pytest.approx(law.high)
    assert law(1e13) == pytest.approx(9 * 1e13**-0.07)


def test_the_interval_narrows_with_seeds_and_holds_the_exponent() -> None:
    few, many = (fit_power_law(FLOPS, law_of(0.07, 9.0, 0.05, seeds)) for seeds in (3, 30))
    assert few is not None
    assert many is not None
    assert many.high - many.low < few.high - few.low
    assert many.low < 0.07 < many.high


def test_seeds_that_not_all_arms_have_are_left_out() -> None:
    values = law_of(0.07, 9.0, 0.0, 3)
    values["a"][7] = 1e6
    law = fit_power_law(FLOPS, values)
    assert law is not None
    assert law.exponent == pytest.approx(0.07)


@pytest.mark.parametrize(
    ("flops", "values"),
    [
        ({k: FLOPS[k] for k in "abc"}, law_of(0.07, 9.0, 0.0, 3)),  # three arms
        ({k: 1e12 + i for i, k in enumerate("abcde")}, law_of(0.07, 9.0, 0.0, 3)),  # one cost
        (FLOPS, {k: {i: 1.0} for i, k in enumerate("abcde")}),  # no seed in common
        (FLOPS, {k: {0: -1.0} for k in "abcde"}),
    ],
)
def test_no_law_is_given_where_it_would_say_little(flops: dict, values: dict) -> None:
    assert fit_power_law(flops, values) is None
