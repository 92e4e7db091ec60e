"""A learned vector for every place of a grid, interpolated for any other grid."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sora_lightning.types import TokenGrid


class LearnedPositions(nn.Module):
    """A table over ``frames`` x ``rows`` x ``columns`` tokens. A grid of another extent takes its
    positions from it by trilinear interpolation.
    """

    def __init__(self, frames: int, rows: int, columns: int, width: int):
        super().__init__()
        if min(frames, rows, columns) < 1:
            raise ValueError(f"{frames} x {rows} x {columns} positions: each must be at least 1")
        self.table = nn.Parameter(torch.empty(frames, rows, columns, width))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, grid: TokenGrid) -> Float[Tensor, "n d"]:
        table: Tensor = self.table
        if (grid.f, grid.h, grid.w) != tuple(table.shape[:3]):
            batch = rearrange(table, "f h w d -> 1 d f h w")
            batch = F.interpolate(batch, (grid.f, grid.h, grid.w), mode="trilinear")
            table = rearrange(batch, "1 d f h w -> f h w d")
        return rearrange(table, "f h w d -> (f h w) d")
