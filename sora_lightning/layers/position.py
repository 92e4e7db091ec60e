"""Where a token stands: absolute sinusoids and 3-D rotary angles, both computed from
coordinates.
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from sora_lightning.types import TokenGrid


def grid_coordinates(grid: TokenGrid, device: torch.device) -> Int[Tensor, "n 3"]:
    """``(frame, row, column)`` of every token, frame-major: the order that tokens stand in
    everywhere.
    """
    axes = [torch.arange(length, device=device) for length in (grid.f, grid.h, grid.w)]
    return rearrange(torch.stack(torch.meshgrid(*axes, indexing="ij")), "a f h w -> (f h w) a")


def sinusoidal(
    positions: Float[Tensor, "*shape"], width: int, max_period: float = 10_000.0
) -> Float[Tensor, "*shape {width}"]:
    """Cosines, then sines, of geometrically spaced frequencies (arXiv 1706.03762; cosines first as
    in DiT).
    """
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=positions.device) / half
    angles = positions[..., None].float() * max_period**-exponent
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def axis_widths(width: int) -> tuple[int, int, int]:
    """Split channels over time, rows and columns in even parts; time takes the remainder."""
    if width % 2:
        raise ValueError(f"width {width} must be even to hold sines and cosines")
    space = width // 6 * 2
    return width - 2 * space, space, space


def sinusoidal_3d(coordinates: Int[Tensor, "n 3"], width: int) -> Float[Tensor, "n {width}"]:
    """Sinusoids of frame, row and column side by side."""
    parts = [
        sinusoidal(coordinates[..., axis].float(), share)
        for axis, share in enumerate(axis_widths(width))
    ]
    return torch.cat(parts, dim=-1)


def rotary_frequencies(width: int, base: float, device: torch.device) -> Float[Tensor, " pairs"]:
    """Radians a token of each channel pair along one axis, from 1 down towards 1 / ``base``."""
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=device) / max(half, 1)
    return base**-exponent


def rotary_angles(
    coordinates: Int[Tensor, "n 3"], head_width: int, base: float = 100.0
) -> Float[Tensor, "n {head_width}//2"]:
    """Rotation angle of each channel pair: 3-D rotary embedding, axes on separate channels (arXiv
    2104.09864).

    ``base`` is the longest wavelength over 2 pi, in tokens: far shorter than for text, since axes
    are short.
    """
    angles = []
    for axis, share in enumerate(axis_widths(head_width)):
        frequencies = rotary_frequencies(share, base, coordinates.device)
        angles.append(coordinates[..., axis, None].float() * frequencies)
    return torch.cat(angles, dim=-1)


def rotate(
    x: Float[Tensor, "... n d"], angles: Float[Tensor, "... n d//2"]
) -> Float[Tensor, "... n d"]:
    """Turn each pair of channels by its angle."""
    if x.dtype in (torch.float32, torch.float64):
        # One product of complex numbers, in half the time of real ones on a CPU.
        pairs = torch.view_as_complex(rearrange(x, "... (pair two) -> ... pair two", two=2))
        turned = pairs * torch.polar(torch.ones_like(angles), angles).to(pairs.dtype)
        return rearrange(torch.view_as_real(turned), "... pair two -> ... (pair two)")
    a, b = rearrange(x, "... (pair two) -> two ... pair", two=2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return rearrange(
        torch.stack([a * cos - b * sin, a * sin + b * cos]), "two ... pair -> ... (pair two)"
    )
