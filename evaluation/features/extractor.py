"""Base classes of the evaluation's networks: uint8 videos in, one row of features for each out."""

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
    """A frozen network that extracts features of videos. Attributes to set in subclasses:

    ``kind`` is its name in scores (``i3d``). ``feature_dim`` is the width of its features.
    ``least_frames`` and ``least_side`` are the size of the smallest clip. ``settings`` are all
    settings that affect the features. ``sha256`` is the hash of the weights. ``standing`` is "" for
    the published weights, otherwise ``random``, ``tiny`` or ``unverified``.
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
        """Features of videos with values in 0..255 and of any one size."""

    def forward(self, videos: UInt8[Tensor, "b 3 F H W"]) -> Float[Tensor, "b d"]:
        return self.features(videos)

    @property
    def label(self) -> str:
        """``kind``, followed by ``standing`` if the weights are not the published ones."""
        return f"{self.kind}-{self.standing}" if self.standing else self.kind

    def record(self) -> dict[str, Any]:
        """Everything that affects the features, as plain values for a fingerprint."""
        return {"name": self.label, "sha256": self.sha256, **self.settings}

    def check(self, videos: Tensor) -> None:
        """Raise ``ValueError`` for a wrong type, layout or length."""
        if videos.ndim != 5 or videos.shape[1] != 3 or videos.dtype != torch.uint8:
            raise ValueError(
                f"videos of shape {tuple(videos.shape)} and type {videos.dtype}: "
                "must be uint8 (batch, 3, frames, height, width) in 0..255"
            )
        self.check_size(videos.shape[2], videos.shape[3], videos.shape[4])

    def check_size(self, num_frames: int, height: int, width: int) -> None:
        """Raise ``ValueError`` for a clip too short or too small for the network."""
        if num_frames < self.least_frames:
            raise ValueError(
                f"clips of {num_frames} frames: {self.kind} needs at least {self.least_frames}"
            )
        if min(height, width) < self.least_side:
            raise ValueError(
                f"clips of {height}x{width} pixels: {self.kind} needs at least {self.least_side}"
            )

    def freeze(self) -> None:
        """Set eval mode, freeze the parameters, and compute the hash of the weights."""
        self.eval().requires_grad_(False)
        self.sha256 = weights_sha256(self)


class VideoTextExtractor(Extractor):
    """An extractor that embeds videos and texts as unit vectors of one space."""

    @abstractmethod
    def embed_videos(self, videos: UInt8[Tensor, "b 3 F H W"]) -> Float[Tensor, "b e"]:
        """Embeddings of videos with values in 0..255 and of any one size."""

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
    """Load a file of weights into ``module`` and return their standing.

    ``weights`` is ``random``, or a source for ``locate_weights``. ``translate`` renames the tensors
    of the file to those of the module. The file is checked by ``digest``; weights are published if
    that is one of ``published``. Other weights can be used, but scores are named ``unverified``.
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
    """Return ``build()`` with random weights that are equal on every machine and rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
