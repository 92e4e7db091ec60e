"""What a denoiser is trained for. Values in, values out: noise and time are passed in."""

import torch
from jaxtyping import Float
from torch import Tensor

from sora_lightning.diffusion.paths import interpolate, velocity
from sora_lightning.types import (
    Condition,
    DenoiserFunction,
    PackedDenoiserFunction,
    PackedLatents,
)


def rectified_flow_loss(
    denoiser: DenoiserFunction,
    x_0: Float[Tensor, "b c f h w"],
    noise: Float[Tensor, "b c f h w"],
    t: Float[Tensor, " b"],
    condition: Condition,
) -> Float[Tensor, " b"]:
    """Mean squared error of the velocity at ``x_t``, for each clip (arXiv 2209.03003, equation
    1).
    """
    x_t = interpolate(x_0, noise, t)
    v = denoiser(x_t, t, condition)
    return (v - velocity(x_0, noise)).square().flatten(1).mean(1)


def packed_rectified_flow_loss(
    denoiser: PackedDenoiserFunction,
    x_0: PackedLatents,
    noise: PackedLatents,
    t: Float[Tensor, " b"],
    condition: Condition,
) -> Float[Tensor, " b"]:
    """The same for clips that share a sequence, one value for each clip whatever its size."""
    x_t = x_0.map(lambda x, e, time: (1 - time) * x + time * e, noise.clips, t)
    v = denoiser(x_t, t, condition)
    errors = zip(v.clips, x_0.clips, noise.clips, strict=True)
    return torch.stack([(a - velocity(x, e)).square().mean() for a, x, e in errors])
