"""Coordinates of the tokens of a grid, and how channels are divided among its axes."""

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor

from sora_lightning.types import TokenGrid


def grid_coordinates(grid: TokenGrid, device: torch.device) -> Int[Tensor, "n 3"]:
    """``(frame, row, column)`` of every token, frame-major: the order that tokens stand in
    everywhere.
    """
    axes = [torch.arange(length, device=device) for length in (grid.f, grid.h, grid.w)]
    return rearrange(torch.stack(torch.meshgrid(*axes, indexing="ij")), "a f h w -> (f h w) a")


def axis_widths(width: int) -> tuple[int, int, int]:
    """Split channels over time, rows and columns in even parts; time takes the remainder."""
    if width % 2:
        raise ValueError(f"width {width} must be even to hold sines and cosines")
    space = width // 6 * 2
    return width - 2 * space, space, space
