"""Features and detections of each video of a set, from which all scores are computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from evaluation.inputs import Videos, look_through
from evaluation.metrics.alignment import Alignment, align, parse_prompt
from evaluation.metrics.motion import motion_scores
from evaluation.metrics.reconstruction import psnr_per_clip, ssim_per_clip
from evaluation.metrics.shapes import FoundShape, find_shapes, is_cut
from evaluation.networks import FeatureExtractors

Reconstruct = Callable[[UInt8[Tensor, "b 3 F H W"]], UInt8[Tensor, "b 3 F H W"]]


@dataclass(frozen=True)
class Detections:
    """Shapes found in a video, their alignment with its prompt, and whether one is cut off by the
    border.
    """

    found: list[FoundShape]
    alignment: Alignment
    cut: bool


@dataclass(frozen=True)
class VideoFeatures:
    """Features of each video of a set, in its order.

    ``features`` and ``frames`` are for the distances, ``motion`` holds the scores named in
    ``MOTION``. ``embeddings`` are compared with texts, and ``consistency`` is measured between
    frame embeddings. ``detections`` are the shapes found. For a tokenizer's reconstruction of the
    videos, ``fidelity`` holds PSNR, SSIM and, with a perceptual network, LPIPS, and
    ``reconstruction_detections`` the shapes found.
    """

    prompts: list[str]
    features: Float[Tensor, "n d"]
    motion: Float[Tensor, "n 3"]
    frames: Float[Tensor, "n k d"] | None = None
    embeddings: Float[Tensor, "n e"] | None = None
    consistency: Float[Tensor, "n 2"] | None = None
    fidelity: Float[Tensor, "n s"] | None = None
    detections: list[Detections] | None = None
    reconstruction_detections: list[Detections] | None = None


def extract_features(
    videos: Videos,
    prompts: Sequence[str],
    extractors: FeatureExtractors,
    shapes: bool,
    description: str,
    features: Float[Tensor, "n d"] | None = None,
    reconstruct: Reconstruct | None = None,
) -> VideoFeatures:
    """Extract features from videos, decoding each of them once.

    ``shapes`` enables the detection of moving shapes; every prompt must then describe some.
    Precomputed ``features`` are not extracted again.
    """

    def look(batch: UInt8[Tensor, "b 3 F H W"], places: list[int]) -> Mapping[str, Sequence[Any]]:
        asked = [prompts[place] for place in places]
        # One video at a time: a batch of large videos in float64 would not fit into memory.
        rows: dict[str, Any] = {"motion": torch.cat([motion_scores(one[None]) for one in batch])}
        if features is None:
            rows["features"] = extractors.features(batch)
        if extractors.frames is not None:
            rows["frames"] = extractors.of_frames(batch)
        rows |= extractors.embedded(batch)
        if shapes:
            rows["detections"] = _look_for_shapes(batch, asked)
        if reconstruct is not None:
            again = reconstruct(batch)
            rows["fidelity"] = _fidelity(batch, again, extractors)
            if shapes:
                rows["reconstruction_detections"] = _look_for_shapes(again, asked)
        return rows

    rows = {
        name: torch.stack(found) if isinstance(found[0], Tensor) else found
        for name, found in look_through(videos, look, description).items()
    }
    if features is not None:
        rows["features"] = features
    return VideoFeatures(list(prompts), **rows)  # type: ignore[arg-type]


def _look_for_shapes(batch: UInt8[Tensor, "b 3 F H W"], prompts: Sequence[str]) -> list[Detections]:
    detections = []
    for video, prompt in zip(batch, prompts, strict=True):
        frames = rearrange(video, "c F H W -> F H W c").numpy()
        found = find_shapes(frames)
        alignment = align(found, parse_prompt(prompt))
        detections.append(Detections(found, alignment, is_cut(frames)))
    return detections


def _fidelity(
    real: UInt8[Tensor, "b 3 F H W"],
    again: UInt8[Tensor, "b 3 F H W"],
    extractors: FeatureExtractors,
) -> Float[Tensor, "b s"]:
    measures = [psnr_per_clip, ssim_per_clip]
    if extractors.perceptual is not None:
        measures.append(extractors.perceptual_distances)
    pairs = list(zip(real.split(1), again.split(1), strict=True))
    return torch.stack([torch.cat([m(*pair).double() for pair in pairs]) for m in measures], dim=1)
