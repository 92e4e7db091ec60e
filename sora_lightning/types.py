"""The vocabulary of the house: what is called a size, a clip, a batch, a grid of tokens, a
condition.

Axis letters, everywhere: ``b`` batch, ``c`` channels, ``f h w`` latent frame, row and column, ``F H
W`` pixels, ``n`` spacetime tokens, ``l`` text tokens, ``d`` width, ``k`` heads. Pixels are floats
in [-1, 1], RGB. Diffusion time ``t`` is 0 at data and 1 at noise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor


@dataclass(frozen=True, order=True)
class VideoSize:
    """A video's extent in pixels: frames, height, width. An image has one frame."""

    num_frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} in {self}: must be at least 1")

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"

    @classmethod
    def parse(cls, text: str) -> VideoSize:
        """Read ``frames x height x width``, say ``17x32x48``. Raises ``ValueError`` for anything
        else.
        """
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text.strip())
        if match is None:
            raise ValueError(
                f"{text!r} is not a video size: write frames x height x width, e.g. 17x32x48"
            )
        return cls(*map(int, match.groups()))


@dataclass(frozen=True)
class TokenGrid:
    """The number of latent frames, rows and columns that a clip's tokens stand on."""

    f: int
    h: int
    w: int

    @property
    def num_tokens(self) -> int:
        return self.f * self.h * self.w


