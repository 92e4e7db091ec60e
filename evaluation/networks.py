"""Feature extractors of a protocol, built and moved to their device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor

from evaluation.features import Clip, Extractor, Lpips, TinyFile, TinyNetwork, load_tiny
from evaluation.features.clip import spaced
from evaluation.metrics.fvd import frame_features
from evaluation.metrics.motion import consistency, consistency_with_first
from evaluation.protocol import Part, Protocol
from sora_lightning.trust import import_class

_TEXTS = 64  # per batch of a network


@dataclass(frozen=True)
class FeatureExtractors:
    """Networks that compute the features behind the scores.

    ``videos`` is for FVD, ``frames`` for FID, ``texts`` for the CLIP score and ``perceptual`` for
    LPIPS. ``notes`` are those saved with the small networks.
    """

    videos: Extractor
    frames: Extractor | None
    texts: Clip | TinyNetwork | TinyFile | None
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

    Raises ``ValueError`` for a class that cannot be built or weights with the wrong hash.
    """
    named = protocol.networks
    notes: dict[str, Any] = {}
    videos: Extractor
    texts: Clip | TinyNetwork | TinyFile | None = None
    if named.videos is None:
        if networks is None:
            raise ValueError(
                f"protocol {protocol.name}: names neither networks.videos nor paths.networks; "
                "give --networks"
            )
        saved = load_tiny(networks)
        videos, texts, notes = saved.network, saved.network, saved.notes
    else:
        videos = build_part(named.videos, Extractor, "networks.videos")
    frames: Extractor | None = None
    if named.frames is not None:
        frames = build_part(named.frames, Extractor, "networks.frames")
    if named.texts is not None:
        texts = build_part(named.texts, Extractor, "networks.texts")
        if not hasattr(texts, "embed_texts"):
            raise ValueError(f"networks.texts = {named.texts.class_path}: does not embed texts")
    perceptual: Lpips | None = None
    if named.perceptual is not None:
        perceptual = build_part(named.perceptual, Lpips, "networks.perceptual")
    for network in (videos, frames, texts, perceptual):
        if network is not None:
            network.to(device)
    return FeatureExtractors(
        videos, frames, texts, perceptual, named.frames_per_video, device, notes
    )


def build_part(part: Part, kind: type, where: str) -> Any:
    """Build an object of ``kind`` or a subclass from its class path and type-checked arguments."""
    try:
        chosen = import_class(part.class_path)
    except ValueError as error:
        raise ValueError(f"{where} = {error}") from error
    if not (isinstance(chosen, type) and issubclass(chosen, kind)):
        raise ValueError(f"{where} = {part.class_path}: is not a {kind.__name__}")
    # Added as arguments of the class, not as a subclass: a ValueError of the class itself is then
    # passed on unchanged.
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(chosen, "part")
    try:
        parsed = parser.parse_object({"part": dict(part.init_args)})
    except ArgumentError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{where} = {part.class_path}: {reason}") from error
    return parser.instantiate(parsed).part
