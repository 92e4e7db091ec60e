"""Diversity of generated videos and their distance to the training videos, in feature space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from evaluation.metrics.bank import RowBank
from evaluation.metrics.frechet import checked_pair
from evaluation.metrics.fvd import FeatureBank


def diversity(features: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Mean distance over pairs of different videos; 0 if all are equal.

    Compare it with the diversity of real videos. Raises ``ValueError`` for fewer than two videos.
    """
    x, _ = checked_pair(features, features, least=2)
    return torch.nn.functional.pdist(x).mean()


@dataclass(frozen=True)
class Nearest:
    """Nearest training video of each generated one, its distance, and the second distance."""

    index: Int[Tensor, " n"]
    distance: Float[Tensor, " n"]
    second: Float[Tensor, " n"]

    @property
    def ratio(self) -> Float[Tensor, " n"]:
        """Ratio of the nearest to the second nearest distance, in 0..1.

        It is near 0 for a copy of a single training video, and near 1 for a video without a
        particular neighbour. It is 1 if both distances are 0.
        """
        return torch.where(self.second > 0, self.distance / self.second, 1.0)


def nearest(generated: Float[Tensor, "n d"], training: Float[Tensor, "m d"]) -> Nearest:
    """Find the two nearest training videos of each generated one.

    Raises ``ValueError`` for different widths, fewer than two training videos, or no generated
    video.
    """
    y, _ = checked_pair(training, training, least=2)
    if generated.ndim != 2 or generated.shape[1] != y.shape[1] or not len(generated):
        raise ValueError(
            f"features of shapes {tuple(generated.shape)} and {tuple(training.shape)}: "
            "must be (videos, features) of one width"
        )
    return _nearest_two(_distances(generated.double(), y))


def nearest_of_others(features: Float[Tensor, "n d"]) -> Nearest:
    """Find the two nearest other videos of each video of a set.

    Raises ``ValueError`` for fewer than three videos.
    """
    x, _ = checked_pair(features, features, least=3)
    return _nearest_two(_distances(x, x).fill_diagonal_(torch.inf))


def _distances(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    # Exact for copies; with a difference of squares their distance would not be 0.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _nearest_two(distances: Float[Tensor, "n m"]) -> Nearest:
    values, places = distances.topk(2, dim=1, largest=False)
    return Nearest(places[:, 0], values[:, 0], values[:, 1])


class Diversity(RowBank):
    """``diversity`` of generated videos by an extractor, with the interface of ``FeatureBank``."""

    def __init__(self, extractor: nn.Module, feature_dim: int) -> None:
        super().__init__({"features": feature_dim})
        self.extractor = extractor.eval().requires_grad_(False)

    def update(self, videos: UInt8[Tensor, "b 3 F H W"], ids: Sequence[int]) -> None:
        """Add videos of one size; each id is counted once."""
        extract = getattr(self.extractor, "features", self.extractor)
        with torch.no_grad():
            self.add("features", ids, extract(videos))

    def compute(self) -> Float[Tensor, ""]:
        """Return the diversity; raise ``ValueError`` for fewer than two videos."""
        return diversity(self.rows("features"))


class NearestNeighbour(FeatureBank):
    """Mean distance of generated videos to the nearest real one, and mean ``Nearest.ratio``.

    To detect memorisation, the real videos must be those of the training.
    """

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Raises ``ValueError`` for fewer than two real videos, or no generated one."""
        found = nearest(self.rows("generated"), self.rows("real"))
        return {"nearest_distance": found.distance.mean(), "nearest_ratio": found.ratio.mean()}
