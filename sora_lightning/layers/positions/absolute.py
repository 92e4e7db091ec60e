"""Absolute position embeddings: vectors added to the tokens.

They are computed from the tokens' coordinates, so clips of any sizes may share a sequence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from sora_lightning.checks import require_at_least, require_three
from sora_lightning.layers.packed_sequence import PackedSequence
from sora_lightning.layers.positions.coordinates import axis_widths
from sora_lightning.types import TokenGrid


def sinusoidal(
    positions: Float[Tensor, "*shape"], width: int, max_period: float = 10_000.0
) -> Float[Tensor, "*shape {width}"]:
    """Return cosines, then sines, of geometrically spaced frequencies (arXiv 1706.03762; cosines
    first as in DiT).
    """
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=positions.device) / half
    angles = positions[..., None].float() * max_period**-exponent
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sinusoidal_3d(coordinates: Int[Tensor, "n 3"], width: int) -> Float[Tensor, "n {width}"]:
    """Return the sinusoids of frame, row and column, concatenated."""
    parts = [
        sinusoidal(coordinates[..., axis].float(), share)
        for axis, share in enumerate(axis_widths(width))
    ]
    return torch.cat(parts, dim=-1)


def _sines_first(positions: Float[Tensor, " n"], width: int) -> Float[Tensor, "n {width}"]:
    """Return sines, then cosines, of the frequencies of ``sinusoidal``."""
    cosines, sines = sinusoidal(positions, width).chunk(2, dim=-1)
    return torch.cat([sines, cosines], dim=-1)


class PositionEmbedding(nn.Module, ABC):
    """Vectors of tokens that are added before block ``before_block``, counted from 0."""

    def __init__(self, before_block: int = 0):
        super().__init__()
        require_at_least(0, before_block=before_block)
        self.before_block = before_block

    @abstractmethod
    def forward(self, sequence: PackedSequence) -> Float[Tensor, "n d"]: ...


class PositionEmbeddings(nn.ModuleList):
    """The position embeddings of a network, each added to the tokens before its block."""

    def __init__(self, embeddings: Iterable[PositionEmbedding], last_block: int):
        super().__init__(embeddings)
        self.check(last_block)

    def check(self, last_block: int) -> None:
        """Raise ``ValueError`` for a ``before_block`` above ``last_block``."""
        for embedding in self:
            assert isinstance(embedding, PositionEmbedding)
            if embedding.before_block > last_block:
                raise ValueError(
                    f"before_block = {embedding.before_block} of {type(embedding).__name__}: must "
                    f"be at most {last_block} in this network"
                )

    def add(
        self, x: Float[Tensor, "b n d"], block: int, sequence: PackedSequence
    ) -> Float[Tensor, "b n d"]:
        """Return the tokens with the positions that are added before this block."""
        for embedding in self:
            if embedding.before_block == block:
                x = x + sequence.own_tokens(embedding(sequence)).to(x.dtype)
        return x


class Sinusoidal(PositionEmbedding):
    """Fixed sinusoids of frame, row and column, concatenated, for grids of any size."""

    def __init__(self, width: int, before_block: int = 0):
        super().__init__(before_block)
        self.width = width

    def forward(self, sequence: PackedSequence) -> Float[Tensor, "n d"]:
        return sinusoidal_3d(sequence.coordinates, self.width)


class SinusoidalPlane(PositionEmbedding):
    """Fixed positions of the image DiT: column in the first half of the channels, row in the second
    (``get_2d_sincos_pos_embed`` of its public code).
    """

    def __init__(self, width: int, before_block: int = 0):
        super().__init__(before_block)
        if width % 4:
            raise ValueError(f"width {width} is not a multiple of 4: two axes of sines and cosines")
        self.width = width

    def forward(self, sequence: PackedSequence) -> Float[Tensor, "n d"]:
        _, row, column = sequence.coordinates.float().unbind(-1)
        half = self.width // 2
        return torch.cat([_sines_first(column, half), _sines_first(row, half)], dim=-1)


class SinusoidalTime(PositionEmbedding):
    """Fixed temporal positions of Latte, added before its first temporal block.

    That is ``before_block`` = 1 in the alternating layout.
    """

    def __init__(self, width: int, before_block: int = 1):
        super().__init__(before_block)
        self.width = width

    def forward(self, sequence: PackedSequence) -> Float[Tensor, "n d"]:
        return _sines_first(sequence.coordinates[:, 0].float(), self.width)


class Learned(PositionEmbedding):
    """One learned vector for each frame and one for each position in a frame (W.A.L.T, arXiv
    2312.06662, section 4.1).

    ``grid`` is the largest number of frames, rows and columns. Raises ``ValueError`` for a larger
    clip.
    """

    def __init__(self, width: int, grid: Sequence[int], before_block: int = 0):
        super().__init__(before_block)
        require_three(1, grid=grid)
        self.grid = tuple(grid)
        frames, rows, columns = grid
        self.time = nn.Parameter(torch.empty(frames, width))
        self.space = nn.Parameter(torch.empty(rows, columns, width))
        for table in (self.time, self.space):
            nn.init.trunc_normal_(table, std=0.02)

    def forward(self, sequence: PackedSequence) -> Float[Tensor, "n d"]:
        for grid in sequence.grids:
            if grid.f > self.grid[0] or grid.h > self.grid[1] or grid.w > self.grid[2]:
                raise ValueError(f"{grid} reaches beyond the learned positions of {self.grid}")
        frame, row, column = sequence.coordinates.unbind(-1)
        return self.time[frame] + self.space[row, column]


class Fractional(PositionEmbedding):
    """Factorised fractional positions (NaViT, arXiv 2307.06304, section 2.1): the sum of a learned
    curve along each axis, evaluated at the token's fraction of the clip's extent.

    A curve interpolates ``num_points`` learned vectors linearly. Position p of s is at (p + 1/2) /
    s, so a clip of twice the resolution takes half the steps along the same curve.
    """

    def __init__(self, width: int, num_points: int = 32, before_block: int = 0):
        super().__init__(before_block)
        require_at_least(2, num_points=num_points)
        self.curves = nn.Parameter(torch.empty(3, num_points, width))
        nn.init.trunc_normal_(self.curves, std=0.02)

    def forward(self, sequence: PackedSequence) -> Float[Tensor, "n d"]:
        share = (sequence.coordinates + 0.5) / sequence.extents  # n 3, in (0, 1)
        place = rearrange(share, "n three -> three n") * (self.curves.shape[1] - 1)
        before = place.long()
        weight = (place - before)[..., None]
        axis = torch.arange(3, device=share.device)[:, None]
        low, high = self.curves[axis, before], self.curves[axis, before + 1]  # 3 n d
        return torch.lerp(low, high, weight.to(low)).sum(dim=0)


class LearnedPositions(nn.Module):
    """A learned table over ``frames`` x ``rows`` x ``columns`` tokens, interpolated (trilinear) for
    other grids.
    """

    def __init__(self, frames: int, rows: int, columns: int, width: int):
        super().__init__()
        require_at_least(1, where="positions: ", frames=frames, rows=rows, columns=columns)
        self.table = nn.Parameter(torch.empty(frames, rows, columns, width))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, grid: TokenGrid) -> Float[Tensor, "n d"]:
        table: Tensor = self.table
        if (grid.f, grid.h, grid.w) != tuple(table.shape[:3]):
            batch = rearrange(table, "f h w d -> 1 d f h w")
            batch = F.interpolate(batch, (grid.f, grid.h, grid.w), mode="trilinear")
            table = rearrange(batch, "1 d f h w -> f h w d")
        return rearrange(table, "f h w d -> (f h w) d")
