"""Types shared by the whole package: sizes, grids of tokens, batches, conditions, denoisers.

Axis letters, everywhere: ``b`` batch, ``c`` channels, ``f h w`` latent frame, row and column, ``F H
W`` pixels, ``n`` spacetime tokens, ``l`` text tokens, ``d`` width, ``k`` heads. Pixels are floats
in [-1, 1], RGB. Diffusion time ``t`` is 0 at data and 1 at noise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from sora_lightning.checks import require_at_least

T = TypeVar("T")


@dataclass(frozen=True, order=True)
class VideoSize:
    """A video's extent in pixels: frames, height, width. An image has one frame."""

    num_frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        numbers = {"num_frames": self.num_frames, "height": self.height, "width": self.width}
        require_at_least(1, where=f"size {self}: ", **numbers)

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"

    @classmethod
    def parse(cls, text: str) -> VideoSize:
        """Parse ``frames x height x width``, say ``17x32x48``. Raises ``ValueError`` for other
        texts.
        """
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text.strip())
        if match is None:
            raise ValueError(
                f"{text!r} is not a video size: write frames x height x width, e.g. 17x32x48"
            )
        return cls(*map(int, match.groups()))


def height_and_width(text: str, key: str) -> tuple[int, int]:
    """Return height and width of a size such as ``32x48``. Raises ``ValueError`` naming ``key``."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.strip())
    if match is None:
        raise ValueError(f"{key} = {text!r}: must be height x width in pixels, e.g. 32x48")
    return int(match[1]), int(match[2])


@dataclass(frozen=True)
class TokenGrid:
    """Numbers of frames, rows and columns of a clip's tokens."""

    f: int
    h: int
    w: int

    @property
    def num_tokens(self) -> int:
        return self.f * self.h * self.w


@dataclass(frozen=True)
class Compression:
    """Number of pixels along each axis that share one latent position.

    ``F`` frames give ``1 + (F - 1) / frames`` latent frames.
    """

    frames: int
    height: int
    width: int

    def grid(self, size: VideoSize) -> TokenGrid:
        if (size.num_frames - 1) % self.frames:
            below = (size.num_frames - 1) // self.frames * self.frames + 1
            raise ValueError(
                f"{size}: {size.num_frames} frames do not fit a temporal compression of "
                f"{self.frames}: the number must be 1 + a multiple of {self.frames}, e.g. {below} "
                f"or {below + self.frames}"
            )
        for name in ("height", "width"):
            length, factor = getattr(size, name), getattr(self, name)
            if length % factor:
                below = length // factor * factor
                near = f"{below} or {below + factor}" if below else str(factor)
                raise ValueError(
                    f"{size}: {name} {length} is not a multiple of {factor}, e.g. {near} would be"
                )
        return TokenGrid(
            1 + (size.num_frames - 1) // self.frames,
            size.height // self.height,
            size.width // self.width,
        )

    def size(self, grid: TokenGrid) -> VideoSize:
        """Return the size of the video that a latent grid decodes to."""
        return VideoSize(1 + (grid.f - 1) * self.frames, grid.h * self.height, grid.w * self.width)


def as_levels(pixels: Float[Tensor, "*size"]) -> UInt8[Tensor, "*size"]:
    """Convert pixels from [-1, 1] to 0..255, as files hold them and evaluation reads them.

    Raises ``ValueError`` for values that are not finite.
    """
    if not pixels.isfinite().all():
        raise ValueError(
            "the video is not finite (NaN or infinity): the weights are damaged, or "
            "guidance.scale is too large"
        )
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _needed_pixels(pixels: T | None) -> T:
    if pixels is None:
        raise ValueError("data.latents serves latents, and pixels are needed: leave it out")
    return pixels


@dataclass
class VideoBatch:
    """Clips of one size.

    ``fps`` is the frames per second that all were read at. At most one of ``video`` and ``latents``
    is absent: a latent cache serves no pixels. ``source`` holds the clips of which these are edits.
    ``slowest`` is the file that took longest to decode, and its seconds.
    """

    captions: list[str]
    fps: float
    clip_ids: list[str]
    video: Float[Tensor, "b 3 F H W"] | None = None
    latents: Float[Tensor, "b c f h w"] | None = None
    source: VideoBatch | None = None
    slowest: tuple[str, float] | None = None

    def __post_init__(self) -> None:
        if self.video is None and self.latents is None:
            raise ValueError("a VideoBatch needs video or latents, and has neither")

    def __len__(self) -> int:
        return len(self.clip_ids)

    @property
    def pixels(self) -> Float[Tensor, "b 3 F H W"]:
        """Return the video. Raises ``ValueError`` for a batch of cached latents."""
        return _needed_pixels(self.video)

    def to(self, *args: Any, **kwargs: Any) -> VideoBatch:
        """Move every tensor. Takes what ``Tensor.to`` takes; Lightning calls this for each
        batch.
        """

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(*args, **kwargs)

        return replace(
            self,
            video=move(self.video),
            latents=move(self.latents),
            source=None if self.source is None else self.source.to(*args, **kwargs),
        )


