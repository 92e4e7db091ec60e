"""3-D rotary position embedding (arXiv 2104.09864)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from sora_lightning.checks import require_at_least
from sora_lightning.layers.packed_sequence import PackedSequence
from sora_lightning.layers.positions.coordinates import axis_widths


def rotary_frequencies(width: int, base: float, device: torch.device) -> Float[Tensor, " pairs"]:
    """Return the radians per token of each channel pair, from 1 to almost 1 / ``base``."""
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=device) / max(half, 1)
    return base**-exponent


def rotary_angles(
    coordinates: Int[Tensor, "n 3"], head_width: int, base: float = 100.0
) -> Float[Tensor, "n {head_width}//2"]:
    """Return the rotation angle of each channel pair, axes on separate channels.

    ``base`` is the longest wavelength over 2 pi, in tokens. It is far shorter than for text, since
    axes are short.
    """
    angles = []
    for axis, share in enumerate(axis_widths(head_width)):
        frequencies = rotary_frequencies(share, base, coordinates.device)
        angles.append(coordinates[..., axis, None].float() * frequencies)
    return torch.cat(angles, dim=-1)


def rotate(
    x: Float[Tensor, "... n d"], angles: Float[Tensor, "... n d//2"]
) -> Float[Tensor, "... n d"]:
    """Rotate each pair of channels by its angle."""
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


@dataclass(frozen=True)
class Rotary:
    """3-D rotary positions: time, rows and columns rotate separate channels (arXiv 2104.09864).

    ``base`` is the longest wavelength over 2 pi, in tokens. In a clip of more frames than
    ``trained_frames``, channels that turn less than once over that many frames turn more slowly
    ("NTK-by-parts", arXiv 2309.00071, section 3.2): no channel has an angle that training did not
    show. Null leaves all clips as they are.
    """

    base: float = 100.0
    trained_frames: int | None = None

    def __post_init__(self) -> None:
        if self.base <= 1:
            raise ValueError(f"base = {self.base} must be above 1")
        require_at_least(1, trained_frames=self.trained_frames)

    def angles(self, sequence: PackedSequence, head_width: int) -> Float[Tensor, "n a"]:
        """Return the angle of each pair of channels of a head, for each token."""
        angles = rotary_angles(sequence.coordinates, head_width, self.base)
        if self.trained_frames is None:
            return angles
        of_time, of_space = angles.tensor_split([axis_widths(head_width)[0] // 2], dim=-1)
        return torch.cat([of_time * self._slowing(sequence, 2 * of_time.shape[-1]), of_space], -1)

    def _slowing(self, sequence: PackedSequence, width: int) -> Float[Tensor, "n a"]:
        """Return the factor of each time channel: the last frame of a longer clip then has the
        angle of the last trained one.
        """
        assert self.trained_frames is not None
        frequencies = rotary_frequencies(width, self.base, sequence.device)
        last = (sequence.extents[:, :1].clamp(min=self.trained_frames) - 1).clamp(min=1)
        turns_once = frequencies * self.trained_frames >= 2 * math.pi
        return torch.where(turns_once, 1.0, (self.trained_frames - 1) / last)
