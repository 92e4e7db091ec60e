"""Kernel distances, moments in one state, and distances of frames."""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from evaluation.metrics import (
    FrechetDistanceOfMoments,
    FrechetFrameDistance,
    diversity,
    frechet_distance,
    kernel_distance,
    kernel_distance_of_subsets,
    nearest,
)
from evaluation.metrics.frechet import (
    distance_between_halves,
    frechet_distance_at_infinity,
    jackknife_interval,
)


def normal(n: int, d: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=draw, dtype=torch.float64)


def test_the_unbiased_estimate_by_its_definition() -> None:
    x, y = normal(5, 3, 0), 0.5 + normal(4, 3, 1)

    def k(a: Tensor, b: Tensor) -> float:
        return float((a @ b / 3 + 1) ** 3)

    within_x = [k(x[i], x[j]) for i in range(5) for j in range(5) if i != j]
    within_y = [k(y[i], y[j]) for i in range(4) for j in range(4) if i != j]
    between = [k(a, b) for a in x for b in y]
    expected = sum(within_x) / 20 + sum(within_y) / 12 - 2 * sum(between) / 20
    assert float(kernel_distance(x, y)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [16, 64])
def test_nothing_differs_by_nothing_on_average(n: int) -> None:
    """The mean over 60 pairs of sets of one distribution is within 3 standard errors of 0."""
    values = torch.stack(
        [kernel_distance(normal(n, 8, 2 * i), normal(2 * n, 8, 2 * i + 1)) for i in range(60)]
    )
    assert abs(float(values.mean())) < 3 * float(values.std()) / 60**0.5
    assert bool((values < 0).any())  # it is unbiased: below zero as often as not


def test_it_is_symmetric_and_grows_with_the_shift() -> None:
    x, y = normal(200, 8, 0), normal(150, 8, 1)
    assert torch.isclose(kernel_distance(x, y), kernel_distance(y, x), rtol=1e-12)
    shifts = [float(kernel_distance(x, y + shift)) for shift in (0.0, 0.3, 0.6, 1.2)]
    assert shifts == sorted(shifts)


@pytest.fixture
def clean_fid(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """clean-fid's distances, without its networks, which would import torchvision."""
    pytest.importorskip("cleanfid.resize")
    features, pictures = types.ModuleType("cleanfid.features"), types.ModuleType("cleanfid.utils")
    for name in ("build_feature_extractor", "get_reference_statistics"):
        setattr(features, name, None)
    monkeypatch.setitem(sys.modules, "cleanfid.features", features)
    monkeypatch.setitem(sys.modules, "cleanfid.utils", pictures)
    monkeypatch.delitem(sys.modules, "cleanfid.fid", raising=False)
    return importlib.import_module("cleanfid.fid")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Fréchet distance of")
@pytest.mark.parametrize(
    ("n", "d", "close"), [(400, 32, {"rel": 1e-6}), (24, 64, {"abs": 1e-3})], ids=["N>D", "N<D"]
)
def test_equals_clean_fid_and_scipy_on_the_same_features(
    clean_fid: types.ModuleType, n: int, d: int, close: dict[str, float]
) -> None:
    """Below as many videos as features their matrix root loses digits; ours does not."""
    x = normal(n, d, 0)
    y = 0.3 + normal(n, d, 1) @ (torch.eye(d) + 0.1 * normal(d, d, 2))
    ours = float(frechet_distance(x, y))
    assert clean_fid.fid_from_feats(x.numpy(), y.numpy()) == pytest.approx(ours, **close)
    root = scipy.linalg.sqrtm((x.T.cov() @ y.T.cov()).numpy())
    theirs = (x.mean(0) - y.mean(0)).square().sum() + x.var(0).sum() + y.var(0).sum()
    assert float(theirs) - 2 * root.trace().real == pytest.approx(ours, **close)


def test_subsets_equal_clean_fid_when_they_are_the_whole(clean_fid: types.ModuleType) -> None:
    """A subset of all is the set in another order: theirs divides the cross term by m² as well."""
    x, y = normal(60, 16, 0), 0.2 + normal(60, 16, 1)
    theirs = clean_fid.kernel_distance(x.numpy(), y.numpy(), num_subsets=3)
    mean, deviation = kernel_distance_of_subsets(x, y, num_subsets=3)
    assert mean == pytest.approx(theirs, rel=1e-6)
    assert deviation == pytest.approx(0, abs=1e-12)


def test_subsets_are_drawn_by_the_seed_and_scatter_about_the_whole() -> None:
    x, y = normal(300, 8, 0), 0.3 + normal(300, 8, 1)
    first = kernel_distance_of_subsets(x, y, 40, 100, seed=3)
    assert first == kernel_distance_of_subsets(x, y, 40, 100, seed=3)
    assert first != kernel_distance_of_subsets(x, y, 40, 100, seed=4)
    whole = float(kernel_distance(x, y))
    assert abs(first[0] - whole) < 4 * first[1] / 40**0.5
    with pytest.raises(ValueError, match="0 subsets of 100"):
        kernel_distance_of_subsets(x, y, 0, 100)


@pytest.mark.filterwarnings("ignore:Fréchet distance of")
def test_infinity_is_near_the_closed_form_over_seeds() -> None:
    """Two Gaussians 0.16 apart in means of 40 features, of deviations 1 and 1.15. Over 8 draws of
    512 videos the extrapolation scatters about the truth; the plain distance is far off it.
    """
    d, shift, spread = 40, 0.16, 1.15
    truth = d * (shift**2 + (spread - 1) ** 2)
    draws = [(normal(512, d, 2 * s), shift + spread * normal(512, d, 2 * s + 1)) for s in range(8)]
    plain = torch.stack([frechet_distance(x, y) for x, y in draws])
    corrected = torch.tensor([frechet_distance_at_infinity(x, y) for x, y in draws])
    assert float(plain.mean()) > 1.5 * truth
    assert abs(float(corrected.mean()) - truth) < 0.1
    assert bool(((corrected - truth).abs() < 0.7).all())  # three deviations of one draw


def test_subsampling_one_side_alone_would_leave_its_bias() -> None:
    """Each side's bias adds d / 2n at equal covariances, so both sides are drawn."""
    d, n = 30, 256
    x, y = normal(n, d, 0), normal(n, d, 1)
    assert float(frechet_distance(x, y)) > 1.0
    assert abs(frechet_distance_at_infinity(x, y)) < 0.5


def test_the_jackknife_covers_other_distances() -> None:
    x, y = normal(200, 6, 0), 0.5 + normal(200, 6, 1)
    low, high = jackknife_interval(x, y, distance=kernel_distance)
    assert low < float(kernel_distance(x, y)) < high
    null_low, null_high = jackknife_interval(x, normal(200, 6, 5), distance=kernel_distance)
    assert null_low < 0 < null_high


def test_frames_of_a_video_leave_together() -> None:
    """Eight equal frames in each of 40 videos say no more than one: the interval is as wide."""
    x, y = normal(40, 4, 0), 0.5 + normal(40, 4, 1)
    frames = [z.repeat_interleave(8, dim=0) for z in (x, y)]

    def width(interval: tuple[float, float]) -> float:
        return interval[1] - interval[0]

    honest = width(jackknife_interval(*frames, rows_per_video=8))
    assert honest == pytest.approx(width(jackknife_interval(x, y)), rel=0.1)
    assert width(jackknife_interval(*frames)) < 0.6 * honest
    together = distance_between_halves(*frames, rows_per_video=8)
    assert together == pytest.approx(distance_between_halves(x, y), rel=0.15)


class MeanColour(nn.Module):
    def forward(self, videos: Tensor) -> Tensor:
        return videos.double().mean(dim=(2, 3, 4))


def clips(n: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, 4, 12, 12), generator=draw, dtype=torch.uint8)