@dataclass(frozen=True)
class Compression:
    """How many pixels of each axis share one latent position. Causal: F frames give 1 + (F - 1) /
    frames.
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
        """The video that a latent grid decodes to."""
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


@dataclass
class VideoBatch:
    """Clips of one size. Exactly one of ``video`` and ``latents`` may be absent: a latent cache
    serves no pixels. ``source`` holds the clips that these are edits of, frame by frame.
    """

    captions: list[str]
    fps: Float[Tensor, " b"]
    clip_ids: list[str]
    video: Float[Tensor, "b 3 F H W"] | None = None
    latents: Float[Tensor, "b c f h w"] | None = None
    source: VideoBatch | None = None

    def __post_init__(self) -> None:
        if self.video is None and self.latents is None:
            raise ValueError("a VideoBatch needs video or latents, and has neither")

    def __len__(self) -> int:
        return len(self.clip_ids)

    @property
    def pixels(self) -> Float[Tensor, "b 3 F H W"]:
        """The video. Raises ``ValueError`` for a batch of cached latents."""
        if self.video is None:
            raise ValueError("data.latents serves latents, and pixels are needed: leave it out")
        return self.video

    def to(self, *args: Any, **kwargs: Any) -> VideoBatch:
        """Move every tensor. Takes what ``Tensor.to`` takes; Lightning calls this for each
        batch.
        """

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(*args, **kwargs)

        return replace(
            self,
            fps=self.fps.to(*args, **kwargs),
            video=move(self.video),
            latents=move(self.latents),
            source=None if self.source is None else self.source.to(*args, **kwargs),
        )


@dataclass(frozen=True)
class PackedLatents:
    """Latents of clips of any sizes, which a denoiser sees as one sequence: a tensor for each.

    ``shown`` is true where a clip's latents take part, in whole tokens, one of them at least; the
    others are dropped: no network sees them and no loss asks for them. ``None`` drops nothing.
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
        """``function`` of each clip and of what each of the others holds for it: other packed
        latents' ``clips``, or a tensor with a row for each clip.
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
"""A dense batch or a pack: what comes in as one goes out as one."""


@dataclass
class PackedBatch:
    """Clips of any sizes that share one sequence, each with a caption and a time of its own.

    ``turns`` counts how often each clip has been shown before. ``kept`` holds the numbers of the
    tokens (frame-major) that take part, where some are left out. ``fill`` is the share of the
    sequence's budget that they take. Exactly one of ``videos`` and ``latents`` is absent. Where no
    clip could be read, the batch has none.
    """

    captions: list[str]
    fps: Float[Tensor, " b"]
    clip_ids: list[str]
    turns: list[int]
    fill: float
    videos: list[Float[Tensor, "3 _F _H _W"]] | None = None
    latents: list[Float[Tensor, "c _f _h _w"]] | None = None
    kept: list[Int[Tensor, " _n"]] | None = None

    def __post_init__(self) -> None:
        if (self.videos is None) == (self.latents is None):
            raise ValueError("a PackedBatch needs either videos or latents")

    def __len__(self) -> int:
        return len(self.clip_ids)

    def to(self, *args: Any, **kwargs: Any) -> PackedBatch:
        """Move every tensor. Takes what ``Tensor.to`` takes; Lightning calls this for each
        batch.
        """

        def move(tensors: list[Tensor] | None) -> list[Tensor] | None:
            return None if tensors is None else [one.to(*args, **kwargs) for one in tensors]

        return replace(
            self,
            fps=self.fps.to(*args, **kwargs),
            videos=move(self.videos),
            latents=move(self.latents),
            kept=move(self.kept),
        )


class MoreTokens(NamedTuple):
    """Tokens to attend to beside those of the text, and which of them there are."""

    tokens: Float[Tensor, "b m d"]
    mask: Bool[Tensor, "b m"]


@dataclass
class Condition:
    """What the denoiser is told: text tokens to attend to, and one pooled vector that joins the
    time embedding. ``given`` are channels that stand beside the noisy latents; ``None`` is zeros.
    """

    tokens: Float[Tensor, "b l d"]
    mask: Bool[Tensor, "b l"]
    pooled: Float[Tensor, "b d"]
    given: Float[Tensor, "b e f h w"] | None = None

    def __len__(self) -> int:
        return self.pooled.shape[0]

    def __getitem__(self, clips: slice) -> Condition:
        """The conditions of some of the clips."""
        given = None if self.given is None else self.given[clips]
        return Condition(self.tokens[clips], self.mask[clips], self.pooled[clips], given)

    @staticmethod
    def cat(first: Condition, second: Condition) -> Condition:
        """Two batches of conditions as one; the shorter texts are padded with masked tokens."""
        length = max(first.mask.shape[1], second.mask.shape[1])
        a, b = first.pad(length), second.pad(length)
        return Condition(
            tokens=torch.cat([a.tokens, b.tokens]),
            mask=torch.cat([a.mask, b.mask]),
            pooled=torch.cat([a.pooled, b.pooled]),
            given=_cat_given(first, second),
        )

    def joined(self, more: MoreTokens) -> Condition:
        """The same condition with more tokens to attend to."""
        tokens, mask = more.tokens.to(self.tokens), more.mask
        return replace(
            self,
            tokens=torch.cat([self.tokens, tokens], dim=1),
            mask=torch.cat([self.mask, mask], dim=1),
        )

    def pad(self, length: int) -> Condition:
        """The same condition with masked text tokens appended up to ``length``."""
        missing = length - self.mask.shape[1]
        return Condition(
            tokens=F.pad(self.tokens, (0, 0, 0, missing)),
            mask=F.pad(self.mask, (0, missing)),
            pooled=self.pooled,
            given=self.given,
        )


def _cat_given(first: Condition, second: Condition) -> Tensor | None:
    if first.given is None and second.given is None:
        return None
    like = second.given if first.given is None else first.given
    assert like is not None
    return torch.cat(
        [
            like.new_zeros(len(one), *like.shape[1:]) if one.given is None else one.given
            for one in (first, second)
        ]
    )


@runtime_checkable
class DenoiserFunction(Protocol):
    """Any callable that predicts, at noisy latents ``x_t`` and time ``t``, what its objective asks
    for. ``t`` holds a time for each clip, or for each of its tokens where some are known.

    Objectives and samplers ask for no more, so guidance may wrap a network and a closed form may
    stand in for it.
    """

    def __call__(
        self,
        x_t: Float[Tensor, "b c f h w"],
        t: Float[Tensor, " b *n"],
        condition: Condition,
    ) -> Float[Tensor, "b out f h w"]: ...
