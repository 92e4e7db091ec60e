"""Distances between real and generated videos by the features of an extractor, over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torchmetrics import Metric

from evaluation.metrics.bank import RowBank
from evaluation.metrics.frechet import (
    frechet_distance,
    frechet_distance_at_infinity,
    frechet_distance_of_moments,
)
from evaluation.metrics.kernel import kernel_distance
from evaluation.metrics.moments import Moments


class FeatureBank(RowBank):
    """Features of real and generated videos, each video once.

    ``extractor`` maps uint8 ``b 3 F H W`` to ``b feature_dim``. If it has a method ``features``,
    that is called instead of ``forward``.
    """

    def __init__(self, extractor: nn.Module, feature_dim: int) -> None:
        super().__init__({"real": feature_dim, "generated": feature_dim})
        self.extractor = extractor.eval().requires_grad_(False)

    def update(self, videos: UInt8[Tensor, "b 3 F H W"], ids: Sequence[int], *, real: bool) -> None:
        """Add videos of one size; each id is counted once on each side."""
        extract = getattr(self.extractor, "features", self.extractor)
        with torch.no_grad():
            self.add("real" if real else "generated", ids, extract(videos))


class FrechetVideoDistance(FeatureBank):
    """``frechet_distance`` of real and generated videos.

    It is FVD only if the extractor is I3D: include the extractor in the name of the score.
    """

    def compute(self) -> Float[Tensor, ""]:
        """Raises ``ValueError`` for fewer than two videos on a side; warns if there are few."""
        return frechet_distance(self.rows("real"), self.rows("generated"))


class FrechetVideoDistanceAtInfinity(FeatureBank):
    """``frechet_distance_at_infinity`` of real and generated videos."""

    def compute(self) -> Float[Tensor, ""]:
        """Raises ``ValueError`` for fewer than eight videos on a side."""
        value = frechet_distance_at_infinity(self.rows("real"), self.rows("generated"))
        return torch.tensor(value, dtype=torch.float64)


class KernelVideoDistance(FeatureBank):
    """``kernel_distance`` of real and generated videos: KVD."""

    def compute(self) -> Float[Tensor, ""]:
        """Raises ``ValueError`` for fewer than two videos on a side."""
        return kernel_distance(self.rows("real"), self.rows("generated"))


class FrameBank(RowBank):
    """Features of single frames of real and generated videos, each video once.

    ``num_frames`` uniformly spaced frames of each video are passed to ``extractor`` as videos of
    one frame.
    """

    def __init__(self, extractor: nn.Module, feature_dim: int, num_frames: int) -> None:
        width = feature_dim * num_frames
        super().__init__({"real": width, "generated": width})
        self.extractor = extractor.eval().requires_grad_(False)
        self.num_frames = num_frames

    def update(self, videos: UInt8[Tensor, "b 3 F H W"], ids: Sequence[int], *, real: bool) -> None:
        """Add videos of one size; each id is counted once on each side."""
        with torch.no_grad():
            rows = frame_features(self.extractor, videos, self.num_frames)
        name = "real" if real else "generated"
        self.add(name, ids, rearrange(rows, "b k d -> b (k d)"))

    def frames(self, name: str) -> Float[Tensor, "m d"]:
        return rearrange(self.rows(name), "n (k d) -> (n k) d", k=self.num_frames)


class FrechetFrameDistance(FrameBank):
    """``frechet_distance`` of the frames of real and generated videos; FID with Inception."""

    def compute(self) -> Float[Tensor, ""]:
        """Raises ``ValueError`` for fewer than two frames on a side; warns if there are few."""
        return frechet_distance(self.frames("real"), self.frames("generated"))


class KernelFrameDistance(FrameBank):
    """``kernel_distance`` of the frames of real and generated videos: KID."""

    def compute(self) -> Float[Tensor, ""]:
        """Raises ``ValueError`` for fewer than two frames on a side."""
        return kernel_distance(self.frames("real"), self.frames("generated"))


def frame_features(
    extractor: nn.Module, videos: UInt8[Tensor, "b 3 F H W"], num_frames: int
) -> Float[Tensor, "b k d"]:
    """Extract features of uniformly spaced frames, each passed as a video of one frame.

    Raises ``ValueError`` for videos with fewer than ``num_frames`` frames.
    """
    if videos.shape[2] < num_frames:
        raise ValueError(
            f"videos of {videos.shape[2]} frames: {num_frames} are looked at in each of them"
        )
    places = torch.linspace(0, videos.shape[2] - 1, num_frames).round().long()
    extract = getattr(extractor, "features", extractor)
    rows = extract(rearrange(videos[:, :, places], "b c k H W -> (b k) c 1 H W"))
    return rearrange(rows, "(b k) d -> b k d", k=num_frames)


class FrechetDistanceOfMoments(Metric):
    """``frechet_distance`` from means and scatters, if features do not fit into memory.

    Duplicates are not detected: pass each video to one rank only, once. A state holds number, mean
    and scatter in one row, since merging needs all of them.
    """

    full_state_update = False
    is_differentiable = False
    real: Tensor
    generated: Tensor

    def __init__(self, extractor: nn.Module, feature_dim: int) -> None:
        super().__init__()
        self.extractor = extractor.eval().requires_grad_(False)
        self.feature_dim = feature_dim
        nothing = torch.zeros(1 + feature_dim + feature_dim**2, dtype=torch.float64)
        for name in ("real", "generated"):
            self.add_state(name, default=nothing.clone(), dist_reduce_fx=_merged)

    def update(self, videos: UInt8[Tensor, "b 3 F H W"], *, real: bool) -> None:
        """Add videos of one size."""
        extract = getattr(self.extractor, "features", self.extractor)
        with torch.no_grad():
            row = _packed(Moments.of(extract(videos)))
        name = "real" if real else "generated"
        setattr(self, name, _merged(torch.stack([getattr(self, name), row.to(self.device)])))

    def compute(self) -> Float[Tensor, ""]:
        """Raises ``ValueError`` for fewer than two videos on a side."""
        return frechet_distance_of_moments(
            *(_unpacked(getattr(self, name)) for name in ("real", "generated"))
        )


def _packed(moments: Moments) -> Float[Tensor, " s"]:
    n = torch.tensor([float(moments.n)], dtype=torch.float64, device=moments.mean.device)
    return torch.cat([n, moments.mean, moments.scatter.flatten()])


def _unpacked(row: Float[Tensor, " s"]) -> Moments:
    width = round((len(row) - 0.75) ** 0.5 - 0.5)  # 1 + d + d² = (d + 1/2)² + 3/4
    n, mean, scatter = row.split([1, width, width**2])
    return Moments(int(n), mean, rearrange(scatter, "(d e) -> d e", d=width))


def _merged(rows: Float[Tensor, "ranks s"]) -> Float[Tensor, " s"]:
    some = [_unpacked(row) for row in rows if row[0] > 0]
    if not some:
        return rows[0]
    whole, *others = some
    for one in others:
        whole = whole.merge(one)
    return _packed(whole)
