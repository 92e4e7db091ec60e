"""Positions as parts of a network: vectors added to the tokens, and angles that turn queries and
keys. All come from the tokens' coordinates, so that clips of any sizes may share a sequence.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sora_lightning.layers.arrangement import Arrangement
from sora_lightning.layers.position import (
    axis_widths,
    rotary_frequencies,
    sinusoidal,
    sinusoidal_3d,
)


class PositionEmbedding(nn.Module, ABC):
    """A vector for each token, added before the block of this index, counted from 0."""

    def __init__(self, before_block: int = 0):
        super().__init__()
        if before_block < 0:
            raise ValueError(f"before_block = {before_block} must be at least 0")
        self.before_block = before_block

    @abstractmethod
    def forward(self, arrangement: Arrangement) -> Float[Tensor, "n d"]: ...


class Sinusoidal(PositionEmbedding):
    """Sinusoids of frame, row and column side by side: no size is built in, nothing is learned."""

    def __init__(self, width: int, before_block: int = 0):
        super().__init__(before_block)
        self.width = width

    def forward(self, arrangement: Arrangement) -> Float[Tensor, "n d"]:
        return sinusoidal_3d(arrangement.coordinates, self.width)


def _sines_first(positions: Float[Tensor, " n"], width: int) -> Float[Tensor, "n {width}"]:
    """Sines, then cosines, of the same frequencies as ``sinusoidal``."""
    cosines, sines = sinusoidal(positions, width).chunk(2, dim=-1)
    return torch.cat([sines, cosines], dim=-1)


class SinusoidalPlane(PositionEmbedding):
    """The image DiT's fixed positions: column in the first half of the channels, row in the second
    (``get_2d_sincos_pos_embed`` of its public code).
    """

    def __init__(self, width: int, before_block: int = 0):
        super().__init__(before_block)
        if width % 4:
            raise ValueError(f"width {width} is not a multiple of 4: two axes of sines and cosines")
        self.width = width

    def forward(self, arrangement: Arrangement) -> Float[Tensor, "n d"]:
        _, row, column = arrangement.coordinates.float().unbind(-1)
        half = self.width // 2
        return torch.cat([_sines_first(column, half), _sines_first(row, half)], dim=-1)


class SinusoidalTime(PositionEmbedding):
    """Latte's fixed temporal positions, which its public code adds before the first temporal
    block: ``before_block`` = 1 in the alternating layout.
    """

    def __init__(self, width: int, before_block: int = 1):
        super().__init__(before_block)
        self.width = width

    def forward(self, arrangement: Arrangement) -> Float[Tensor, "n d"]:
        return _sines_first(arrangement.coordinates[:, 0].float(), self.width)


class Learned(PositionEmbedding):
    """A learned vector for each frame and one for each place of a frame, up to a largest ``grid``
    of frames, rows and columns (W.A.L.T, arXiv 2312.06662, section 4.1).

    ``ValueError`` for a clip that reaches beyond the grid.
    """

    def __init__(self, width: int, grid: Sequence[int], before_block: int = 0):
        super().__init__(before_block)
        if len(grid) != 3 or min(grid) < 1:
            raise ValueError(f"grid = {list(grid)} must be three positive numbers")
        self.grid = tuple(grid)
        frames, rows, columns = grid
        self.time = nn.Parameter(torch.empty(frames, width))
        self.space = nn.Parameter(torch.empty(rows, columns, width))
        for table in (self.time, self.space):
            nn.init.trunc_normal_(table, std=0.02)

    def forward(self, arrangement: Arrangement) -> Float[Tensor, "n d"]:
        for grid in arrangement.grids:
            if grid.f > self.grid[0] or grid.h > self.grid[1] or grid.w > self.grid[2]:
                raise ValueError(f"{grid} reaches beyond the learned positions of {self.grid}")
        frame, row, column = arrangement.coordinates.unbind(-1)
        return self.time[frame] + self.space[row, column]


class Fractional(PositionEmbedding):
    """A learned curve along each axis, read at the token's share of its clip's extent, the three
    added up: factorised fractional positions (NaViT, arXiv 2307.06304, section 2.1).

    A curve has ``num_points`` learned vectors and runs straight between them; position p of s
    stands at (p + 1/2) / s, so a clip twice as fine passes the same curve in half the steps.
    """

    def __init__(self, width: int, num_points: int = 32, before_block: int = 0):
        super().__init__(before_block)
        if num_points < 2:
            raise ValueError(f"num_points = {num_points} must be at least 2")
        self.curves = nn.Parameter(torch.empty(3, num_points, width))
        nn.init.trunc_normal_(self.curves, std=0.02)

    def forward(self, arrangement: Arrangement) -> Float[Tensor, "n d"]:
        share = (arrangement.coordinates + 0.5) / arrangement.extents  # n 3, in (0, 1)
        place = rearrange(share, "n three -> three n") * (self.curves.shape[1] - 1)
        before = place.long()
        weight = (place - before)[..., None]
        axis = torch.arange(3, device=share.device)[:, None]
        low, high = self.curves[axis, before], self.curves[axis, before + 1]  # 3 n d
        return torch.lerp(low, high, weight.to(low)).sum(dim=0)


@dataclass(frozen=True)
class Rotary:
    """3-D rotary positions: time, rows and columns turn channels of their own (arXiv 2104.09864).

    ``base`` is the longest wavelength over 2 pi, in tokens. Where a clip has more frames than
    ``trained_frames``, the channels that turn less than once over that many frames turn slower in
    proportion and all others as ever ("NTK-by-parts", arXiv 2309.00071, section 3.2): no channel
    then shows an angle that training did not. Null leaves every clip as it is.
    """

    base: float = 100.0
    trained_frames: int | None = None

    def __post_init__(self) -> None:
        if self.base <= 1:
            raise ValueError(f"base = {self.base} must be above 1")
        if self.trained_frames is not None and self.trained_frames < 1:
            raise ValueError(f"trained_frames = {self.trained_frames} must be at least 1")

    def angles(self, arrangement: Arrangement, head_width: int) -> Float[Tensor, "n a"]:
        """The angle of each pair of channels of a head, for each token."""
        parts = []
        for axis, share in enumerate(axis_widths(head_width)):
            position = arrangement.coordinates[:, axis, None].float()
            turns = position * rotary_frequencies(share, self.base, arrangement.device)
            parts.append(turns)
        if self.trained_frames is not None:
            parts[0] = parts[0] * self._slowing(arrangement, axis_widths(head_width)[0])
        return torch.cat(parts, dim=-1)

    def _slowing(self, arrangement: Arrangement, width: int) -> Float[Tensor, "n a"]:
        assert self.trained_frames is not None
        frequencies = rotary_frequencies(width, self.base, arrangement.device)
        longer = self.trained_frames / arrangement.extents[:, :1].clamp(min=self.trained_frames)
        turns_once = frequencies * self.trained_frames >= 2 * math.pi
        return torch.where(turns_once, 1.0, longer)
