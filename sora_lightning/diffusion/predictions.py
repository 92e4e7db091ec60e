"""What a network predicts at ``x_t``, and the data and the noise that its prediction stands for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sora_lightning.diffusion.paths import Path, RectifiedFlow, broadcast_time
from sora_lightning.types import Condition, DenoiserFunction


class Shares(NamedTuple):
    """A path's alpha and sigma at the times of a batch, shaped to multiply it, with derivatives."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    @classmethod
    def at(cls, path: Path, t: Float[Tensor, " b"], like: Float[Tensor, "b ..."]) -> Shares:
        values = path.alpha(t), path.sigma(t), path.d_alpha(t), path.d_sigma(t)
        return cls(*(broadcast_time(value, like).to(like) for value in values))


class Prediction(ABC):
    """Converts between a network's output and the data ``x_0`` and noise in ``x_t``.

    All are affine in each other at one ``x_t``, so guidance means the same in each.
    """

    @abstractmethod
    def target(
        self, x_0: Float[Tensor, "b ..."], noise: Float[Tensor, "b ..."], shares: Shares
    ) -> Float[Tensor, "b ..."]:
        """What the network should give where the data and the noise are these."""

    @abstractmethod
    def estimate(
        self, output: Float[Tensor, "b ..."], x_t: Float[Tensor, "b ..."], shares: Shares
    ) -> tuple[Float[Tensor, "b ..."], Float[Tensor, "b ..."]]:
        """The data and the noise that an output stands for."""

    @abstractmethod
    def gain(self, shares: Shares) -> Tensor:
        """How many times larger than the data's error the output's is, at one ``x_t``."""

    def input_scale(self, shares: Shares) -> Tensor | float:
        """What ``x_t`` is multiplied by before the network sees it."""
        return 1.0


@dataclass(frozen=True)
class Epsilon(Prediction):
    """The noise (arXiv 2006.11239)."""

    def target(self, x_0: Tensor, noise: Tensor, shares: Shares) -> Tensor:
        return noise

    def estimate(self, output: Tensor, x_t: Tensor, shares: Shares) -> tuple[Tensor, Tensor]:
        return (x_t - shares.sigma * output) / shares.alpha, output

    def gain(self, shares: Shares) -> Tensor:
        return shares.alpha / shares.sigma


@dataclass(frozen=True)
class Data(Prediction):
    """The data, ``x_0``."""

    def target(self, x_0: Tensor, noise: Tensor, shares: Shares) -> Tensor:
        return x_0

    def estimate(self, output: Tensor, x_t: Tensor, shares: Shares) -> tuple[Tensor, Tensor]:
        return output, (x_t - shares.alpha * output) / shares.sigma

    def gain(self, shares: Shares) -> Tensor:
        return torch.ones_like(shares.alpha)


@dataclass(frozen=True)
class V(Prediction):
    """``v = alpha noise - sigma x_0`` (arXiv 2202.00512, appendix D), which says something at every
    time, pure noise too.
    """

    def target(self, x_0: Tensor, noise: Tensor, shares: Shares) -> Tensor:
        return shares.alpha * noise - shares.sigma * x_0

    def estimate(self, output: Tensor, x_t: Tensor, shares: Shares) -> tuple[Tensor, Tensor]:
        alpha, sigma = shares.alpha, shares.sigma
        norm = alpha.square() + sigma.square()
        return (alpha * x_t - sigma * output) / norm, (sigma * x_t + alpha * output) / norm

    def gain(self, shares: Shares) -> Tensor:
        return (shares.alpha.square() + shares.sigma.square()) / shares.sigma


@dataclass(frozen=True)
class Velocity(Prediction):
    """``dx_t / dt = alpha' x_0 + sigma' noise`` (arXiv 2210.02747; SiT, arXiv 2401.08740)."""

    def target(self, x_0: Tensor, noise: Tensor, shares: Shares) -> Tensor:
        return shares.d_alpha * x_0 + shares.d_sigma * noise

    def estimate(self, output: Tensor, x_t: Tensor, shares: Shares) -> tuple[Tensor, Tensor]:
        alpha, sigma, d_alpha, d_sigma = shares
        determinant = alpha * d_sigma - sigma * d_alpha
        x_0 = (d_sigma * x_t - sigma * output) / determinant
        return x_0, (alpha * output - d_alpha * x_t) / determinant

    def gain(self, shares: Shares) -> Tensor:
        alpha, sigma, d_alpha, d_sigma = shares
        return (alpha * d_sigma - sigma * d_alpha).abs() / sigma


