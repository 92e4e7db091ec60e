"""How frames follow one another. The two named proxies need no network; they stand in for VBench's
scores of the same idea, by RAFT and by a network that interpolates, and compare with none of them.

A still video has the best flicker, smoothness and consistency: read them beside the dynamic degree.
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
# A change of this many of 255 levels is movement; less is grain, and what lossy files do.
LEAST_CHANGE = 16


def flicker(videos: UInt8[Tensor, "b 3 F H W"]) -> Float[Tensor, " b"]:
    """1 less the mean absolute change from frame to frame, in 0..1: VBench's temporal flickering
    (Huang et al., 2024), meant for prompts of still scenes.
    """
    return 1 - reduce(_changes(videos).abs(), "b c F H W -> b", "mean") / 255


def dynamic_degree(videos: UInt8[Tensor, "b 3 F H W"]) -> Float[Tensor, " b"]:
    """The part of pixels that change by ``LEAST_CHANGE`` levels or more from frame to frame."""
    greatest = reduce(_changes(videos).abs(), "b c F H W -> b F H W", "max")
    return reduce((greatest >= LEAST_CHANGE).double(), "b F H W -> b", "mean")


def motion_smoothness(videos: UInt8[Tensor, "b 3 F H W"]) -> Float[Tensor, " b"]:
    """1 less the mean absolute difference of a frame from the mean of its neighbours, in 0..1."""
    x = _checked(videos, least=3)
    between = (x[:, :, :-2] + x[:, :, 2:]) / 2
    return 1 - reduce((x[:, :, 1:-1] - between).abs(), "b c F H W -> b", "mean") / 255


def motion_scores(videos: UInt8[Tensor, "b 3 F H W"]) -> Float[Tensor, "b 3"]:
    """In the order of ``MOTION``."""
    return torch.stack([flicker(videos), dynamic_degree(videos), motion_smoothness(videos)], dim=1)


def consistency(frames: Float[Tensor, "b F e"]) -> Float[Tensor, " b"]:
    """Mean cosine of successive frames' embeddings, which are of length 1. A still scores 1."""
    return (frames[:, 1:] * frames[:, :-1]).sum(dim=-1).double().mean(dim=1)


def consistency_with_first(frames: Float[Tensor, "b F e"]) -> Float[Tensor, " b"]:
    """VBench's form: for each frame after the first, the mean of its cosines with the frame before
    and with the first, neither below 0; mean over frames.
    """
    before = (frames[:, 1:] * frames[:, :-1]).sum(dim=-1).clamp(min=0)
    first = (frames[:, 1:] * frames[:, :1]).sum(dim=-1).clamp(min=0)
    return ((before + first) / 2).double().mean(dim=1)


@runtime_checkable
class FrameEmbedder(Protocol):
    """Embeds each frame as a vector of length 1."""

    def embed_frames(self, videos: UInt8[Tensor, "b 3 F H W"]) -> Float[Tensor, "b F e"]: ...


class Motion(RowBank):
    """Means over videos of the scores named in ``MOTION``."""

    def __init__(self) -> None:
        super().__init__({"scores": len(MOTION)})

    def update(self, videos: UInt8[Tensor, "b 3 F H W"], ids: Sequence[int]) -> None:
        """Note videos of one size; ids tell a video from its copies."""
        self.add("scores", ids, motion_scores(videos))

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """NaN before any video came."""
        return dict(zip(MOTION, self.rows("scores").mean(dim=0), strict=True))


class TemporalConsistency(RowBank):
    """Means over videos of ``consistency`` and ``consistency_with_first`` by a given network."""

    def __init__(self, embedder: FrameEmbedder) -> None:
        super().__init__({"scores": 2})
        self.embedder = embedder

    @torch.no_grad()
    def update(self, videos: UInt8[Tensor, "b 3 F H W"], ids: Sequence[int]) -> None:
        """Note videos of one size; ids tell a video from its copies."""
        _checked(videos, least=2)
        frames = self.embedder.embed_frames(videos)
        rows = torch.stack([consistency(frames), consistency_with_first(frames)], dim=1)
        self.add("scores", ids, rows)

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """NaN before any video came."""
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
