"""Paths from data to noise, ``x_t = alpha(t) x_0 + sigma(t) noise``, as pure functions of time:
0 = data, 1 = noise.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from sora_lightning.checks import require_at_least, require_positive


def broadcast_time(t: Float[Tensor, " b *s"], like: Float[Tensor, "b ..."]) -> Tensor:
    """Reshape a time for each clip to multiply the clips' tensor; a time for each position is
    returned as it is.
    """
    return t if t.ndim == like.ndim else t.reshape(-1, *[1] * (like.ndim - 1))


def shift_time(t: Float[Tensor, "..."], shift: float | Tensor) -> Float[Tensor, "..."]:
    """``s t / (1 + (s - 1) t)``: more time at high noise for ``shift`` > 1 (arXiv 2403.03206,
    equation 23).
    """
    return shift * t / (1 + (shift - 1) * t)


class Path(ABC):
    """Coefficients of data and noise in ``x_t``. ``alpha(0) = 1`` and ``sigma(0) = 0`` exactly.

    Every function takes times of any shape and returns that shape in their precision.
    """

    @abstractmethod
    def alpha(self, t: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """Return the coefficient of the data."""

    @abstractmethod
    def sigma(self, t: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """Return the coefficient of the noise."""

    @abstractmethod
    def d_alpha(self, t: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """Return ``d alpha / dt``."""

    @abstractmethod
    def d_sigma(self, t: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """Return ``d sigma / dt``; infinite at 0 where the variance grows linearly."""

    def scale(self, t: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """Return EDM's s(t) (arXiv 2206.00364, section 4): ``x_t / s(t)`` is a straight line while
        the prediction is constant, and a second-order method averages two slopes on it.
        """
        return self.alpha(t)

    def perturb(
        self, x_0: Float[Tensor, "b ..."], noise: Float[Tensor, "b ..."], t: Float[Tensor, " b"]
    ) -> Float[Tensor, "b ..."]:
        """Return ``x_t``: exactly ``x_0`` at time 0."""
        return broadcast_time(self.alpha(t), x_0) * x_0 + broadcast_time(self.sigma(t), x_0) * noise

    def half_log_snr(self, t: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """Return ``log(alpha / sigma)``, the lambda of DPM-Solver (arXiv 2206.00927).

        It is infinite at the ends, where one of the two is 0.
        """
        return torch.log(self.alpha(t)) - torch.log(self.sigma(t))


@dataclass(frozen=True)
class RectifiedFlow(Path):
    """The straight line (arXiv 2209.03003): ``alpha = 1 - t``, ``sigma = t``."""

    def alpha(self, t: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        return 1 - t

    def sigma(self, t: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        return t

    def d_alpha(self, t: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        return -torch.ones_like(t)

    def d_sigma(self, t: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        return torch.ones_like(t)

    def scale(self, t: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        return torch.ones_like(t)


class Betas(ABC):
    """Variances that the steps of a discrete diffusion add; a table on the CPU."""

    @abstractmethod
    def __call__(self, num_steps: int) -> Float[Tensor, " {num_steps}"]:
        """Return them in float64, beginning with the step next to the data."""


@dataclass(frozen=True)
class LinearBetas(Betas):
    """Evenly spaced (arXiv 2006.11239, section 4); DiT's and W.A.L.T's values."""

    start: float = 1e-4
    end: float = 0.02

    def __call__(self, num_steps: int) -> Float[Tensor, " {num_steps}"]:
        return torch.linspace(self.start, self.end, num_steps, dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class ScaledLinearBetas(Betas):
    """Evenly spaced square roots, called linear in latent diffusion; Stable Diffusion's values."""

    start: float = 0.00085
    end: float = 0.012

    def __call__(self, num_steps: int) -> Float[Tensor, " {num_steps}"]:
        ends = math.sqrt(self.start), math.sqrt(self.end)
        return torch.linspace(*ends, num_steps, dtype=torch.float64, device="cpu").square()


@dataclass(frozen=True)
class CosineBetas(Betas):
    """Betas of a squared alpha that is a ``cos^2`` (arXiv 2102.09672, equation 17), clamped to
    ``largest``.
    """

    offset: float = 0.008
    largest: float = 0.999

    def __call__(self, num_steps: int) -> Float[Tensor, " {num_steps}"]:
        t = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64, device="cpu")
        alpha_squared = ((t + self.offset) / (1 + self.offset) * math.pi / 2).cos().square()
        return (1 - alpha_squared[1:] / alpha_squared[:-1]).clamp(max=self.largest)