@dataclass(frozen=True)
class Preconditioned(Prediction):
    """EDM's: the network's input and target have variance 1 where the data have deviation
    ``data_std`` (arXiv 2206.00364, section 5 and table 1; here for any alpha).
    """

    data_std: float = 1.0

    def __post_init__(self) -> None:
        if self.data_std <= 0:
            raise ValueError(f"data_std = {self.data_std} must be positive")

    def target(self, x_0: Tensor, noise: Tensor, shares: Shares) -> Tensor:
        alpha, sigma = shares.alpha, shares.sigma
        # (x_0 - c_skip x_t) / c_out with the common factor sigma taken out, which is 0 at data
        return (sigma * x_0 / self.data_std - alpha * self.data_std * noise) / self._norm(shares)

    def estimate(self, output: Tensor, x_t: Tensor, shares: Shares) -> tuple[Tensor, Tensor]:
        alpha, sigma, norm = shares.alpha, shares.sigma, self._norm(shares)
        c_skip = alpha * self.data_std**2 / norm.square()
        c_out = sigma * self.data_std / norm
        noise = sigma * x_t / norm.square() - alpha * self.data_std * output / norm
        return c_skip * x_t + c_out * output, noise

    def gain(self, shares: Shares) -> Tensor:
        return self._norm(shares) / (shares.sigma * self.data_std)

    def input_scale(self, shares: Shares) -> Tensor | float:
        return 1 / self._norm(shares)

    def _norm(self, shares: Shares) -> Tensor:
        return ((shares.alpha * self.data_std).square() + shares.sigma.square()).sqrt()


class Estimate(NamedTuple):
    """What a network's output says at ``x_t``; ``variance`` is the second half of its channels,
    where it has twice those of ``x_t``.
    """

    x_0: Float[Tensor, "b c f h w"]
    noise: Float[Tensor, "b c f h w"]
    variance: Float[Tensor, "b c f h w"] | None


@dataclass(frozen=True)
class Process:
    """A path, and what the network predicts on it: all that objectives and samplers ask about."""

    path: Path = field(default_factory=RectifiedFlow)
    prediction: Prediction = field(default_factory=Velocity)

    def __post_init__(self) -> None:
        if isinstance(self.prediction, Epsilon) and self._share_at_noise() == 0:
            raise ValueError(
                f"prediction = {self.prediction}: says nothing of the data at time 1, where "
                f"{self.path} leaves only noise; V says it"
            )

    def _share_at_noise(self) -> float:
        return float(self.path.alpha(torch.ones((), dtype=torch.float64)))

    def inputs(
        self, x_t: Float[Tensor, "b c f h w"], t: Float[Tensor, " b"]
    ) -> Float[Tensor, "b c f h w"]:
        """What the network is to see of ``x_t``."""
        return x_t * self.prediction.input_scale(Shares.at(self.path, t, x_t))

    def target(
        self,
        x_0: Float[Tensor, "b c f h w"],
        noise: Float[Tensor, "b c f h w"],
        t: Float[Tensor, " b"],
    ) -> Float[Tensor, "b c f h w"]:
        return self.prediction.target(x_0, noise, Shares.at(self.path, t, x_0))

    def read(
        self,
        output: Float[Tensor, "b out f h w"],
        x_t: Float[Tensor, "b c f h w"],
        t: Float[Tensor, " b"],
    ) -> Estimate:
        """What an output says of the data and the noise in ``x_t``. ``ValueError`` for channels
        that are neither those of ``x_t`` nor twice as many.
        """
        c = x_t.shape[1]
        if output.shape[1] not in (c, 2 * c):
            raise ValueError(
                f"a prediction of {output.shape[1]} channels: must be {c}, as the latents, or "
                f"{2 * c} with a learned variance"
            )
        x_0, noise = self.prediction.estimate(output[:, :c], x_t, Shares.at(self.path, t, x_t))
        return Estimate(x_0, noise, output[:, c:] if output.shape[1] > c else None)

    def estimate(
        self,
        denoiser: DenoiserFunction,
        x_t: Float[Tensor, "b c f h w"],
        t: Float[Tensor, ""],
        condition: Condition,
    ) -> Estimate:
        """Ask the denoiser at one time for all clips."""
        times = t.expand(len(x_t)).to(x_t)
        exact = t.double().expand(len(x_t)).to(x_t.device)
        output = denoiser(self.inputs(x_t, exact), times, condition)
        return self.read(output, x_t, exact)
