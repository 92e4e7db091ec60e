"""Do generated videos differ from each other, and from those of the training? By distances between
their features.
"""

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
    """Mean distance over pairs of different videos; 0 when all are one. Beside that of real videos
    it says how much of their variety is there. Raises ``ValueError`` for fewer than two.
    """
    x, _ = checked_pair(features, features, least=2)
    return torch.nn.functional.pdist(x).mean()


@dataclass(frozen=True)
class Nearest:
    """For each generated video: the place of the nearest training video, its distance, and the
    distance of the second nearest.
    """

    index: Int[Tensor, " n"]
    distance: Float[Tensor, " n"]
    second: Float[Tensor, " n"]

    @property
    def ratio(self) -> Float[Tensor, " n"]:
        """Nearest over second nearest, in 0..1: near 0 for a copy of one training video, near 1 for
        a video that is like no one of them in particular. 1 where both distances are 0.
        """
        return torch.where(self.second > 0, self.distance / self.second, 1.0)


def nearest(generated: Float[Tensor, "n d"], training: Float[Tensor, "m d"]) -> Nearest:
    """Raises ``ValueError`` for two widths, fewer than two training videos, or no generated one."""
    y, _ = checked_pair(training, training, least=2)
    if generated.ndim != 2 or generated.shape[1] != y.shape[1] or not len(generated):
        raise ValueError(
            f"features of shapes {tuple(generated.shape)} and {tuple(training.shape)}: "
            "must be (videos, features) of one width"
        )
    return _nearest_two(_distances(generated.double(), y))


def nearest_of_others(features: Float[Tensor, "n d"]) -> Nearest:
    """Each video beside all others of its own set: what a set without copies looks like.

    Raises ``ValueError`` for fewer than three.
    """
    x, _ = checked_pair(features, features, least=3)
    return _nearest_two(_distances(x, x).fill_diagonal_(torch.inf))


def _distances(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    # Exact for copies, which a difference of squares would put at a distance from themselves.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _nearest_two(distances: Float[Tensor, "n m"]) -> Nearest:
    values, places = distances.topk(2, dim=1, largest=False)
    return Nearest(places[:, 0], values[:, 0], values[:, 1])


class Diversity(RowBank):
    """``diversity`` of generated videos by the features of an extractor, as ``FeatureBank`` takes
    it.
    """

    def __init__(self, extractor: nn.Module, feature_dim: int) -> None:
        super().__init__({"features": feature_dim})
        self.extractor = extractor.eval().requires_grad_(False)

    def update(self, videos: UInt8[Tensor, "b 3 F H W"], ids: Sequence[int]) -> None:
        """Note videos of one size; ids tell a video from its copies."""
        extract = getattr(self.extractor, "features", self.extractor)
        with torch.no_grad():
            self.add("features", ids, extract(videos))

    def compute(self) -> Float[Tensor, ""]:
        """Raises ``ValueError`` for fewer than two videos."""
        return diversity(self.rows("features"))


class NearestNeighbour(FeatureBank):
    """How near generated videos are to the nearest real one, which for memorisation must be those
    of the training: means of its distance, and of that over the second nearest's.
    """

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Raises ``ValueError`` for fewer than two real videos, or no generated one."""
        found = nearest(self.rows("generated"), self.rows("real"))
        return {"nearest_distance": found.distance.mean(), "nearest_ratio": found.ratio.mean()}