@dataclass(frozen=True)
class PackedLatents:
    """Latents of clips of any sizes, a tensor for each, which a denoiser sees as one sequence.

    ``shown`` is True at tokens that take part, at least one of each clip. The others are dropped:
    no network sees them, and they have no loss. ``None`` drops nothing.
    """

    clips: tuple[Float[Tensor, "c _f _h _w"], ...]
    shown: tuple[Bool[Tensor, "_f _h _w"], ...] | None = None

    def __post_init__(self) -> None:
        if not self.clips:
            raise ValueError("a PackedLatents needs one clip at least, and has none")
        shapes = [tuple(clip.shape) for clip in self.clips]
        if any(len(shape) != 4 or shape[0] != shapes[0][0] for shape in shapes):
            raise ValueError(
                f"latents of shapes {shapes} cannot be packed: each must be channels, frames, "
                "rows, columns, with one number of channels"
            )
        if self.shown is not None and len(self.shown) != len(self.clips):
            raise ValueError(
                f"{len(self.shown)} masks of what is shown for {len(self.clips)} clips"
            )

    def __len__(self) -> int:
        return len(self.clips)

    def map(
        self, function: Callable[..., Float[Tensor, "_c f h w"]], *others: Iterable[Any]
    ) -> PackedLatents:
        """Apply ``function`` to each clip and its item of each of the others.

        Others are ``clips`` of packed latents, or tensors with a row for each clip.
        """
        rows = zip(self.clips, *others, strict=True)
        return replace(self, clips=tuple(function(*row) for row in rows))

    def to(self, *args: Any, **kwargs: Any) -> PackedLatents:
        """Move every tensor. Takes what ``Tensor.to`` takes."""
        moved = self.map(lambda clip: clip.to(*args, **kwargs))
        if self.shown is None:
            return moved
        device = moved.clips[0].device
        return replace(moved, shown=tuple(mask.to(device) for mask in self.shown))


Latents = TypeVar("Latents", Float[Tensor, "b c f h w"], PackedLatents)
"""A dense batch or a pack; functions return the kind that they take."""


class Draws(Protocol):
    """Random numbers of a batch's clips."""

    def uniform(self, *shape: int) -> Float[Tensor, " b *shape"]:
        """Draw from [0, 1)."""

    def normal(self) -> Float[Tensor, " b"]:
        """Draw one standard normal number for each clip."""

    def noise(self, like: Latents, offset: float = 0.0) -> Latents:
        """Draw standard normal noise, with ``offset`` times one more for each frame's mean."""


def dense_groups(latents: Latents) -> list[Float[Tensor, "b c f h w"]]:
    """Return dense batches: a dense batch by itself, or each clip of a pack as a batch of one.

    Mathematics that is written for dense batches holds for packs by way of their groups.
    """
    if isinstance(latents, PackedLatents):
        return [clip[None] for clip in latents.clips]
    return [latents]


def from_groups(groups: Sequence[Float[Tensor, "b c f h w"]], like: Latents) -> Latents:
    """Return dense groups as a dense batch or a pack, whichever ``like`` is."""
    if isinstance(like, PackedLatents):
        return replace(like, clips=tuple(group[0] for group in groups))
    return groups[0]


