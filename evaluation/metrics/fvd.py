"""Fréchet distance between two sets of videos, by the features of a given extractor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from evaluation.metrics.bank import RowBank
from evaluation.metrics.frechet import frechet_distance


class FrechetVideoDistance(RowBank):
    """``frechet_distance`` of real and generated videos.

    ``extractor`` maps uint8 ``b 3 F H W`` to ``b feature_dim``. It is called through ``features``
    where it has such a method, so that a module with several outputs may serve. The number is FVD
    only if the extractor is its I3D: name the score after the extractor.
    """

    def __init__(self, extractor: nn.Module, feature_dim: int) -> None:
        super().__init__({"real": feature_dim, "generated": feature_dim})
        self.extractor = extractor.eval().requires_grad_(False)

    def update(self, videos: UInt8[Tensor, "b 3 F H W"], ids: Sequence[int], *, real: bool) -> None:
        """Note videos of one size; ids tell a video from its copies, apart for each side."""
        extract = getattr(self.extractor, "features", self.extractor)
        with torch.no_grad():
            self.add("real" if real else "generated", ids, extract(videos))

    def compute(self) -> Float[Tensor, ""]:
        """Raises ``ValueError`` for fewer than two videos on a side; warns where they are few."""
        return frechet_distance(self.rows("real"), self.rows("generated"))
