"""CLIP score: 100 times the cosine between video and text embeddings.

Unlike in Hessel et al., 2021, the cosine is not clamped at 0, which would hide how wrong a video
is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from evaluation.metrics.bank import RowBank


@runtime_checkable
class VideoTextEmbedder(Protocol):
    """Protocol for networks that embed videos and texts as unit vectors of one space."""

    def embed_videos(self, videos: UInt8[Tensor, "b 3 F H W"]) -> Float[Tensor, "b e"]: ...

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "b e"]: ...


class ClipScore(RowBank):
    """Mean over videos of 100 times the cosine between a video and its text, in -100..100.

    Values depend on the network: include it in the name of the score.
    """

    def __init__(self, embedder: VideoTextEmbedder) -> None:
        super().__init__({"scores": 1})
        self.embedder = embedder

    @torch.no_grad()
    def update(
        self, videos: UInt8[Tensor, "b 3 F H W"], texts: Sequence[str], ids: Sequence[int]
    ) -> None:
        """Add videos of one size with one text each; each id is counted once."""
        if len(videos) != len(texts):
            raise ValueError(
                f"{len(videos)} videos and {len(texts)} texts: give one text for each video"
            )
        embedded = self.embedder.embed_videos(videos) * self.embedder.embed_texts(texts)
        self.add("scores", ids, 100 * embedded.sum(dim=1, keepdim=True))

    def compute(self) -> Float[Tensor, ""]:
        """Return the mean; NaN before the first update."""
        return self.rows("scores").mean()