@dataclass
class PackedBatch:
    """Clips of any sizes that share one sequence, each with a caption and a time of its own.

    ``repeats`` counts how often each clip has been shown before. ``kept`` holds the indices of the
    tokens (frame-major) that take part, where some are left out. ``fill`` is the share of the
    sequence's budget that they take. Exactly one of ``videos`` and ``latents`` is absent. Where no
    clip could be read, the batch has none. ``fps`` and ``slowest`` are as in ``VideoBatch``.
    """

    captions: list[str]
    fps: float
    clip_ids: list[str]
    repeats: list[int]
    fill: float
    videos: list[Float[Tensor, "3 _F _H _W"]] | None = None
    latents: list[Float[Tensor, "c _f _h _w"]] | None = None
    kept: list[Int[Tensor, " _n"]] | None = None
    slowest: tuple[str, float] | None = None

    def __post_init__(self) -> None:
        if (self.videos is None) == (self.latents is None):
            raise ValueError("a PackedBatch needs either videos or latents")

    def __len__(self) -> int:
        return len(self.clip_ids)

    @property
    def pixels(self) -> list[Float[Tensor, "3 _F _H _W"]]:
        """Return the videos. Raises ``ValueError`` for a batch of cached latents."""
        return _needed_pixels(self.videos)

    def to(self, *args: Any, **kwargs: Any) -> PackedBatch:
        """Move every tensor. Takes what ``Tensor.to`` takes; Lightning calls this for each
        batch.
        """

        def move(tensors: list[Tensor] | None) -> list[Tensor] | None:
            return None if tensors is None else [one.to(*args, **kwargs) for one in tensors]

        return replace(
            self,
            videos=move(self.videos),
            latents=move(self.latents),
            kept=move(self.kept),
        )


class ImageTokens(NamedTuple):
    """Tokens to attend to beside those of the text, and a mask that is True where there is one."""

    tokens: Float[Tensor, "b m d"]
    mask: Bool[Tensor, "b m"]

    def repeat(self, times: int) -> ImageTokens:
        """Return the same for a batch that repeats the clips."""
        return ImageTokens(self.tokens.repeat(times, 1, 1), self.mask.repeat(times, 1))


@dataclass
class Condition:
    """Condition of a denoiser: text tokens to attend to, and one pooled vector that joins
    the time embedding.

    ``concat_latents`` are channels to concatenate to the noisy latents; ``None`` is zeros.
    """

    tokens: Float[Tensor, "b l d"]
    mask: Bool[Tensor, "b l"]
    pooled: Float[Tensor, "b p"]
    concat_latents: Float[Tensor, "b e f h w"] | None = None

    def __len__(self) -> int:
        return self.pooled.shape[0]

    def __getitem__(self, clips: slice) -> Condition:
        """Return the conditions of some of the clips."""
        channels = None if self.concat_latents is None else self.concat_latents[clips]
        return Condition(self.tokens[clips], self.mask[clips], self.pooled[clips], channels)

    @staticmethod
    def cat(first: Condition, second: Condition) -> Condition:
        """Concatenate two batches of conditions, padding shorter texts with masked tokens."""
        length = max(first.mask.shape[1], second.mask.shape[1])
        a, b = first.pad(length), second.pad(length)
        return Condition(
            tokens=torch.cat([a.tokens, b.tokens]),
            mask=torch.cat([a.mask, b.mask]),
            pooled=torch.cat([a.pooled, b.pooled]),
            concat_latents=_cat_concat_latents(first, second),
        )

    def joined(self, more: ImageTokens) -> Condition:
        """Return the condition with more tokens to attend to."""
        tokens, mask = more.tokens.to(self.tokens), more.mask
        return replace(
            self,
            tokens=torch.cat([self.tokens, tokens], dim=1),
            mask=torch.cat([self.mask, mask], dim=1),
        )

    def pad(self, length: int) -> Condition:
        """Return the condition with masked text tokens appended up to ``length``."""
        missing = length - self.mask.shape[1]
        return Condition(
            tokens=F.pad(self.tokens, (0, 0, 0, missing)),
            mask=F.pad(self.mask, (0, missing)),
            pooled=self.pooled,
            concat_latents=self.concat_latents,
        )


def _cat_concat_latents(first: Condition, second: Condition) -> Tensor | None:
    if first.concat_latents is None and second.concat_latents is None:
        return None
    like = second.concat_latents if first.concat_latents is None else first.concat_latents
    assert like is not None
    zeros = [like.new_zeros(len(one), *like.shape[1:]) for one in (first, second)]
    channels = (first.concat_latents, second.concat_latents)
    return torch.cat([z if c is None else c for z, c in zip(zeros, channels, strict=True)])


@runtime_checkable
class DenoiserFunction(Protocol):
    """A callable that predicts from noisy latents ``x_t`` and time ``t``.

    ``t`` holds a time for each clip, or for each of its tokens where some are known. Samplers need
    no more, so guidance may wrap a network and a closed form may replace it.
    """

    def __call__(
        self,
        x_t: Float[Tensor, "b c f h w"],
        t: Float[Tensor, " b *n"],
        condition: Condition,
    ) -> Float[Tensor, "b out f h w"]: ...
