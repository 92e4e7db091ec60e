"""Coordinates of the tokens of a grid, and the channels of each axis."""

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor

from sora_lightning.types import TokenGrid


def grid_coordinates(grid: TokenGrid, device: torch.device) -> Int[Tensor, "n 3"]:
    """Return ``(frame, row, column)`` of every token, frame-major, which is the order of tokens
    everywhere.
    """
    axes = [torch.arange(length, device=device) for length in (grid.f, grid.h, grid.w)]
    return rearrange(torch.stack(torch.meshgrid(*axes, indexing="ij")), "a f h w -> (f h w) a")


def axis_widths(width: int) -> tuple[int, int, int]:
    """Divide channels evenly among time, rows and columns; time takes the remainder."""
    if width % 2:
        raise ValueError(f"width {width} must be even to hold sines and cosines")
    space = width // 6 * 2
    return width - 2 * space, space, space
