"""A distance by I3D's first layers, with drawn weights, grows with what is done to videos. It does
not see that they play backwards: that is no property to assert.
"""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.features.extractor import drawn
from evaluation.features.i3d import InceptionI3D
from evaluation.metrics import frechet_distance

NUM_CLIPS, FRAMES, SIDE = 64, 9, 32
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Fréchet distance of"),
]


@pytest.fixture(scope="module")
def videos() -> Tensor:
    """Smooth textures that drift, each its own way; in [0, 1]."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(2 * NUM_CLIPS, 3, 36, 36, generator=draw)
    wide = F.interpolate(coarse, size=[3 * SIDE, 3 * SIDE], mode="bicubic").clamp(0, 1)
    steps = 3 * (2 * torch.randint(0, 2, (2 * NUM_CLIPS, 2), generator=draw) - 1)
    clips = []
    for texture, (down, right) in zip(wide, steps.tolist(), strict=True):
        corners = [(SIDE + t * down, SIDE + t * right) for t in range(FRAMES)]
        clips.append(torch.stack([texture[:, i : i + SIDE, j : j + SIDE] for i, j in corners], 1))
    return torch.stack(clips)


class Truncated:
    """Means over space and time of what comes out of the first mixed block, or with their
    deviations over time.
    """

    def __init__(self, over_time: bool = False) -> None:
        layers = list(drawn(lambda: InceptionI3D()).eval().named_children())
        last = [name for name, _ in layers].index("Mixed_3b")
        self.network = nn.Sequential(*(layer for _, layer in layers[: last + 1]))
        self.over_time = over_time

    @torch.no_grad()
    def __call__(self, videos: Tensor) -> Tensor:
        seen = torch.cat([self.network(x) for x in (2 * videos - 1).split(16)])
        frames = seen.mean(dim=(3, 4))  # b c f
        if self.over_time:
            return torch.cat([frames.mean(dim=2), frames.std(dim=2)], dim=1)
        return frames.mean(dim=2)


def blurred(videos: Tensor, width: int) -> Tensor:
    frames = rearrange(videos, "b c f h w -> (b f) c h w")
    padded = F.pad(frames, [width // 2] * 4, mode="reflect")
    smooth = F.avg_pool2d(padded, width, stride=1)
    return rearrange(smooth, "(b f) c h w -> b c f h w", b=len(videos))


def shuffled(videos: Tensor) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    orders = [torch.randperm(FRAMES, generator=draw) for _ in videos]
    return torch.stack([v[:, order] for v, order in zip(videos, orders, strict=True)])


def test_noise_blur_shuffled_and_still_videos_are_farther(videos: Tensor) -> None:
    extract = Truncated()
    real, other = videos.split(NUM_CLIPS)
    features = extract(real)

    def distance(changed: Tensor) -> float:
        return float(frechet_distance(features, extract(changed)))

    draw = torch.Generator().manual_seed(2)
    noise = torch.randn(other.shape, generator=draw)
    null = distance(other)
    noisy = [distance((other + s * noise).clamp(0, 1)) for s in (0.02, 0.05, 0.1, 0.2, 0.4)]
    blurry = [distance(blurred(other, width)) for width in (3, 7, 13)]
    assert noisy == sorted(noisy)
    assert blurry == sorted(blurry)
    assert min(noisy[-1], blurry[-1]) > 10 * null
    still = other[:, :, :1].expand_as(other)
    assert distance(shuffled(other)) > 1.1 * null
    assert distance(still) > 1.5 * null


def test_features_of_change_see_a_still_video_more_clearly(videos: Tensor) -> None:
    real, other = videos.split(NUM_CLIPS)
    still = other[:, :, :1].expand_as(other)
    nulls, changed = [], []
    for extract in (Truncated(), Truncated(over_time=True)):
        features = extract(real)
        nulls.append(float(frechet_distance(features, extract(other))))
        changed.append(float(frechet_distance(features, extract(still))))
    assert changed[1] > changed[0]
    assert changed[1] > 1.5 * nulls[1]
