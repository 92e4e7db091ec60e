"""Feature extractors of a protocol, built and moved to their device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from evaluation.features import Clip, Extractor, Lpips, VideoTextExtractor, load_tiny
from evaluation.features.clip import spaced
from evaluation.metrics.fvd import frame_features
from evaluation.metrics.motion import consistency, consistency_with_first
from evaluation.protocol import Protocol

_TEXTS = 64  # per batch of a network


@dataclass(frozen=True)
class FeatureExtractors:
    """Networks that compute the features behind the scores.

    ``videos`` is for FVD, ``frames`` for FID, ``texts`` for the CLIP score and ``perceptual`` for
    LPIPS. ``notes`` are those saved with the small networks.
    """

    videos: Extractor
    frames: Extractor | None
    texts: VideoTextExtractor | None
    perceptual: Lpips | None
    frames_per_video: int
    device: str
    notes: dict[str, Any]

    @torch.no_grad()
    def features(self, videos: UInt8[Tensor, "b 3 F H W"]) -> Float[Tensor, "b d"]:
        return self.videos.features(videos.to(self.device)).cpu()

    @torch.no_grad()
    def of_frames(self, videos: UInt8[Tensor, "b 3 F H W"]) -> Float[Tensor, "b k d"]:
        assert self.frames is not None
        return frame_features(self.frames, videos.to(self.device), self.frames_per_video).cpu()

    @torch.no_grad()
    def embedded(self, videos: UInt8[Tensor, "b 3 F H W"]) -> dict[str, Float[Tensor, "b _"]]:
        """Return ``embeddings`` of videos and, with CLIP, the ``consistency`` of their frames.

        The product of an embedding with a text's embedding is their mean cosine over the sampled
        frames. The two columns of ``consistency`` compare successive frames, and frames with the
        first one. The result is empty without a network for texts.
        """
        if self.texts is None:
            return {}
        videos = videos.to(self.device)
        if not isinstance(self.texts, Clip):
            return {"embeddings": self.texts.embed_videos(videos).cpu()}
        frames = self.texts.embed_frames(videos)
        looked_at = frames[:, spaced(frames.shape[1], self.texts.num_frames)]
        both = torch.stack([consistency(frames), consistency_with_first(frames)], dim=1)
        return {"embeddings": looked_at.mean(dim=1).cpu(), "consistency": both.cpu()}

    @torch.no_grad()
    def perceptual_distances(
        self, real: UInt8[Tensor, "b 3 F H W"], other: UInt8[Tensor, "b 3 F H W"]
    ) -> Float[Tensor, " b"]:
        assert self.perceptual is not None
        return self.perceptual(real.to(self.device), other.to(self.device)).cpu()

    @torch.no_grad()
    def texts_embedded(self, texts: Sequence[str]) -> Float[Tensor, "b e"]:
        assert self.texts is not None
        parts = [texts[i : i + _TEXTS] for i in range(0, len(texts), _TEXTS)]
        return torch.cat([self.texts.embed_texts(part).cpu() for part in parts])

    def check_size(self, num_frames: int, height: int, width: int) -> None:
        """Raise ``ValueError`` for clips too short or too small for one of the networks."""
        self.videos.check_size(num_frames, height, width)
        for network in (self.frames, self.texts):
            if network is not None:
                network.check_size(max(num_frames, network.least_frames), height, width)
        if self.frames is not None and self.frames_per_video > num_frames:
            raise ValueError(
                f"networks.frames_per_video = {self.frames_per_video}: "
                f"clips have {num_frames} frames"
            )
        if self.perceptual is not None:
            self.perceptual.check_size(height, width)

    def record(self) -> dict[str, Any]:
        """All settings of the networks that affect scores, including hashes of weights."""
        record: dict[str, Any] = {"videos": self.videos.record()}
        if self.frames is not None:
            record["frames"] = {**self.frames.record(), "per_video": self.frames_per_video}
        if self.texts is not None:
            record["texts"] = self.texts.record()
        if self.perceptual is not None:
            record["perceptual"] = self.perceptual.record()
        return record


def score_name(base: str, network: Extractor) -> str:
    """Return the name of a score computed with a network.

    It is ``fvd`` or ``kvd`` for the published I3D and ``fid`` or ``kid`` for the published
    Inception. Any other network, and random or unverified weights, are part of the name.
    """
    published = {"fvd": "i3d", "kvd": "i3d", "fid": "inception", "kid": "inception"}
    return base if network.label == published.get(base) else f"{base}-{network.label}"


def build_extractors(protocol: Protocol, networks: Path | None, device: str) -> FeatureExtractors:
    """Build the networks of a protocol on a device.

    Raises ``ValueError`` for weights that are missing or have the wrong hash.
    """
    named = protocol.networks
    notes: dict[str, Any] = {}
    texts: VideoTextExtractor | None = None
    if named.videos is not None:
        videos = named.videos()
    elif networks is not None:
        saved = load_tiny(networks)
        videos, texts, notes = saved.network, saved.network, saved.notes
    else:
        raise ValueError(
            f"protocol {protocol.name}: names neither networks.videos nor paths.networks; "
            "give --networks"
        )
    frames = named.frames() if named.frames is not None else None
    texts = named.texts() if named.texts is not None else texts
    perceptual = named.perceptual() if named.perceptual is not None else None
    for network in (videos, frames, texts, perceptual):
        if network is not None:
            network.to(device)
    return FeatureExtractors(
        videos, frames, texts, perceptual, named.frames_per_video, device, notes
    )
