"""Resizing of frames as in public code.

The variants differ by up to 18 of 255 levels on average, which changes an FVD by more than most
models do.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

Filter = Literal["bilinear", "bilinear-antialias", "bicubic-antialias", "bilinear-tf1"]
Fit = Literal["squash", "cover"]


def resize(
    frames: Float[Tensor, "b c h w"], height: int, width: int, filter: Filter
) -> Float[Tensor, "b c height width"]:
    """Resize frames; values are clamped to 0..255, which bicubic filters overshoot.

    ``bilinear-tf1`` is ``tf.image.resize_bilinear`` of TensorFlow 1: output pixel i is sampled at i
    * input / output, without the half-pixel offset of later versions. Raises ``ValueError`` for an
    unknown filter.
    """
    if filter == "bilinear-tf1":
        return _tf1(_tf1(frames, height).mT, width).mT
    if filter not in get_args(Filter):
        raise ValueError(f"filter {filter!r}: must be one of {', '.join(get_args(Filter))}")
    mode, _, antialias = filter.partition("-")
    if frames.shape[2:] == (height, width):
        return frames
    resized = F.interpolate(frames, size=[height, width], mode=mode, antialias=bool(antialias))
    return resized.clamp(0, 255)


def _tf1(frames: Float[Tensor, "b c h w"], height: int) -> Float[Tensor, "b c height w"]:
    """Interpolate rows. As in TensorFlow, positions are computed in float32."""
    places = torch.arange(height, device=frames.device) * (frames.shape[2] / height)
    low = places.floor().long()
    high = (low + 1).clamp(max=frames.shape[2] - 1)
    part = (places - low).to(frames.dtype)[:, None]
    return frames[:, :, low] * (1 - part) + frames[:, :, high] * part


def to_square(
    videos: UInt8[Tensor, "b 3 F H W"], side: int, filter: Filter, fit: Fit
) -> Float[Tensor, "b 3 F side side"]:
    """Resize videos to side x side in 0..255, without rounding.

    ``squash`` changes the aspect ratio; ``cover`` resizes the short side to ``side`` and
    center-crops. Raises ``ValueError`` for another fit.
    """
    frames = rearrange(videos, "b c F H W -> (b F) c H W").float()
    if fit == "squash":
        frames = resize(frames, side, side, filter)
    elif fit == "cover":
        short = min(videos.shape[3:])
        height, width = (-(-n * side // short) for n in videos.shape[3:])  # rounded up
        frames = resize(frames, height, width, filter)
        top, left = (height - side) // 2, (width - side) // 2
        frames = frames[:, :, top : top + side, left : left + side]
    else:
        raise ValueError(f"fit {fit!r}: must be one of {', '.join(get_args(Fit))}")
    return rearrange(frames, "(b F) c H W -> b c F H W", b=len(videos))
