"""Clips at their own aspect ratio and length, for packing: how large each is shown, and which share
of its tokens is kept.

Source: NaViT (arXiv 2307.06304), sections 2.2 (variable resolution, continuous token dropping) and
3.2 to 3.3 (their distributions).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int
from numpy import ndarray

from sora_lightning.checks import require_at_least, require_in, require_positive
from sora_lightning.data.batching.buckets import RATE_TOLERANCE, Removal, SizeRule
from sora_lightning.data.decoding.video_metadata import VideoMetadata
from sora_lightning.layers.patch import Patch
from sora_lightning.types import Compression, VideoSize

# A window stays clear of a file's end by this share of a frame, since headers round durations.
END_MARGIN = 0.5


class Resolution(ABC):
    """Draws the side length that a clip's frames are shown at: the root of rows x columns."""

    @abstractmethod
    def sides(self, rng: np.random.Generator, num_clips: int) -> Float64[ndarray, " n"]:
        """Return a side length in pixels for each clip. A clip is never scaled up to it."""


@dataclass(frozen=True)
class UniformSide(Resolution):
    """Side lengths drawn evenly: better than areas drawn evenly (NaViT, section 3.2)."""

    smallest: float
    largest: float

    def __post_init__(self) -> None:
        _require_range(self.smallest, self.largest)

    def sides(self, rng: np.random.Generator, num_clips: int) -> Float64[ndarray, " n"]:
        return rng.uniform(self.smallest, self.largest, num_clips)


@dataclass(frozen=True)
class NormalSide(Resolution):
    """Side lengths from a normal distribution cut at -1 and 1 and stretched over the range; its
    defaults favour small frames, the best in NaViT's comparison (section 3.2).
    """

    smallest: float
    largest: float
    mean: float = -0.5
    std: float = 1.0

    def __post_init__(self) -> None:
        _require_range(self.smallest, self.largest)
        require_positive(std=self.std)

    def sides(self, rng: np.random.Generator, num_clips: int) -> Float64[ndarray, " n"]:
        drawn = truncated_normal(rng, np.full(num_clips, self.mean), self.std, -1, 1)
        return self.smallest + (drawn + 1) / 2 * (self.largest - self.smallest)


class Dropping(ABC):
    """Draws the share of tokens dropped from each clip."""

    @abstractmethod
    def rates(
        self, rng: np.random.Generator, tokens: Int[ndarray, " n"], first: int
    ) -> Float64[ndarray, " n"]:
        """Return a share in [0, 1) for clips of this many tokens; ``first`` clips came before."""


@dataclass(frozen=True)
class BetaDropping(Dropping):
    """``largest`` times a Beta variable of this mean and of variance 0.3 mean (1 - mean) (NaViT,
    section 3.3).
    """

    mean: float
    largest: float

    def __post_init__(self) -> None:
        require_in("(0, 1)", mean=self.mean, largest=self.largest)

    def rates(
        self, rng: np.random.Generator, tokens: Int[ndarray, " n"], first: int
    ) -> Float64[ndarray, " n"]:
        # The variance of Beta(a, b) is mean (1 - mean) / (a + b + 1).
        total = 1 / 0.3 - 1
        return self.largest * rng.beta(self.mean * total, (1 - self.mean) * total, len(tokens))


@dataclass(frozen=True)
class LengthDropping(Dropping):
    """A rate that grows with a clip's length: normal around a line from ``lowest`` at no tokens to
    ``highest`` at ``longest`` tokens, with standard deviation 0.02 (NaViT, section 3.3).
    """

    lowest: float
    highest: float
    longest: int

    def __post_init__(self) -> None:
        require_in("[0, 1)", lowest=self.lowest, highest=self.highest)
        require_at_least(1, longest=self.longest)

    def rates(
        self, rng: np.random.Generator, tokens: Int[ndarray, " n"], first: int
    ) -> Float64[ndarray, " n"]:
        share = np.minimum(tokens / self.longest, 1)
        mean = self.lowest + (self.highest - self.lowest) * share
        return truncated_normal(rng, mean, 0.02, 0, 0.99)


