"""FVD, CLIP score and motion of generated videos during training.

For ``sora_lightning.callbacks.ScoreVideos``; the values are those of ``python -m evaluation``.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from evaluation.features.cache import FeatureCache
from evaluation.features.extractor import Extractor, VideoTextExtractor
from evaluation.inputs import (
    CutClips,
    dataset_sha256,
    long_enough,
    look_through,
    read_listing,
)
from evaluation.metrics.bank import RowBank
from evaluation.metrics.frechet import frechet_distance, jackknife_interval
from evaluation.metrics.intervals import bootstrap_interval
from evaluation.metrics.motion import MOTION, motion_scores
from evaluation.networks import score_name
from evaluation.protocol import ClipSpec

LEAST_VIDEOS = 8


class FVD(RowBank):
    """Fréchet distance between generated videos and a reference, with its jackknife interval.

    The score is named ``fvd`` only with the published I3D; any other network is part of the name.
    Features of the reference are computed once and kept in ``cache`` under the hash of its files.

    Args:
        network: Extractor of the features.
        reference: Manifest or folder of real videos. Their middle window is used, at the model's
            size and frame rate; shorter videos are left out.
        num_reference: Number of reference videos to use, from the first; all if None.
        cache: Folder for the features of the reference.
        root: A folder, besides the reference's own, in which its files may lie.
    """

    def __init__(
        self,
        network: Extractor,
        reference: Path,
        num_reference: int | None = None,
        cache: Path = Path("runs/reference_features"),
        root: str | None = None,
    ) -> None:
        super().__init__({"generated": network.feature_dim})
        self.network = network
        self.reference, self.num_reference, self.cache = reference, num_reference, cache
        self.root = root
        self.name = score_name("fvd", network)
        self.real: Float[Tensor, "n d"] = torch.zeros(0, network.feature_dim)

    def prepare(
        self, prompts: list[str], num_frames: int, height: int, width: int, fps: float
    ) -> list[str]:
        clips = ClipSpec(num_frames, float(fps), (f"{height}x{width}",))
        listed = read_listing(self.reference, prompts=False, root=self.root)
        entries = [entry for entry in listed if long_enough(entry, clips)][: self.num_reference]
        for number, kind in (
            (len(prompts), "prompts"),
            (len(entries), "long reference videos"),
        ):
            if number < LEAST_VIDEOS:
                raise ValueError(f"FVD of {number} {kind}: needs at least {LEAST_VIDEOS}")
        self.network.check_size(num_frames, height, width)
        settings = {"clips": [num_frames, fps, height, width], "network": self.network.record()}
        content = dataset_sha256(entries)
        kept = FeatureCache(self.cache, self.network.label, content, settings)
        known = kept.read()
        if known is None:
            rows = look_through(
                CutClips(entries, clips, "middle", seed=0),
                lambda batch, _: {"features": list(self._features(batch))},
                "reference",
            )
            known = torch.stack(rows["features"])
            kept.write(known)
        self.real = known.double()
        return [self.name, f"{self.name}/low", f"{self.name}/high"]

    def update(self, videos: Tensor, ids: Sequence[int]) -> None:
        self.add("generated", ids, self._features(videos))

    def compute(self) -> dict[str, float]:
        generated, reference = self.rows("generated").cpu(), self.real
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about few videos, at every validation
            value = float(frechet_distance(generated, reference))
            low, high = jackknife_interval(generated, reference)
        return {self.name: value, f"{self.name}/low": max(0.0, low), f"{self.name}/high": high}

    @torch.no_grad()
    def _features(self, videos: Tensor) -> Tensor:
        return self.network.features(videos.to(self.device)).cpu()


class CLIPScore(RowBank):
    """100 times the cosine between each video and its prompt: mean with a bootstrap interval.

    The network is part of the name.
    """

    def __init__(self, network: VideoTextExtractor) -> None:
        super().__init__({"scores": 1})
        self.network = network
        self.name = f"clip_score-{network.label.removeprefix('clip-')}"
        self.texts: Float[Tensor, "n e"] = torch.zeros(0, 0)

    def prepare(
        self, prompts: list[str], num_frames: int, height: int, width: int, fps: float
    ) -> list[str]:
        self.network.check_size(num_frames, height, width)
        with torch.no_grad():
            self.texts = torch.cat([self.network.embed_texts([text]).cpu() for text in prompts])
        return [self.name, f"{self.name}/low", f"{self.name}/high"]

    @torch.no_grad()
    def update(self, videos: Tensor, ids: Sequence[int]) -> None:
        embedded = self.network.embed_videos(videos.to(self.device)).cpu()
        cosines = (embedded * self.texts[list(ids)]).sum(dim=1, keepdim=True)
        self.add("scores", ids, 100 * cosines)

    def compute(self) -> dict[str, float]:
        return _mean_with_interval(self.name, self.rows("scores")[:, 0].cpu().numpy())


class Motion(RowBank):
    """Flicker, dynamic degree and motion smoothness of generated videos; see ``metrics.motion``."""

    def __init__(self) -> None:
        super().__init__({"motion": len(MOTION)})

    def prepare(
        self, prompts: list[str], num_frames: int, height: int, width: int, fps: float
    ) -> list[str]:
        return [f"{name}{part}" for name in MOTION for part in ("", "/low", "/high")]

    def update(self, videos: Tensor, ids: Sequence[int]) -> None:
        self.add("motion", ids, motion_scores(videos))

    def compute(self) -> dict[str, float]:
        scores: dict[str, float] = {}
        for name, column in zip(MOTION, self.rows("motion").cpu().numpy().T, strict=True):
            scores |= _mean_with_interval(name, column)
        return scores


def _mean_with_interval(name: str, values: Float[np.ndarray, " n"]) -> dict[str, float]:
    low, high = bootstrap_interval(values)
    return {name: float(values.mean()), f"{name}/low": low, f"{name}/high": high}
