"""Do generated videos differ from each other, and from those of the training? By distances between
their features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from evaluation.metrics.frechet import checked_pair


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
    # Exact for copies, which a difference of squares would put at a distance from themselves.
    distances = torch.cdist(generated.double(), y, compute_mode="donot_use_mm_for_euclid_dist")
    values, places = distances.topk(2, dim=1, largest=False)
    return Nearest(places[:, 0], values[:, 0], values[:, 1])
