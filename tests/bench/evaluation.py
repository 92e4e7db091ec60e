"""The Fréchet distance of 2 x 256 clips, on given features and from pixels, beside torchmetrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from evaluation.metrics import FrechetVideoDistance

if TYPE_CHECKING:
    from tests.bench.report import Report

CLIPS, BATCH, WIDTH = 256, 32, 400


class Given(nn.Module):
    """Features that are there already, in the form of videos of one row of pixels."""

    num_features = WIDTH

    def forward(self, rows: Tensor) -> Float[Tensor, "b d"]:
        return rows[:, 0, 0, 0].float()


class Pixels(nn.Module):
    """A small convolution to as many features as I3D has."""

    num_features = WIDTH

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(3, WIDTH, 4, stride=4)

    def forward(self, videos: Tensor) -> Float[Tensor, "b d"]:
        return reduce(self.convolution(videos.float() / 127.5 - 1), "b d f h w -> b d", "mean")


def run(report: Report) -> None:
    torch.manual_seed(0)
    rows = torch.randint(0, 256, (2 * CLIPS, 1, 1, 1, WIDTH), dtype=torch.uint8)
    videos = torch.randint(0, 256, (2 * CLIPS, 3, 8, 32, 32), dtype=torch.uint8)
    for case, network, clips in (
        ("given features", Given(), rows),
        ("from pixels", Pixels(), videos),
    ):
        candidates = {"evaluation": ours(network, clips), "torchmetrics": theirs(network, clips)}
        report.compare(
            f"FVD of 2 x {CLIPS} clips, {case}", candidates, items=2 * CLIPS, unit="clips"
        )


def ours(network: nn.Module, clips: Tensor) -> Callable[[], Tensor]:
    def score() -> Tensor:
        metric = FrechetVideoDistance(network, WIDTH)
        for start in range(0, 2 * CLIPS, BATCH):
            ids = range(start, start + BATCH)
            metric.update(clips[start : start + BATCH], ids, real=start < CLIPS)
        return metric.compute()

    return score


def theirs(network: nn.Module, clips: Tensor) -> Callable[[], Tensor]:
    def score() -> Tensor:
        metric = FrechetInceptionDistance(feature=network)
        for start in range(0, 2 * CLIPS, BATCH):
            metric.update(clips[start : start + BATCH], real=start < CLIPS)
        return metric.compute()

    return score
