"""Masks of tokens that are known while the others are denoised.

A training draws from a mixture of masks. In sampling the same network extends, connects, loops and
inpaints. The kinds of masks follow Open-Sora's and Open-Sora-Plan's published recipes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import repeat
from jaxtyping import Bool, Float
from torch import Tensor

from sora_lightning.checks import require_at_least, require_in
from sora_lightning.diffusion import Known
from sora_lightning.layers.patch import Patch
from sora_lightning.types import TokenGrid

NUM_UNIFORMS = 8
"""Number of uniforms that decide a clip's mask."""


@dataclass(frozen=True)
class FrameMask(ABC):
    """A kind of mask.

    ``weight`` is its share in the mixture, relative to the others'. The diffusion time of known
    tokens is uniform from 0 to ``noise``.
    """

    weight: float = 1.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        where = f"{type(self).__name__}: "
        require_at_least(0, where, weight=self.weight)
        require_in("[0, 1)", where, noise=self.noise)

    @abstractmethod
    def known(self, grid: TokenGrid, uniforms: Sequence[float]) -> Bool[Tensor, "f h w"]:
        """Return the known tokens of a clip by six uniforms in [0, 1): never all of them, except by
        ``VideoEditing``.
        """


@dataclass(frozen=True)
class TextToVideo(FrameMask):
    """Nothing is known."""

    def known(self, grid: TokenGrid, uniforms: Sequence[float]) -> Bool[Tensor, "f h w"]:
        return _nothing(grid)


@dataclass(frozen=True)
class FirstFrames(FrameMask):
    """The first frames, from one to ``most``: image to video, extension, prediction in chunks."""

    most: int | None = None

    def known(self, grid: TokenGrid, uniforms: Sequence[float]) -> Bool[Tensor, "f h w"]:
        known = _nothing(grid)
        known[: _count(uniforms[0], grid.f - 1, self.most)] = True
        return known


@dataclass(frozen=True)
class LastFrames(FrameMask):
    """The last frames, from one to ``most``: backward extension."""

    most: int | None = None

    def known(self, grid: TokenGrid, uniforms: Sequence[float]) -> Bool[Tensor, "f h w"]:
        known = _nothing(grid)
        known[grid.f - _count(uniforms[0], grid.f - 1, self.most) :] = True
        return known


@dataclass(frozen=True)
class BothEnds(FrameMask):
    """First and last frames, each from one to ``most``: connecting two videos, loops."""

    most: int | None = None

    def known(self, grid: TokenGrid, uniforms: Sequence[float]) -> Bool[Tensor, "f h w"]:
        known = _nothing(grid)
        first = _count(uniforms[0], grid.f - 2, self.most)
        last = _count(uniforms[1], grid.f - 1 - first, self.most) if first else 0
        known[:first] = True
        known[grid.f - last :] = True
        return known


@dataclass(frozen=True)
class Inpainting(FrameMask):
    """Everything but a box in space and time."""

    def known(self, grid: TokenGrid, uniforms: Sequence[float]) -> Bool[Tensor, "f h w"]:
        box = []
        for axis, length in enumerate((grid.f, grid.h, grid.w)):
            extent = _count(uniforms[2 * axis], length, None)
            start = int(uniforms[2 * axis + 1] * (length - extent + 1))
            box.append(slice(start, start + extent))
        known = ~_nothing(grid)
        known[tuple(box)] = False
        return known


@dataclass(frozen=True)
class VideoEditing(FrameMask):
    """The whole source of which a clip is an edit (InstructPix2Pix, arXiv 2211.09800), for
    ``ConcatConditioning``.
    """

    def known(self, grid: TokenGrid, uniforms: Sequence[float]) -> Bool[Tensor, "f h w"]:
        return ~_nothing(grid)


def draw_known(
    masks: Sequence[FrameMask],
    patch: Patch,
    x_0: Float[Tensor, "b c f h w"],
    uniforms: Float[Tensor, "b {NUM_UNIFORMS}"],
) -> Known:
    """Return the known tokens of each clip by the mask that its uniforms choose."""
    weights = torch.tensor([mask.weight for mask in masks], dtype=torch.float64)
    ends = weights.cumsum(0) / weights.sum()
    grid = patch.grid(*x_0.shape[2:])
    drawn, times = [], []
    for choice, noise, *rest in uniforms.double().cpu().tolist():
        mask = masks[min(int((ends <= choice).sum()), len(masks) - 1)]
        drawn.append(mask.known(grid, rest)[None])
        times.append(noise * mask.noise)
    tokens = torch.stack(drawn).to(uniforms.device)  # b 1 f h w
    p, q, r = patch.f, patch.h, patch.w
    positions = repeat(tokens, "b 1 f h w -> b 1 (f p) (h q) (w r)", p=p, q=q, r=r)
    return Known(positions, uniforms.new_tensor(times), patch)


def _nothing(grid: TokenGrid) -> Bool[Tensor, "f h w"]:
    return torch.zeros(grid.f, grid.h, grid.w, dtype=torch.bool)


def _count(number: float, largest: int, most: int | None) -> int:
    """Return a number from 1 to the smaller of ``largest`` and ``most``; 0 if ``largest`` is 0."""
    largest = min(largest, most or largest)
    return 1 + int(number * largest) if largest > 0 else 0