@dataclass(frozen=True)
class ScheduledDropping(Dropping):
    """A rate that changes with the clips shown: ``before + (after - before) sigmoid((n -
    midpoint) / width)``; NaViT finds a decreasing one better (section 3.3).
    """

    before: float
    after: float
    midpoint: float
    width: float

    def __post_init__(self) -> None:
        require_in("[0, 1)", before=self.before, after=self.after)
        require_positive(width=self.width)

    def rates(
        self, rng: np.random.Generator, tokens: Int[ndarray, " n"], first: int
    ) -> Float64[ndarray, " n"]:
        place = (first + np.arange(len(tokens)) - self.midpoint) / self.width
        return self.before + (self.after - self.before) * (1 + np.tanh(place / 2)) / 2


def truncated_normal(
    rng: np.random.Generator,
    mean: Float64[ndarray, " n"],
    std: float,
    lowest: float,
    highest: float,
) -> Float64[ndarray, " n"]:
    """Return normal draws within limits; values outside are drawn again."""
    drawn = rng.normal(mean, std)
    for _ in range(64):
        outside = (drawn < lowest) | (drawn > highest)
        if not outside.any():
            break
        drawn[outside] = rng.normal(mean[outside], std)
    return np.clip(drawn, lowest, highest)


@dataclass(frozen=True)
class Packing:
    """Several clips share one sequence of at most ``tokens`` tokens (Patch n' Pack).

    Args:
        tokens: The budget of one sequence.
        compression: Pixels of a latent position as ``frames x rows x columns``, as the tokenizer
            has it.
        patch: Latent frames, rows and columns of one token, as the denoiser has them.
        max_frames: Longer clips are cut to a window of at most so many frames.
        max_pixels: Rows x columns of a frame; larger frames are scaled down to it.
        resolution: Draws for each epoch how large a clip is shown; by default as large as it is.
        dropping: Draws for each epoch which share of a clip's tokens is left out; by default none.
        attention_tokens: The clip length at which attention costs as much as all else, 6 x the
            denoiser's width: it decides which packs the ranks process together.

    Raises ``ValueError`` for sizes of which one clip would not fit the budget.
    """

    tokens: int
    compression: str
    max_frames: int
    max_pixels: int
    patch: Sequence[int] = (1, 2, 2)
    resolution: Resolution | None = None
    dropping: Dropping | None = None
    attention_tokens: int = 6912

    def __post_init__(self) -> None:
        step = self.pixels_per_token
        if self.max_frames < self.frames(1):
            raise ValueError(
                f"max_frames = {self.max_frames}: a token needs {self.frames(1)} frames"
            )
        if self.max_pixels < step.height * step.width:
            raise ValueError(
                f"max_pixels = {self.max_pixels}: a token covers {step.height}x{step.width}"
            )
        require_at_least(1, attention_tokens=self.attention_tokens)
        longest = self._latent_frames(self.max_frames) * (
            self.max_pixels // (step.height * step.width)
        )
        if longest > self.tokens:
            raise ValueError(
                f"tokens = {self.tokens}: a clip of max_frames = {self.max_frames} and max_pixels "
                f"= {self.max_pixels} takes {longest}, and must fit"
            )

    @property
    def geometry(self) -> tuple[Compression, Patch]:
        """Return the pixels of a latent position and the latent positions of a token."""
        size = VideoSize.parse(self.compression)
        return Compression(size.num_frames, size.height, size.width), Patch.of(self.patch)

    @property
    def pixels_per_token(self) -> Compression:
        compression, patch = self.geometry
        return patch.compress(compression)

    def frames(self, rows_of_tokens: int) -> int:
        """Return the video frames of so many tokens along time; the first latent frame has one."""
        compression, patch = self.geometry
        return 1 + (rows_of_tokens * patch.f - 1) * compression.frames

    def _latent_frames(self, num_frames: int) -> int:
        """Return the number of tokens along time that so many frames fill."""
        compression, patch = self.geometry
        return (1 + (num_frames - 1) // compression.frames) // patch.f

    def grid(self, num_frames: int, height: float, width: float) -> tuple[int, int, int]:
        """Return the largest token grid within a size; 0 along an axis that is too short."""
        step = self.pixels_per_token
        return self._latent_frames(num_frames), int(height / step.height), int(width / step.width)

    def size(self, grid: Sequence[int]) -> VideoSize:
        """Return the size of a token grid's video."""
        step = self.pixels_per_token
        return VideoSize(self.frames(grid[0]), grid[1] * step.height, grid[2] * step.width)


class NativeSizes(SizeRule):
    """Assigns each clip the largest size that its own frames fill, in whole tokens."""

    def __init__(self, packing: Packing, fps: float) -> None:
        require_positive(fps=fps)
        self.packing = packing
        self.fps = fps
        self.sizes: tuple[VideoSize, ...] = ()

    def batch_size(self, size: VideoSize) -> int:
        """Return the number of clips of one size that fit the budget of a pack."""
        grid = self.packing.grid(size.num_frames, size.height, size.width)
        return self.packing.tokens // math.prod(grid)

    def nearest(self, metadata: VideoMetadata, duration_s: float) -> VideoSize | Removal:
        if metadata.num_frames > 1 and metadata.fps < self.fps * (1 - RATE_TOLERANCE):
            return Removal.TOO_SLOW
        frames = max(1, math.ceil(duration_s * self.fps - END_MARGIN))
        pixels = metadata.height * metadata.width
        scale = min(1.0, math.sqrt(self.packing.max_pixels / pixels))
        f, h, w = self.packing.grid(
            min(frames, self.packing.max_frames, max(metadata.num_frames, 1)),
            metadata.height * scale + 1e-6,
            metadata.width * scale + 1e-6,
        )
        if duration_s <= 0 or f < 1:
            return Removal.TOO_SHORT
        if min(h, w) < 1:
            return Removal.TOO_SMALL
        return self.packing.size((f, h, w))


def check_geometry(
    compression: str, patch: Sequence[int], tokenizer: Compression, denoiser: Patch | None
) -> None:
    """Raise ``ValueError`` where packing counts tokens by another geometry than the tokenizer's
    and the denoiser's own.
    """
    own = f"{tokenizer.frames}x{tokenizer.height}x{tokenizer.width}"
    if str(VideoSize.parse(compression)) != own:
        raise ValueError(f"compression = {compression}: the tokenizer's is {own}")
    if denoiser is not None and Patch(*patch) != denoiser:
        raise ValueError(
            f"patch = {list(patch)}: the denoiser's is {[denoiser.f, denoiser.h, denoiser.w]}"
        )


def smallest_int_dtype(values: Int[ndarray, "..."]) -> Int[ndarray, "..."]:
    """Convert integers, 0 or greater, to the smallest of int8, int16 and int32 that holds them."""
    largest = int(values.max(initial=0))
    types = (np.int8, np.int16, np.int32)
    return values.astype(next(t for t in types if largest <= np.iinfo(t).max), copy=False)


def shown(
    grids: Int[ndarray, "n 3"],
    packing: Packing,
    rng: np.random.Generator,
    first: int,
) -> tuple[Int[ndarray, "n 3"], Int[ndarray, " n"]]:
    """Return the token grid that each clip is shown at in one epoch, and how many tokens it keeps.

    ``grids`` are the largest; ``first`` counts the clips shown in the epochs before.
    """
    if packing.resolution is not None:
        step = packing.pixels_per_token
        area = grids[:, 1].astype(np.float64)
        area *= grids[:, 2]
        area *= step.height * step.width
        scale = packing.resolution.sides(rng, len(grids))
        scale /= np.sqrt(area, out=area)
        np.minimum(1, scale, out=scale)
        grids = grids.copy()
        for side in grids[:, 1:].T:
            side[:] = np.maximum(1, np.floor(side * scale + 1e-9))
    tokens = smallest_int_dtype(grids.prod(axis=1, dtype=np.int32))
    if packing.dropping is None:
        return grids, tokens
    rates = packing.dropping.rates(rng, tokens, first)
    return grids, np.maximum(1, np.rint(tokens * (1 - rates))).astype(tokens.dtype)


def _require_range(smallest: float, largest: float) -> None:
    if not 0 < smallest <= largest < math.inf:
        raise ValueError(f"smallest = {smallest}, largest = {largest}: must be positive, in order")
