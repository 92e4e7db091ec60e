"""Motion scores: flicker, dynamic degree, smoothness and temporal consistency.

Dynamic degree and smoothness are proxies without a network. VBench computes scores of the same
names with RAFT and with an interpolation network; their values are not comparable. A still video
has the best flicker, smoothness and consistency, so read those with the dynamic degree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from einops import reduce
from jaxtyping import Float, UInt8
from torch import Tensor

from evaluation.metrics.bank import RowBank

MOTION = ("flicker", "proxy/dynamic_degree", "proxy/motion_smoothness")
# A change of at least this many of 255 levels is motion; less is noise or compression.
LEAST_CHANGE = 16


def flicker(videos: UInt8[Tensor, "b 3 F H W"]) -> Float[Tensor, " b"]:
    """1 minus the mean absolute change between successive frames, in 0..1.

    This is VBench's temporal flickering (Huang et al., 2024), intended for prompts of still scenes.
    """
    return 1 - reduce(_changes(videos).abs(), "b c F H W -> b", "mean") / 255


def dynamic_degree(videos: UInt8[Tensor, "b 3 F H W"]) -> Float[Tensor, " b"]:
    """Share of pixels that change by at least ``LEAST_CHANGE`` levels between successive frames."""
    greatest = reduce(_changes(videos).abs(), "b c F H W -> b F H W", "max")
    return reduce((greatest >= LEAST_CHANGE).double(), "b F H W -> b", "mean")


def motion_smoothness(videos: UInt8[Tensor, "b 3 F H W"]) -> Float[Tensor, " b"]:
    """1 minus the mean absolute difference of a frame from the mean of its neighbours, in 0..1."""
    x = _checked(videos, least=3)
    between = (x[:, :, :-2] + x[:, :, 2:]) / 2
    return 1 - reduce((x[:, :, 1:-1] - between).abs(), "b c F H W -> b", "mean") / 255


def motion_scores(videos: UInt8[Tensor, "b 3 F H W"]) -> Float[Tensor, "b 3"]:
    """Scores of each video in the order of ``MOTION``."""
    return torch.stack([flicker(videos), dynamic_degree(videos), motion_smoothness(videos)], dim=1)


def consistency(frames: Float[Tensor, "b F e"]) -> Float[Tensor, " b"]:
    """Mean cosine of successive frame embeddings (unit vectors); 1 for a still video."""
    return (frames[:, 1:] * frames[:, :-1]).sum(dim=-1).double().mean(dim=1)


def consistency_with_first(frames: Float[Tensor, "b F e"]) -> Float[Tensor, " b"]:
    """Temporal consistency as in VBench.

    For each frame after the first, average its cosines with the previous frame and with the first
    frame, both clamped at 0; then average over frames.
    """
    before = (frames[:, 1:] * frames[:, :-1]).sum(dim=-1).clamp(min=0)
    first = (frames[:, 1:] * frames[:, :1]).sum(dim=-1).clamp(min=0)
    return ((before + first) / 2).double().mean(dim=1)


@runtime_checkable
class FrameEmbedder(Protocol):
    """Protocol for networks that embed each frame as a unit vector."""

    def embed_frames(self, videos: UInt8[Tensor, "b 3 F H W"]) -> Float[Tensor, "b F e"]: ...


class Motion(RowBank):
    """Means over videos of the scores named in ``MOTION``."""

    def __init__(self) -> None:
        super().__init__({"scores": len(MOTION)})

    def update(self, videos: UInt8[Tensor, "b 3 F H W"], ids: Sequence[int]) -> None:
        """Add videos of one size; each id is counted once."""
        self.add("scores", ids, motion_scores(videos))

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Return the means; NaN before the first update."""
        return dict(zip(MOTION, self.rows("scores").mean(dim=0), strict=True))


class TemporalConsistency(RowBank):
    """Means over videos of ``consistency`` and ``consistency_with_first`` of a network."""

    def __init__(self, embedder: FrameEmbedder) -> None:
        super().__init__({"scores": 2})
        self.embedder = embedder

    @torch.no_grad()
    def update(self, videos: UInt8[Tensor, "b 3 F H W"], ids: Sequence[int]) -> None:
        """Add videos of one size; each id is counted once."""
        _checked(videos, least=2)
        frames = self.embedder.embed_frames(videos)
        rows = torch.stack([consistency(frames), consistency_with_first(frames)], dim=1)
        self.add("scores", ids, rows)

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Return the means; NaN before the first update."""
        successive, with_first = self.rows("scores").mean(dim=0)
        return {"consistency": successive, "consistency_with_first": with_first}


def _changes(videos: UInt8[Tensor, "b 3 F H W"]) -> Float[Tensor, "b 3 F-1 H W"]:
    return _checked(videos, least=2).diff(dim=2)


def _checked(videos: UInt8[Tensor, "b 3 F H W"], least: int) -> Float[Tensor, "b 3 F H W"]:
    if videos.ndim != 5 or videos.dtype != torch.uint8 or videos.shape[2] < least:
        raise ValueError(
            f"videos of shape {tuple(videos.shape)} and type {videos.dtype}: "
            f"must be uint8 (batch, 3, frames >= {least}, height, width)"
        )
    return videos.double()
