"""Assigns clips to sizes, sets the batch size of each, and scales clips to their size."""

from __future__ import annotations

import itertools
import math
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from sora_lightning.checks import require_at_least, require_positive
from sora_lightning.data.decoding.video_metadata import VideoMetadata
from sora_lightning.data.manifest.filters import Filter
from sora_lightning.data.manifest.memory_mapped import chosen
from sora_lightning.data.manifest.records import ClipRecord
from sora_lightning.types import VideoSize


class Removal(Enum):
    """Reasons for which a clip takes no part in training. The value is shown to users."""

    TOO_SMALL = "smaller than every size (clips are never upscaled)"
    TOO_SHORT = "too short for every size that it covers"
    TOO_SLOW = "fewer frames per second than asked for (frames are never repeated)"
    UNREADABLE = "cannot be read"
    NO_CAPTION = "no caption in the columns of data.captions"
    NOT_ENCODED = "not in the latent cache"


# A file at 23.976 frames per second counts as one at 24.
RATE_TOLERANCE = 0.05
SIZES_SHOWN = 24


class SizeRule(ABC):
    """Assigns each clip the size it is shown at, or the reason why it is left out."""

    sizes: tuple[VideoSize, ...]
    fps: float

    @abstractmethod
    def batch_size(self, size: VideoSize) -> int:
        """Return the number of clips of a size in a batch, at least one."""

    @abstractmethod
    def nearest(self, metadata: VideoMetadata, duration_s: float) -> VideoSize | Removal:
        """Return the size of a clip of ``duration_s`` seconds, or why it has none."""

    def place(self, record: ClipRecord, metadata: VideoMetadata) -> VideoSize | Removal:
        """Return the size of a record's window, or why it has none."""
        return self.nearest(metadata, min(metadata.duration_s, record.end_s) - record.start_s)


@dataclass(frozen=True)
class SizeFamily:
    """Sizes made from a budget of pixels: for each aspect ratio and each number of frames the
    largest frame within the budget whose sides are multiples.

    Args:
        pixels_per_frame: Rows x columns, at most.
        num_frames: Lengths on offer.
        aspect_ratios: Columns to rows, as ``16:9``.
        multiple: Of how many pixels both sides are a multiple.
    """

    pixels_per_frame: int
    num_frames: list[int]
    aspect_ratios: list[str]
    multiple: int = 16

    def sizes(self) -> list[VideoSize]:
        """Return every length at every aspect ratio, without duplicates. Raises ``ValueError`` for
        an invalid ratio, or one so narrow that no frame fits.
        """
        found: dict[VideoSize, None] = {}
        for frames, text in itertools.product(self.num_frames, self.aspect_ratios):
            height, width = self._frame_size(text)
            found[VideoSize(frames, height, width)] = None
        return list(found)

    def _frame_size(self, text: str) -> tuple[int, int]:
        match = re.fullmatch(r"(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)", text.strip())
        if match is None or not min(columns_rows := tuple(map(float, match.groups()))):
            raise ValueError(f"aspect_ratios: {text!r} is no ratio: write columns:rows, e.g. 16:9")
        require_at_least(1, multiple=self.multiple)
        ratio = columns_rows[0] / columns_rows[1]
        most = self.pixels_per_frame // self.multiple**2  # in squares of the multiple
        rows = max(1, math.floor(math.sqrt(most / ratio)))
        columns = max(1, math.floor(math.sqrt(most * ratio)))
        # One side may still grow where that brings the shape nearer to the ratio.
        options = [(rows, columns), (rows + 1, columns), (rows, columns + 1)]
        fitting = [(r, c) for r, c in options if r * c <= most]
        if not fitting:
            raise ValueError(
                f"pixels_per_frame = {self.pixels_per_frame}: holds no frame of {text} whose "
                f"sides are multiples of {self.multiple}"
            )
        r, c = min(fitting, key=lambda s: (abs(math.log(s[1] / s[0] / ratio)), -s[0] * s[1]))
        return r * self.multiple, c * self.multiple


