"""Distributions of training times, and time grids of samplers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from sora_lightning.checks import require_at_least, require_positive
from sora_lightning.diffusion.paths import VarianceExploding, shift_time

NumTokens = int | Tensor | None


class TrainingTimes(ABC):
    """A distribution of training times. Its shift is shared with the sampler's time grid."""

    @abstractmethod
    def __call__(
        self, normal: Float[Tensor, " b"], num_tokens: NumTokens = None
    ) -> Float[Tensor, " b"]:
        """Return times in [0, 1] for standard normal numbers. ``num_tokens`` is one number for all
        clips, or a tensor with one for each.
        """

    def sampling_shift(self, num_tokens: int) -> float:
        """Return the shift of a sampler's times for clips of ``num_tokens`` tokens; 1 is none."""
        return 1.0


@dataclass(frozen=True)
class ShiftedTimes(TrainingTimes):
    """A base class of distributions that are shifted: ``shift`` > 1 favours noise.

    With ``base_tokens`` the shift holds for clips of that many tokens, and grows with the root of
    their number (arXiv 2403.03206, equation 23): the more pixels show a thing, the more noise it
    takes to hide it.
    """

    shift: float = 1.0
    base_tokens: int | None = None

    def __post_init__(self) -> None:
        require_positive(shift=self.shift)
        require_at_least(1, base_tokens=self.base_tokens)

    def sampling_shift(self, num_tokens: int) -> float:
        return float(self._shift(num_tokens))

    def _shift(self, num_tokens: NumTokens) -> float | Tensor:
        if self.base_tokens is None:
            return self.shift
        if num_tokens is None:
            raise ValueError(f"base_tokens = {self.base_tokens} asks for the clips' num_tokens")
        if isinstance(num_tokens, Tensor):
            return self.shift * (num_tokens / self.base_tokens).sqrt()
        return self.shift * math.sqrt(num_tokens / self.base_tokens)


@dataclass(frozen=True)
class Uniform(ShiftedTimes):
    """Uniform over [0, 1], then shifted.

    With ``num_values``, uniform over ``1 / num_values, 2 / num_values, ..., 1``, as the steps of a
    discrete diffusion.
    """

    num_values: int | None = None

    def __call__(
        self, normal: Float[Tensor, " b"], num_tokens: NumTokens = None
    ) -> Float[Tensor, " b"]:
        t = torch.special.ndtr(normal)
        if self.num_values is not None:
            t = ((t * self.num_values).floor() + 1).clamp(max=self.num_values) / self.num_values
        return shift_time(t, self._shift(num_tokens))


@dataclass(frozen=True)
class SizeShift:
    """A shift whose logarithm is linear in the number of tokens, through two points (the schedules
    of FLUX and LTX-Video in diffusers).
    """

    num_tokens: tuple[int, int]
    log_shifts: tuple[float, float]

    def __post_init__(self) -> None:
        if not 0 < self.num_tokens[0] < self.num_tokens[1]:
            raise ValueError(f"num_tokens = {self.num_tokens}: must be positive and rising")

    def __call__(self, num_tokens: int | Tensor) -> float | Tensor:
        (n_0, n_1), (low, high) = self.num_tokens, self.log_shifts
        log_shift = low + (high - low) * (num_tokens - n_0) / (n_1 - n_0)
        return log_shift.exp() if isinstance(log_shift, Tensor) else math.exp(log_shift)


@dataclass(frozen=True)
class LogitNormal(ShiftedTimes):
    """Training times whose logit is normal (arXiv 2403.03206, section 3.1), then shifted.

    A positive ``mean`` favours noise. ``by_size`` takes the place of ``shift`` and ``base_tokens``.
    """

    mean: float = 0.0
    std: float = 1.0
    by_size: SizeShift | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by_size is not None and (self.shift != 1 or self.base_tokens is not None):
            raise ValueError(f"by_size = {self.by_size}: takes the place of shift and base_tokens")
        require_positive(std=self.std)

    def __call__(
        self, normal: Float[Tensor, " b"], num_tokens: NumTokens = None
    ) -> Float[Tensor, " b"]:
        t = torch.sigmoid(self.mean + self.std * normal)
        return shift_time(t, self._shift(num_tokens))

    def _shift(self, num_tokens: NumTokens) -> float | Tensor:
        if self.by_size is None:
            return super()._shift(num_tokens)
        if num_tokens is None:
            raise ValueError(f"by_size = {self.by_size} asks for the clips' num_tokens")
        return self.by_size(num_tokens)


@dataclass(frozen=True)
class LogNormalSigma(TrainingTimes):
    """Noise levels whose logarithm is normal, on a variance-exploding path (EDM, arXiv 2206.00364,
    table 1).
    """

    mean: float = -1.2
    std: float = 1.2
    path: VarianceExploding = field(default_factory=VarianceExploding)

    def __post_init__(self) -> None:
        require_positive(std=self.std)

    def __call__(
        self, normal: Float[Tensor, " b"], num_tokens: NumTokens = None
    ) -> Float[Tensor, " b"]:
        return self.path.time(torch.exp(self.mean + self.std * normal)).clamp(max=1)


def uniform_times(num_steps: int, shift: float = 1.0) -> Float[Tensor, " s"]:
    """Return ``num_steps + 1`` times from 1 to 0, shifted towards noise for ``shift`` > 1."""
    require_at_least(1, num_steps=num_steps)
    return shift_time(torch.linspace(1, 0, num_steps + 1), shift)


def spaced_times(num_steps: int, num_values: int = 1000) -> Float[Tensor, " s"]:
    """Return the times of ``num_steps`` of a discrete diffusion's ``num_values`` steps, and 0, in
    float64: the grid of DiT's sampling (arXiv 2102.09672, section 4). The first and the last step
    are among them.
    """
    if not 2 <= num_steps <= num_values:
        raise ValueError(f"num_steps = {num_steps}: must lie between 2 and {num_values}")
    stride = (num_values - 1) / (num_steps - 1)
    kept = [round(stride * n) + 1 for n in range(num_steps)]
    return torch.tensor([*reversed(kept), 0], dtype=torch.float64) / num_values


def karras_times(
    num_steps: int, path: VarianceExploding, sigma_min: float = 0.002
) -> Float[Tensor, " s"]:
    """Return EDM's grid (arXiv 2206.00364, equation 5) in float64: even in ``sigma^(1 / rho)`` from
    ``sigma_max`` to ``sigma_min``, and 0.
    """
    if num_steps < 2 or not 0 < sigma_min < path.sigma_max:
        raise ValueError(
            f"num_steps = {num_steps} must be at least 2, and sigma_min = {sigma_min} positive and "
            f"below sigma_max = {path.sigma_max}"
        )
    last = path.time(torch.tensor(sigma_min, dtype=torch.float64))
    steps = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    return torch.cat([1 + steps * (last - 1), steps.new_zeros(1)])
