"""What every network of the evaluation is: uint8 videos in, one row of features for each out, and a
standing that its scores carry in their names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from evaluation.features.weights import (
    check_digest_form,
    load_exactly,
    locate_weights,
    read_weights,
    unwrapped,
    weights_sha256,
)

RANDOM = "random"


class Extractor(nn.Module, ABC):
    """A frozen network. Attributes that a subclass sets:

    ``kind`` names it in scores (``i3d``); ``feature_dim`` is the width of its features;
    ``least_frames`` and ``least_side`` the smallest clip it takes; ``settings`` all that moves its
    features but the weights; ``sha256`` of the weights; ``standing`` is "" for the published
    weights, ``random``, ``tiny`` or ``unverified``.
    """

    kind: str
    feature_dim: int
    least_frames: int = 1
    least_side: int = 1
    settings: dict[str, Any]
    sha256: str
    standing: str

    @abstractmethod
    def features(self, videos: UInt8[Tensor, "b 3 F H W"]) -> Float[Tensor, "b d"]:
        """Of videos as files hold them: 0..255, of any one size."""

    def forward(self, videos: UInt8[Tensor, "b 3 F H W"]) -> Float[Tensor, "b d"]:
        return self.features(videos)

    @property
    def label(self) -> str:
        """``kind``, and the standing of the weights where they are not the published ones."""
        return f"{self.kind}-{self.standing}" if self.standing else self.kind

    def record(self) -> dict[str, Any]:
        """All that moves the features, as plain values for a fingerprint."""
        return {"name": self.label, "sha256": self.sha256, **self.settings}

    def check(self, videos: Tensor) -> None:
        """Raises ``ValueError`` for another type, layout or length than the network takes."""
        if videos.ndim != 5 or videos.shape[1] != 3 or videos.dtype != torch.uint8:
            raise ValueError(
                f"videos of shape {tuple(videos.shape)} and type {videos.dtype}: "
                "must be uint8 (batch, 3, frames, height, width) in 0..255"
            )
        self.check_size(videos.shape[2], videos.shape[3], videos.shape[4])

    def check_size(self, num_frames: int, height: int, width: int) -> None:
        """Raises ``ValueError`` for a clip too short or too small for the network."""
        if num_frames < self.least_frames:
            raise ValueError(
                f"clips of {num_frames} frames: {self.kind} needs at least {self.least_frames}"
            )
        if min(height, width) < self.least_side:
            raise ValueError(
                f"clips of {height}x{width} pixels: {self.kind} needs at least {self.least_side}"
            )

    def freeze(self) -> None:
        """For evaluation alone; and the hash of the weights is taken."""
        self.eval().requires_grad_(False)
        self.sha256 = weights_sha256(self)


class VideoTextExtractor(Extractor):
    """An extractor that embeds videos and texts into one space, as vectors of length 1."""

    @abstractmethod
    def embed_videos(self, videos: UInt8[Tensor, "b 3 F H W"]) -> Float[Tensor, "b e"]:
        """Embeddings of videos as files hold them: 0..255, of any one size."""

    @abstractmethod
    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "b e"]:
        """Embeddings of texts. Raises ``ValueError`` for a text without words."""


def fill(
    module: nn.Module,
    weights: str,
    digest: str,
    published: tuple[str, ...],
    translate: Any = lambda tensors: tensors,
) -> str:
    """Load a file into ``module`` and give its standing.

    ``weights`` is ``random``, or what ``locate_weights`` takes; ``translate`` gives a file's
    tensors the names of the module's. Weights count as published when ``digest``, which they are
    checked by, is one of ``published``; others may serve, under a name of their own.
    """
    check_digest_form(digest)
    if weights == RANDOM:
        if digest:
            raise ValueError(f"weights 'random' with digest {digest!r}: drawn weights have none")
        return RANDOM
    path = locate_weights(weights, digest)
    load_exactly(module, translate(unwrapped(read_weights(path))), str(path))
    return "" if digest in published else "unverified"


def drawn(build: Any, seed: int = 0) -> Any:
    """What ``build()`` makes, with random weights that are the same on every machine and rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