class Buckets(SizeRule):
    """Sizes on offer at one frame rate, and a budget of pixels (frames x rows x columns x clips)
    for a batch.

    Raises ``ValueError`` where there is no size, one twice, or one of which not a single clip fits
    the budget.
    """

    def __init__(self, sizes: Sequence[VideoSize], fps: float, pixels_per_batch: int) -> None:
        if not sizes or len(set(sizes)) != len(sizes):
            raise ValueError(
                f"sizes = {[str(s) for s in sizes]}: must be one or more different sizes"
            )
        require_positive(fps=fps)
        for size in sizes:
            if num_pixels(size) > pixels_per_batch:
                raise ValueError(
                    f"pixels_per_batch = {pixels_per_batch}: must be at least {num_pixels(size)}, "
                    f"one clip of size {size}"
                )
        self.sizes = tuple(sizes)
        self.fps = fps
        self.pixels_per_batch = pixels_per_batch

    def batch_size(self, size: VideoSize) -> int:
        """Return the number of clips of a size that fit the budget, at least one."""
        return self.pixels_per_batch // num_pixels(size)

    def span_s(self, size: VideoSize) -> float:
        """Return the seconds from a window's first frame to its last."""
        return (size.num_frames - 1) / self.fps

    def nearest(self, metadata: VideoMetadata, duration_s: float) -> VideoSize | Removal:
        """Return the size that keeps most of a clip, of those that it covers in rows, columns,
        frame rate and ``duration_s``.

        The share kept is that of the frame after the crop times that of the duration within
        the window. Among equals the largest frame is taken.
        """
        covered = [
            s for s in self.sizes if metadata.height >= s.height and metadata.width >= s.width
        ]
        if not covered:
            return Removal.TOO_SMALL
        long_enough = [s for s in covered if self.span_s(s) < duration_s]
        if not long_enough:
            return Removal.TOO_SHORT
        slowest = self.fps * (1 - RATE_TOLERANCE)
        fast_enough = [s for s in long_enough if s.num_frames == 1 or metadata.fps >= slowest]
        if not fast_enough:
            return Removal.TOO_SLOW
        return max(fast_enough, key=lambda size: self._kept(size, metadata, duration_s))

    def _kept(
        self, size: VideoSize, metadata: VideoMetadata, duration_s: float
    ) -> tuple[float, int, VideoSize]:
        aspect = (size.width / size.height) / (metadata.width / metadata.height)
        area = min(aspect, 1 / aspect)
        time = min(1.0, size.num_frames / (self.fps * duration_s))
        return round(area * time, 6), size.height * size.width, size


@dataclass
class Assignment:
    """Clips by size, and clips left out by the reason."""

    clips: dict[VideoSize, Sequence[ClipRecord]]
    removed: dict[Removal | Filter, Sequence[ClipRecord]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        records: Sequence[ClipRecord],
        places: Iterable[VideoSize | Removal | Filter],
        sizes: Sequence[VideoSize] = (),
    ) -> Assignment:
        """Group records by their size or reason of removal; ``sizes`` come first, even if empty."""
        codes: dict[VideoSize | Removal | Filter, int] = {s: i for i, s in enumerate(sizes)}
        of_records = array("i", (codes.setdefault(place, len(codes)) for place in places))
        found = np.array(of_records, dtype=np.int32)
        indices = np.argsort(found, kind="stable").astype(np.int32)
        ends = np.cumsum(np.bincount(found, minlength=len(codes)))[:-1]
        assignment = cls({})
        for place, of_place in zip(codes, np.split(indices, ends), strict=True):
            part = chosen(records, of_place)
            if isinstance(place, VideoSize):
                assignment.clips[place] = part
            else:
                assignment.removed[place] = part
        return assignment

    @property
    def num_clips(self) -> int:
        return sum(map(len, self.clips.values()))

    @property
    def num_removed(self) -> int:
        return sum(map(len, self.removed.values()))

    def __str__(self) -> str:
        """Return a line with the number of clips for each size and each reason of removal. Only
        the most frequent of many sizes are listed.
        """
        by_count = sorted(self.clips.items(), key=lambda item: -len(item[1]))
        few = self.clips.items() if len(by_count) <= SIZES_SHOWN else by_count[:SIZES_SHOWN]
        lines = [f"{len(clips):6d} clips as {size}" for size, clips in few]
        if rest := by_count[SIZES_SHOWN:]:
            count = sum(len(clips) for _, clips in rest)
            lines.append(f"{count:6d} clips as {len(rest)} other sizes")
        for why, records in self.removed.items():
            lines.append(f"{len(records):6d} left out: {why.value}, e.g. {records[0].path.name}")
        return "\n".join(lines)


def num_pixels(size: VideoSize) -> int:
    """Return frames x rows x columns."""
    return size.num_frames * size.height * size.width


def fit_frames(
    frames: UInt8[Tensor, "F h w 3"], height: int, width: int
) -> Float[Tensor, "3 F H W"]:
    """Scale frames down until one side fits, then cut the other from the centre; values in [-1, 1].

    Scaling keeps the aspect ratio to within one pixel and filters against aliasing: every pixel of
    the source within reach weighs in, as in area averaging. Raises ``ValueError`` for frames that
    would have to be scaled up.
    """
    rows, columns = frames.shape[1:3]
    if rows < height or columns < width:
        raise ValueError(
            f"frames of {rows}x{columns} do not cover {height}x{width}: never upscaled"
        )
    scale = max(height / rows, width / columns)
    scaled = max(height, round(rows * scale)), max(width, round(columns * scale))
    images = rearrange(
        frames, "F h w c -> F c h w"
    )  # channels last in memory, for which torch has a fast path
    if scaled != (rows, columns):
        images = functional.interpolate(images, scaled, mode="bilinear", antialias=True)
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    images = images[:, :, top : top + height, left : left + width]
    return rearrange(images, "F c h w -> c F h w").to(torch.float32).div_(127.5).sub_(1.0)
