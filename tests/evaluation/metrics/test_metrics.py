"""Metrics do not depend on batches, ranks or padding, and mean what they say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio

from evaluation.metrics import ClipScore, FrechetVideoDistance, Reconstruction, frechet_distance
from evaluation.metrics.intervals import bootstrap_interval, wilson_interval


class MeanColour(nn.Module):
    """Three features that a test can work out by hand."""

    def forward(self, videos: Tensor) -> Tensor:
        return videos.float().mean(dim=(2, 3, 4))


def clips(n: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, 4, 12, 12), generator=draw, dtype=torch.uint8)


def distance_of(shards: Sequence[tuple[Sequence[int], bool]], videos: Tensor) -> float:
    metric = FrechetVideoDistance(MeanColour(), feature_dim=3)
    for ids, real in shards:
        metric.update(videos[list(ids)], ids, real=real)
    return float(metric.compute())


def test_batches_order_and_padding_do_not_matter() -> None:
    videos = clips(40)
    whole = distance_of([(range(20), True), (range(20, 40), False)], videos)
    features = MeanColour()(videos)
    assert whole == pytest.approx(float(frechet_distance(features[:20], features[20:])), rel=1e-12)
    shards = [
        (range(30, 40), False),
        (range(7), True),
        (range(7, 20), True),
        (range(20, 31), False),
    ]
    assert distance_of(shards, videos) == pytest.approx(whole, rel=1e-10)


def test_reset_forgets() -> None:
    metric = FrechetVideoDistance(MeanColour(), feature_dim=3)
    for seed in (0, 1):
        metric.reset()
        metric.update(clips(9, seed), range(9), real=True)
        metric.update(clips(9, seed + 5), range(9), real=False)
    features = MeanColour()
    fresh = frechet_distance(features(clips(9, 1)), features(clips(9, 6)))
    assert float(metric.compute()) == pytest.approx(float(fresh), rel=1e-12)


def test_rows_of_another_width_are_refused() -> None:
    metric = FrechetVideoDistance(MeanColour(), feature_dim=4)
    with pytest.raises(ValueError, match=r"must be \(5, 4\)"):
        metric.update(clips(5), range(5), real=True)
    metric = FrechetVideoDistance(MeanColour(), feature_dim=3)
    with pytest.raises(ValueError, match="for 4 ids"):
        metric.update(clips(5), range(4), real=True)


class Angles:
    """Embeds a video at the angle of its first pixel, a text at the angle it says, in degrees."""

    def embed_videos(self, videos: Tensor) -> Tensor:
        return self._at(videos[:, 0, 0, 0, 0].float())

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return self._at(torch.tensor([float(text) for text in texts]))

    def _at(self, degrees: Tensor) -> Tensor:
        return torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin()], dim=1)


def test_clip_score_is_the_mean_cosine_and_keeps_its_sign() -> None:
    videos = torch.zeros(3, 3, 4, 8, 8, dtype=torch.uint8)
    metric = ClipScore(Angles())
    metric.update(videos[:1], ["60"], ids=[0])
    metric.update(videos[1:], ["180", "90"], ids=[1, 2])
    assert float(metric.compute()) == pytest.approx((50 - 100 + 0) / 3, abs=1e-4)
    with pytest.raises(ValueError, match="3 videos and 2 texts"):
        metric.update(videos, ["1", "2"], ids=[0, 1, 2])


def test_reconstruction_of_known_errors() -> None:
    real = clips(2)
    metric = Reconstruction()
    off_by_one = torch.where(real > 0, real - 1, real + 1)
    metric.update(real, off_by_one, ids=[0, 1])
    scores = metric.compute()
    assert float(scores["psnr"]) == pytest.approx(48.1308, abs=1e-3)  # 20 log10 255
    assert 0.99 < float(scores["ssim"]) < 1
    metric.reset()
    metric.update(real, real, ids=[0, 1])
    assert {name: float(value) for name, value in metric.compute().items()} == {
        "psnr": 100.0,
        "ssim": pytest.approx(1.0),
    }


def test_psnr_is_that_of_torchmetrics_frame_by_frame() -> None:
    real, other = clips(2, 0), clips(2, 1)
    metric = Reconstruction()
    metric.update(real, other, ids=[0, 1])
    frames = [
        peak_signal_noise_ratio(real[b, :, t].double(), other[b, :, t].double(), data_range=255.0)
        for b in range(2)
        for t in range(4)
    ]
    assert float(metric.compute()["psnr"]) == pytest.approx(float(torch.stack(frames).mean()))


def test_reconstruction_refuses_unequal_and_tiny_clips() -> None:
    with pytest.raises(ValueError, match="must be equal"):
        Reconstruction().update(clips(2), clips(3), ids=[0, 1])
    small = torch.zeros(1, 3, 4, 8, 12, dtype=torch.uint8)
    with pytest.raises(ValueError, match="SSIM needs 11"):
        Reconstruction().update(small, small, ids=[0])


def test_wilson_interval_by_hand() -> None:
    """Wilson's formula gives 0.490 to 0.943 for 8 right of 10."""
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 10)[0] == 0
    assert wilson_interval(10, 10)[1] == pytest.approx(1)
    with pytest.raises(ValueError, match="3 right of 2"):
        wilson_interval(3, 2)


def test_bootstrap_interval_matches_the_standard_error() -> None:
    values = np.random.default_rng(0).normal(5, 2, 400)
    low, high = bootstrap_interval(values)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert low < values.mean() < high
