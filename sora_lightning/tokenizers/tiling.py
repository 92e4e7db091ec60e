"""Large frames through a tokenizer in overlapping tiles, blended.

Memory for one tile then suffices for a frame of any size. A causal tokenizer still runs piece by
piece in time, with a state for each tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from sora_lightning.tokenizers.base import CausalTokenizer, VideoTokenizer
from sora_lightning.tokenizers.posterior import DiagonalGaussian

_Result = TypeVar("_Result")

_MARGIN = 4  # a quarter of the overlap counts for nothing: values beside a cut are the worst


@dataclass(frozen=True)
class Tiling:
    """Tiles of at most ``tile`` x ``tile`` pixels; neighbours share ``overlap`` pixels, by default
    a quarter of the tile.

    The first and last quarter of an overlap take one tile each; over the half between, the weights
    change linearly. Compared with the untiled result:

    - Every value lies between those of the tiles (at most four) that cover it, so its error is no
      larger than theirs.
    - Blending adds at most 1 / ``ramp`` of the tiles' difference between neighbouring positions,
      where ``ramp`` is half of the overlap in positions: a seam has no step.
    - Values that depend only on positions within a quarter of the overlap are equal up to rounding.
      ``ConvTokenizer`` loses little even with less overlap. Norms and attention over whole frames
      (latent diffusion's, Wan's, CogVideoX's, HunyuanVideo's, ``ViViTTokenizer``) depend on the
      whole frame or tile: only the first two bounds hold there.
    """

    tile: int = 256
    overlap: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= 3 * self.num_shared <= self.tile:
            raise ValueError(
                f"overlap = {self.num_shared} of tile = {self.tile}: must be positive and at most "
                "a third of the tile"
            )

    @property
    def num_shared(self) -> int:
        """Number of pixels that neighbouring tiles share."""
        return self.tile // 4 if self.overlap is None else self.overlap

    def __call__(self, tokenizer: VideoTokenizer) -> VideoTokenizer:
        """Return the tokenizer by tiles, causal if it is.

        Raises ``ValueError`` if tile or overlap are not whole latent positions.
        """
        causal = isinstance(tokenizer, CausalTokenizer)
        return (TiledCausalTokenizer if causal else TiledTokenizer)(tokenizer, self)


@dataclass(frozen=True)
class _Span:
    """Positions from ``start`` up to ``stop`` of ``length``, of which each neighbour shares
    ``overlap``.
    """

    start: int
    stop: int
    length: int
    overlap: int

    @classmethod
    def all(cls, length: int, tile: int, overlap: int) -> list[_Span]:
        """Return the fewest spans of at most ``tile``, as even as possible, that cover a length."""
        if length <= tile:
            return [cls(0, length, length, overlap)]
        number = ceil((length - overlap) / (tile - overlap))
        stride = ceil((length - overlap) / number)
        starts = [i * stride for i in range(number)]
        return [cls(s, min(s + stride + overlap, length), length, overlap) for s in starts]

    def times(self, factor: int) -> _Span:
        return _Span(*(factor * n for n in (self.start, self.stop, self.length, self.overlap)))

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)

    def weights(self, unit: int, like: Tensor) -> Float[Tensor, " n"]:
        """Return the weight of this span at each of its positions; all spans sum to 1. ``unit``
        positions are not divided between margin and ramp.
        """
        margin = self.overlap // unit // _MARGIN * unit
        ramp = self.overlap - 2 * margin
        place = torch.arange(self.stop - self.start, device=like.device, dtype=like.dtype) + 0.5
        weights = torch.ones_like(place)
        if self.start > 0:
            weights = weights * ((place - margin) / ramp).clamp(0, 1)
        if self.stop < self.length:
            left = self.stop - self.start - place
            weights = weights * ((left - margin) / ramp).clamp(0, 1)
        return weights


class TiledTokenizer(VideoTokenizer):
    """A tokenizer that runs by tiles; see ``Tiling``. It has the statistics and fingerprint of the
    tokenizer.
    """

    def __init__(self, tokenizer: VideoTokenizer, tiling: Tiling):
        compression = tokenizer.compression
        for side in ("height", "width"):
            pixels = getattr(compression, side)
            for name, length in (("tile", tiling.tile), ("overlap", tiling.num_shared)):
                if length % pixels:
                    raise ValueError(
                        f"{name} = {length} is not a multiple of the {pixels} pixels of {side} "
                        "that share a latent position"
                    )
        super().__init__(compression, tokenizer.latent_channels)
        self.tokenizer = tokenizer
        self.tiling = tiling
        # The same tensors, so that statistics set on either are those of both.
        self.latent_mean = tokenizer.latent_mean
        self.latent_axes = tokenizer.latent_axes
        self.latent_std = tokenizer.latent_std

    def fingerprint(self) -> str:
        """Return the tokenizer's fingerprint: whatever decodes its latents decodes these."""
        return self.tokenizer.fingerprint()

    def posterior(self, video: Float[Tensor, "b 3 F H W"]) -> DiagonalGaussian:
        """See ``VideoTokenizer``. Means and log-variances are blended."""
        return self._encode(video, lambda number, tile: self.tokenizer.posterior(tile))

    def decode_raw(self, latents: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b 3 F H W"]:
        """See ``VideoTokenizer``."""
        return self._decode(latents, lambda number, tile: self.tokenizer.decode_raw(tile))

    def _encode(
        self, video: Tensor, encode: Callable[[int, Tensor], DiagonalGaussian]
    ) -> DiagonalGaussian:
        q, r = self.compression.height, self.compression.width
        height, width = video.shape[3] // q, video.shape[4] // r
        blend = _Blend(height, width, 1, 1)
        for number, (rows, columns) in enumerate(self._tiles(height, width)):
            tile = video[..., rows.times(q).slice, columns.times(r).slice]
            posterior = encode(number, tile)
            moments = torch.cat([posterior.mean, posterior.log_variance], dim=1)
            blend.add(moments, rows, columns)
        return DiagonalGaussian.from_moments(blend.result())

    def _decode(self, latents: Tensor, decode: Callable[[int, Tensor], Tensor]) -> Tensor:
        height, width = latents.shape[3:]
        blend = _Blend(height, width, self.compression.height, self.compression.width)
        for number, (rows, columns) in enumerate(self._tiles(height, width)):
            blend.add(decode(number, latents[..., rows.slice, columns.slice]), rows, columns)
        return blend.result()

    def _tiles(self, height: int, width: int) -> Iterator[tuple[_Span, _Span]]:
        """Return the spans of latent rows and columns, row by row."""
        tile, overlap = self.tiling.tile, self.tiling.num_shared
        q, r = self.compression.height, self.compression.width
        for rows in _Span.all(height, tile // q, overlap // q):
            for columns in _Span.all(width, tile // r, overlap // r):
                yield rows, columns


class TiledCausalTokenizer(TiledTokenizer, CausalTokenizer):
    """A causal tokenizer that runs by tiles: its state is a list of the tiles' states."""

    tokenizer: CausalTokenizer

    def posterior_step(
        self, video: Float[Tensor, "b 3 F H W"], past: list[Any] | None
    ) -> tuple[DiagonalGaussian, list[Any]]:
        """See ``CausalTokenizer``."""
        following: list[Any] = []
        encode = _with_pasts(self.tokenizer.posterior_step, past, following)
        return self._encode(video, encode), following

    def decode_step(
        self, latents: Float[Tensor, "b c f h w"], past: list[Any] | None
    ) -> tuple[Float[Tensor, "b 3 F H W"], list[Any]]:
        """See ``CausalTokenizer``."""
        following: list[Any] = []
        decode = _with_pasts(self.tokenizer.decode_step, past, following)
        return self._decode(latents, decode), following


def _with_pasts(
    step: Callable[[Tensor, Any], tuple[_Result, Any]], past: list[Any] | None, following: list[Any]
) -> Callable[[int, Tensor], _Result]:
    """Return a tile's step that takes its own state and appends the next one to ``following``."""

    def run(number: int, tile: Tensor) -> _Result:
        result, left = step(tile, None if past is None else past[number])
        following.append(left)
        return result

    return run


class _Blend:
    """Accumulates the weighted sum of tiles, of ``rows`` and ``columns`` positions for each latent
    one.
    """

    def __init__(self, height: int, width: int, rows: int, columns: int):
        self.height, self.width = height, width
        self.rows, self.columns = rows, columns
        self.sum: Tensor | None = None

    def add(self, tile: Float[Tensor, "b c f i j"], rows: _Span, columns: _Span) -> None:
        down, across = rows.times(self.rows), columns.times(self.columns)
        if self.sum is None:
            shape = (*tile.shape[:3], self.height * self.rows, self.width * self.columns)
            self.sum = tile.new_zeros(shape)
        down_weights = down.weights(self.rows, tile)[:, None]
        weights = down_weights * across.weights(self.columns, tile)
        self.sum[..., down.slice, across.slice] += tile * weights

    def result(self) -> Float[Tensor, "b c f i j"]:
        assert self.sum is not None
        return self.sum
