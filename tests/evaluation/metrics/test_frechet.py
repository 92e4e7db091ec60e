"""The Fréchet distance against closed forms, scipy, and itself under what must not change it."""

from __future__ import annotations

import warnings

import pytest
import scipy.linalg
import torch
from torch import Tensor

from evaluation.metrics.frechet import (
    distance_between_halves,
    frechet_distance,
    frechet_distance_at_infinity,
    frechet_distance_of_moments,
    jackknife_interval,
)
from evaluation.metrics.moments import Moments


@pytest.fixture
def sets() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(300, 12, generator=draw, dtype=torch.float64)
    mix = torch.randn(12, 12, generator=draw, dtype=torch.float64)
    return x, 0.5 + x[:200].flip(0) @ mix


def whitened(n: int, d: int) -> Tensor:
    """A set of mean exactly 0 and covariance exactly 1."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = torch.linalg.qr(x - x.mean(dim=0)).Q
    return (x - x.mean(dim=0)) * (n - 1) ** 0.5


def test_commuting_gaussians_have_a_closed_form() -> None:
    """Diagonal covariances: the squared distance of means plus that of standard deviations."""
    x = whitened(80, 6)
    first, second = torch.arange(1.0, 7).double(), torch.tensor([3.0, 0, 2, 5, 0, 1]).double()
    shift = torch.linspace(-1, 2, 6).double()
    expected = shift.square().sum() + (first - second).square().sum()
    actual = frechet_distance(x * first, x * second + shift)
    assert float(actual) == pytest.approx(float(expected), abs=1e-9)


def test_a_shift_is_its_squared_length(sets: tuple[Tensor, Tensor]) -> None:
    shift = torch.linspace(-2, 1, 12, dtype=torch.float64)
    value = float(frechet_distance(sets[0], sets[0] + shift))
    assert value == pytest.approx(float(shift.square().sum()), abs=1e-9)


def test_one_dimension_by_hand() -> None:
    first, second = torch.tensor([[0.0], [2.0], [4.0]]), torch.tensor([[1.0], [1.0], [4.0]])
    expected = (2 - 2) ** 2 + (2 - 3**0.5) ** 2
    assert float(frechet_distance(first, second)) == pytest.approx(expected, abs=1e-12)


def test_equals_the_matrix_root_of_scipy(sets: tuple[Tensor, Tensor]) -> None:
    x, y = sets
    root = scipy.linalg.sqrtm((x.T.cov() @ y.T.cov()).numpy())
    expected = (x.mean(0) - y.mean(0)).square().sum() + x.var(0).sum() + y.var(0).sum()
    expected = float(expected) - 2 * root.trace().real
    assert float(frechet_distance(x, y)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore:Fréchet distance of")
@pytest.mark.parametrize("n", [5, 12, 100])
def test_a_set_is_at_no_distance_from_itself(n: int) -> None:
    x = torch.randn(n, 12, dtype=torch.float64)
    assert abs(float(frechet_distance(x, x.flip(0)))) < 1e-9
    moments = Moments.of(x)
    assert abs(float(frechet_distance_of_moments(moments, moments))) < 1e-9


def test_symmetry_rotation_and_scale(sets: tuple[Tensor, Tensor]) -> None:
    x, y = sets
    value = frechet_distance(x, y)
    turn = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    assert torch.isclose(frechet_distance(y, x), value, rtol=1e-9)
    assert torch.isclose(frechet_distance(x @ turn, y @ turn), value, rtol=1e-9)
    assert torch.isclose(frechet_distance(3 * x, 3 * y), 9 * value, rtol=1e-9)


@pytest.mark.filterwarnings("ignore:Fréchet distance of")
@pytest.mark.parametrize("n", [6, 40])
def test_moments_agree_with_features(n: int) -> None:
    """Below and above the number of features; 16 of them."""
    x, y = torch.randn(n, 16).double(), 1 + 2 * torch.randn(n, 16).double()
    by_moments = frechet_distance_of_moments(Moments.of(x), Moments.of(y))
    assert torch.isclose(by_moments, frechet_distance(x, y), rtol=1e-10)


def test_merged_shards_equal_the_whole() -> None:
    """Far from zero, where sums of squares would lose their digits."""
    x = 1e4 + torch.randn(200, 8, dtype=torch.float64)
    whole = Moments.of(x)
    merged = Moments.of(x[:1]).merge(Moments.of(x[1:31])).merge(Moments.of(x[31:]))
    assert merged.n == 200
    assert torch.allclose(merged.mean, whole.mean, rtol=1e-14)
    assert torch.allclose(merged.scatter, whole.scatter, rtol=1e-9, atol=1e-8)


def test_few_videos_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="8 and 8 videos with 12 features"):
        frechet_distance(torch.randn(8, 12), torch.randn(8, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(torch.randn(14, 12), torch.randn(14, 12))


def test_the_interval_holds_the_value_and_narrows() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(1600, 4, generator=draw), 1 + torch.randn(1600, 4, generator=draw)
    widths = []
    for n in (100, 1600):
        low, high = jackknife_interval(x[:n], y[:n])
        assert low < float(frechet_distance(x[:n], y[:n])) < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2
    assert low < 4 < high  # the distance of the two Gaussians


def test_infinity_removes_the_bias() -> None:
    """Means 0.1 apart in 20 of 20 dimensions: 0.2. Two hundred videos alone say much more."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(400, 20, generator=draw), 0.1 + torch.randn(400, 20, generator=draw)
    biased, corrected = float(frechet_distance(x, y)), frechet_distance_at_infinity(x, y)
    assert abs(corrected - 0.2) < 0.5 * abs(biased - 0.2)


def test_the_floor_is_what_halves_of_one_set_differ_by() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(800, 8, generator=draw)
    floors = [distance_between_halves(x[:n], x[:n]) for n in (60, 200, 800)]
    assert floors[0] > floors[1] > floors[2] > 0
    shifted = distance_between_halves(x, x + 1)
    assert shifted == pytest.approx(8 + floors[2], rel=0.1)


@pytest.mark.parametrize(
    ("first", "second", "rule"),
    [
        (torch.zeros(1, 3), torch.zeros(5, 3), "videos >= 2"),
        (torch.zeros(5, 3), torch.zeros(5, 4), "widths must be equal"),
        (torch.zeros(5, 3), torch.full((5, 3), torch.nan), "not finite"),
        (torch.zeros(5), torch.zeros(5), "must be"),
    ],
)
def test_what_has_no_distance_is_refused(first: Tensor, second: Tensor, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        frechet_distance(first, second)


@pytest.mark.parametrize("shift", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
def test_the_interval_is_as_wide_as_the_distance_spreads(shift: float) -> None:
    """Over 120 pairs of sets of 120 videos: half widths about 1.96 standard deviations of the
    distance, and intervals that hold its mean in about 95 of 100.
    """
    values, halves = [], []
    for seed in range(120):
        draw = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(120, 48, generator=draw, dtype=torch.float64) for _ in range(2))
        value = float(frechet_distance(x, 1.1 * y + shift))
        values.append(value)
        halves.append(jackknife_interval(x, 1.1 * y + shift)[1] - value)
    distances, widths = torch.tensor(values), torch.tensor(halves)
    assert 0.85 < float(widths.square().mean().sqrt() / (1.96 * distances.std())) < 1.15
    covered = (distances - distances.mean()).abs() <= widths
    assert 0.9 <= float(covered.double().mean()) <= 0.98