@dataclass(frozen=True)
class ShiftedBetas(Betas):
    """Betas of which the signal-to-noise ratio is divided by ``shift`` at each step: more noise for
    ``shift`` > 1 (CogVideoX, arXiv 2408.06072, trains its 2B model with 3).
    """

    betas: Betas
    shift: float

    def __post_init__(self) -> None:
        require_positive(shift=self.shift)

    def __call__(self, num_steps: int) -> Float[Tensor, " {num_steps}"]:
        alpha_squared = (1 - self.betas(num_steps)).cumprod(0)
        shifted = alpha_squared / (self.shift + (1 - self.shift) * alpha_squared)
        return 1 - shifted / torch.cat([shifted.new_ones(1), shifted[:-1]])


@dataclass(frozen=True)
class VariancePreserving(Path):
    """``alpha^2 + sigma^2 = 1``, with the alphas of a discrete diffusion.

    Step n, counted from 0, has time ``(n + 1) / num_steps``; the data have time 0. Between steps
    alpha is interpolated linearly. ``zero_terminal_snr`` shifts and scales the alphas so that
    nothing of the data is left at time 1 (arXiv 2305.08891, algorithm 1).
    """

    betas: Betas = LinearBetas()
    num_steps: int = 1000
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        require_at_least(2, num_steps=self.num_steps)
        betas = self.betas(self.num_steps)
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(f"{self.betas} gives variances that do not lie between 0 and 1")

    @cached_property
    def alphas(self) -> Float[Tensor, " points"]:
        """Alphas at times 0, 1 / num_steps, ..., 1, in float64."""
        alphas = (1 - self.betas(self.num_steps)).cumprod(0).sqrt()
        if self.zero_terminal_snr:
            alphas = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
        return torch.cat([alphas.new_ones(1), alphas])

    def alpha(self, t: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        return self._alpha(t).to(t.dtype)

    def sigma(self, t: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        return (1 - self._alpha(t).square()).clamp(min=0).sqrt().to(t.dtype)

    def d_alpha(self, t: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        left, right, _ = self._around(t)
        return ((right - left) * self.num_steps).to(t.dtype)

    def d_sigma(self, t: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        return -self.alpha(t) * self.d_alpha(t) / self.sigma(t)

    def _alpha(self, t: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        # In float64: near the data sigma is the root of a small difference.
        left, right, fraction = self._around(t)
        return left + (right - left) * fraction

    def _around(self, t: Float[Tensor, "*s"]) -> tuple[Tensor, Tensor, Tensor]:
        place = t.double() * self.num_steps
        index = place.floor().long().clamp(0, self.num_steps - 1)
        alphas = self.alphas.to(t.device)
        return alphas[index], alphas[index + 1], place - index


@dataclass(frozen=True)
class VarianceExploding(Path):
    """``alpha = 1`` and ``sigma = sigma_max t^rho`` (EDM, arXiv 2206.00364, equation 5 with a
    sigma_min of 0): even steps in time are EDM's steps.
    """

    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        require_positive(sigma_max=self.sigma_max)
        require_at_least(1, rho=self.rho)

    def alpha(self, t: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        return torch.ones_like(t)

    def sigma(self, t: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        return self.sigma_max * t**self.rho

    def d_alpha(self, t: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        return torch.zeros_like(t)

    def d_sigma(self, t: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        return self.sigma_max * self.rho * t ** (self.rho - 1)

    def time(self, sigma: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """Return the time at which the noise has standard deviation ``sigma``."""
        return (sigma / self.sigma_max) ** (1 / self.rho)


@dataclass(frozen=True)
class Transition:
    """The Gaussian step between two times ``s < t`` of a path.

    ``q(x_t | x_s)`` has variance ``beta``. The posterior ``q(x_s | x_t, x_0)`` has the mean
    ``x_0_coefficient x_0 + x_t_coefficient x_t`` and the variance ``posterior_variance`` (arXiv
    2006.11239, equation 7; arXiv 2107.00630, appendix A.4).
    """

    x_0_coefficient: Float[Tensor, "*s"]
    x_t_coefficient: Float[Tensor, "*s"]
    beta: Float[Tensor, "*s"]
    posterior_variance: Float[Tensor, "*s"]

    @classmethod
    def of(cls, path: Path, s: Float[Tensor, "*s"], t: Float[Tensor, "*s"]) -> Transition:
        """Compute the step in float64. ``beta`` is for a coefficient 1 of the data at ``s``: where
        alpha(s) is 0 there is no such step.
        """
        s, t = s.double(), t.double()
        ratio = path.alpha(t) / path.alpha(s)
        before, after = path.sigma(s).square(), path.sigma(t).square()
        beta = after - ratio.square() * before
        return cls(
            x_0_coefficient=path.alpha(s) * beta / after,
            x_t_coefficient=ratio * before / after,
            beta=beta,
            posterior_variance=beta * before / after,
        )
