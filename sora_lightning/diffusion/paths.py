"""Paths from data to noise, as pure functions of time: 0 = data, 1 = noise."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


def broadcast_time(t: Float[Tensor, " b"], like: Float[Tensor, "b ..."]) -> Tensor:
    """A time for each clip, shaped to multiply its tensor."""
    return t.reshape(-1, *[1] * (like.ndim - 1))


def interpolate(
    x_0: Float[Tensor, "b ..."], noise: Float[Tensor, "b ..."], t: Float[Tensor, " b"]
) -> Float[Tensor, "b ..."]:
    """Rectified flow's straight line ``(1 - t) x_0 + t noise`` (arXiv 2209.03003, equation 1, time
    reversed).
    """
    t = broadcast_time(t, x_0)
    return (1 - t) * x_0 + t * noise


def velocity(x_0: Float[Tensor, "b ..."], noise: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
    """``dx_t / dt`` of the straight line: ``noise - x_0``, the same at every time."""
    return noise - x_0


def data_from_velocity(
    x_t: Float[Tensor, "b ..."], v: Float[Tensor, "b ..."], t: Float[Tensor, " b"]
) -> Float[Tensor, "b ..."]:
    """The data that a velocity at ``x_t`` points back to: ``x_t - t v``."""
    return x_t - broadcast_time(t, x_t) * v


def shift_time(t: Float[Tensor, "..."], shift: float) -> Float[Tensor, "..."]:
    """``s t / (1 + (s - 1) t)``: more time at high noise for ``shift`` > 1 (arXiv 2403.03206,
    equation 23).
    """
    return shift * t / (1 + (shift - 1) * t)


@dataclass(frozen=True)
class LogitNormal:
    """Training times whose logit is normal (arXiv 2403.03206, section 3.1), then shifted.

    A positive ``mean`` favours noise.
    """

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.std <= 0 or self.shift <= 0:
            raise ValueError(f"std = {self.std} and shift = {self.shift} must be positive")

    def __call__(self, normal: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Times in (0, 1) for standard normal draws."""
        return shift_time(torch.sigmoid(self.mean + self.std * normal), self.shift)
