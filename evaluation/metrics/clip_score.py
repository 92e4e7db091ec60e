"""How well videos fit their texts by a network that embeds both: 100 times the cosine, not clamped.

Hessel et al., 2021, without their clamping at 0, which hides how wrong a video is.
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
    """Embeds videos and texts into one space, as vectors of length 1."""

    def embed_videos(self, videos: UInt8[Tensor, "b 3 F H W"]) -> Float[Tensor, "b e"]: ...

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "b e"]: ...


class ClipScore(RowBank):
    """Mean over videos of 100 times the cosine between a video and its text, in -100..100.

    The network is part of what the number means: name the score after it.
    """

    def __init__(self, embedder: VideoTextEmbedder) -> None:
        super().__init__({"scores": 1})
        self.embedder = embedder

    @torch.no_grad()
    def update(
        self, videos: UInt8[Tensor, "b 3 F H W"], texts: Sequence[str], ids: Sequence[int]
    ) -> None:
        """Note videos of one size with a text each; ids tell a video from its copies."""
        if len(videos) != len(texts):
            raise ValueError(
                f"{len(videos)} videos and {len(texts)} texts: give one text for each video"
            )
        embedded = self.embedder.embed_videos(videos) * self.embedder.embed_texts(texts)
        self.add("scores", ids, 100 * embedded.sum(dim=1, keepdim=True))

    def compute(self) -> Float[Tensor, ""]:
        """NaN before any video came."""
        return self.rows("scores").mean()