def test_frame_distance_looks_at_frames_and_counts_each_video_once() -> None:
    videos = clips(24)
    metric = FrechetFrameDistance(MeanColour(), feature_dim=3, num_frames=2)
    metric.update(videos[:12], range(12), real=True)
    metric.update(videos[12:], range(12), real=False)
    metric.update(videos[14:16], [2, 3], real=False)  # as padded samplers do
    frames = videos[:, :, [0, 3]].double().mean(dim=(3, 4)).transpose(1, 2)
    expected = frechet_distance(frames[:12].flatten(0, 1), frames[12:].flatten(0, 1))
    assert float(metric.compute()) == pytest.approx(float(expected), rel=1e-10)
    with pytest.raises(ValueError, match="videos of 4 frames: 5 are looked at"):
        FrechetFrameDistance(MeanColour(), 3, 5).update(videos, range(24), real=True)


def test_moments_equal_features_and_stay_in_double_precision() -> None:
    videos = clips(50)
    moments = FrechetDistanceOfMoments(MeanColour(), feature_dim=3).half()
    for part in videos[:30].split([1, 13, 16]):
        moments.update(part, real=True)
    for part in videos[30:].split([19, 1]):
        moments.update(part, real=False)
    features = MeanColour()(videos)
    expected = float(frechet_distance(features[:30], features[30:]))
    assert moments.real.dtype == torch.float64
    assert float(moments.compute()) == pytest.approx(expected, rel=1e-10)
    other = FrechetDistanceOfMoments(MeanColour(), feature_dim=3)
    other.update(videos[:7], real=True)
    one = FrechetDistanceOfMoments(MeanColour(), feature_dim=3)
    one.update(videos[7:30], real=True)
    one.update(videos[30:], real=False)
    one.merge_state(other)
    assert float(one.compute()) == pytest.approx(expected, rel=1e-10)


def test_copies_are_found_and_strangers_are_not() -> None:
    training, strangers = normal(50, 6, 0), normal(10, 6, 1)
    found = nearest(torch.cat([training[[7, 3]], strangers]), training)
    assert found.index[:2].tolist() == [7, 3]
    assert found.distance[:2].tolist() == [0, 0]
    assert found.ratio[:2].tolist() == [0, 0]
    by_hand = (strangers[0] - training).norm(dim=1).sort().values
    assert float(found.distance[2]) == pytest.approx(float(by_hand[0]))
    assert float(found.second[2]) == pytest.approx(float(by_hand[1]))
    assert bool((found.ratio[2:] > 0.3).all())


def test_diversity_by_hand() -> None:
    corners = torch.tensor([[0.0, 0], [3, 0], [0, 4]])
    assert float(diversity(corners)) == pytest.approx((3 + 4 + 5) / 3)
    assert float(diversity(torch.ones(5, 2))) == 0
