"""What a network predicts at ``x_t``, and how its output converts to data and noise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sora_lightning.checks import require_positive
from sora_lightning.diffusion.paths import Path, RectifiedFlow, broadcast_time
from sora_lightning.types import Condition, DenoiserFunction


class Coefficients(NamedTuple):
    """alpha_t and sigma_t of a path and their derivatives, shaped to multiply a batch."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    @classmethod
    def at(
        cls, path: Path, t: Float[Tensor, " b *s"], like: Float[Tensor, "b ..."]
    ) -> Coefficients:
        values = path.alpha(t), path.sigma(t), path.d_alpha(t), path.d_sigma(t)
        return cls(*(broadcast_time(value, like).to(like) for value in values))


class Prediction(ABC):
    """Converts between a network's output and the data ``x_0`` and noise in ``x_t``.

    Predictions are affine in each other at one ``x_t``, so guidance has the same effect in each.
    """

    @abstractmethod
    def target(
        self, x_0: Float[Tensor, "b ..."], noise: Float[Tensor, "b ..."], c: Coefficients
    ) -> Float[Tensor, "b ..."]:
        """Return the output that the network is trained towards."""

    @abstractmethod
    def to_x0_and_noise(
        self, output: Float[Tensor, "b ..."], x_t: Float[Tensor, "b ..."], c: Coefficients
    ) -> tuple[Float[Tensor, "b ..."], Float[Tensor, "b ..."]]:
        """Return the data and the noise that an output implies at ``x_t``."""

    @abstractmethod
    def output_scale(self, c: Coefficients) -> Tensor:
        """Return the ratio of the output's error to the error of the data, at one ``x_t``."""

    def input_scale(self, c: Coefficients) -> Tensor | float:
        """Return the factor of ``x_t`` in the network's input (EDM's c_in)."""
        return 1.0


@dataclass(frozen=True)
class Epsilon(Prediction):
    """The noise (arXiv 2006.11239)."""

    def target(self, x_0: Tensor, noise: Tensor, c: Coefficients) -> Tensor:
        return noise

    def to_x0_and_noise(
        self, output: Tensor, x_t: Tensor, c: Coefficients
    ) -> tuple[Tensor, Tensor]:
        return (x_t - c.sigma * output) / c.alpha, output

    def output_scale(self, c: Coefficients) -> Tensor:
        return c.alpha / c.sigma


@dataclass(frozen=True)
class Data(Prediction):
    """The data, ``x_0``."""

    def target(self, x_0: Tensor, noise: Tensor, c: Coefficients) -> Tensor:
        return x_0

    def to_x0_and_noise(
        self, output: Tensor, x_t: Tensor, c: Coefficients
    ) -> tuple[Tensor, Tensor]:
        return output, (x_t - c.alpha * output) / c.sigma

    def output_scale(self, c: Coefficients) -> Tensor:
        return torch.ones_like(c.alpha)


@dataclass(frozen=True)
class V(Prediction):
    """``v = alpha noise - sigma x_0`` (arXiv 2202.00512, appendix D), defined at every time, pure
    noise included.
    """

    def target(self, x_0: Tensor, noise: Tensor, c: Coefficients) -> Tensor:
        return c.alpha * noise - c.sigma * x_0

    def to_x0_and_noise(
        self, output: Tensor, x_t: Tensor, c: Coefficients
    ) -> tuple[Tensor, Tensor]:
        alpha, sigma = c.alpha, c.sigma
        norm = alpha.square() + sigma.square()
        return (alpha * x_t - sigma * output) / norm, (sigma * x_t + alpha * output) / norm

    def output_scale(self, c: Coefficients) -> Tensor:
        return (c.alpha.square() + c.sigma.square()) / c.sigma


@dataclass(frozen=True)
class Velocity(Prediction):
    """``dx_t / dt = alpha' x_0 + sigma' noise`` (arXiv 2210.02747; SiT, arXiv 2401.08740)."""

    def target(self, x_0: Tensor, noise: Tensor, c: Coefficients) -> Tensor:
        return c.d_alpha * x_0 + c.d_sigma * noise

    def to_x0_and_noise(
        self, output: Tensor, x_t: Tensor, c: Coefficients
    ) -> tuple[Tensor, Tensor]:
        alpha, sigma, d_alpha, d_sigma = c
        determinant = alpha * d_sigma - sigma * d_alpha
        x_0 = (d_sigma * x_t - sigma * output) / determinant
        return x_0, (alpha * output - d_alpha * x_t) / determinant

    def output_scale(self, c: Coefficients) -> Tensor:
        alpha, sigma, d_alpha, d_sigma = c
        return (alpha * d_sigma - sigma * d_alpha).abs() / sigma


@dataclass(frozen=True)
class Preconditioned(Prediction):
    """EDM's preconditioning: the network's input and target have variance 1 where the data have
    standard deviation ``data_std`` (arXiv 2206.00364, section 5 and table 1; here for any alpha).
    """

    data_std: float = 1.0

    def __post_init__(self) -> None:
        require_positive(data_std=self.data_std)

    def target(self, x_0: Tensor, noise: Tensor, c: Coefficients) -> Tensor:
        alpha, sigma = c.alpha, c.sigma
        # (x_0 - c_skip x_t) / c_out with the common factor sigma taken out, which is 0 at data
        return (sigma * x_0 / self.data_std - alpha * self.data_std * noise) / self._norm(c)

    def to_x0_and_noise(
        self, output: Tensor, x_t: Tensor, c: Coefficients
    ) -> tuple[Tensor, Tensor]:
        alpha, sigma, norm = c.alpha, c.sigma, self._norm(c)
        c_skip = alpha * self.data_std**2 / norm.square()
        c_out = sigma * self.data_std / norm
        noise = sigma * x_t / norm.square() - alpha * self.data_std * output / norm
        return c_skip * x_t + c_out * output, noise

    def output_scale(self, c: Coefficients) -> Tensor:
        return self._norm(c) / (c.sigma * self.data_std)

    def input_scale(self, c: Coefficients) -> Tensor | float:
        return 1 / self._norm(c)

    def _norm(self, c: Coefficients) -> Tensor:
        return ((c.alpha * self.data_std).square() + c.sigma.square()).sqrt()


class Estimate(NamedTuple):
    """Data and noise that an output implies at ``x_t``.

    ``variance`` is the second half of the output's channels, where it has twice those of ``x_t``.
    """

    x_0: Float[Tensor, "b c f h w"]
    noise: Float[Tensor, "b c f h w"]
    variance: Float[Tensor, "b c f h w"] | None


@dataclass(frozen=True)
class Process:
    """A path of noise and what the network predicts on it."""

    path: Path = field(default_factory=RectifiedFlow)
    prediction: Prediction = field(default_factory=Velocity)

    def __post_init__(self) -> None:
        if isinstance(self.prediction, Epsilon) and self._alpha_at_noise() == 0:
            raise ValueError(
                f"prediction = {self.prediction}: says nothing of the data at time 1, where "
                f"{self.path} leaves only noise; take V"
            )

    def _alpha_at_noise(self) -> float:
        return float(self.path.alpha(torch.ones((), dtype=torch.float64, device="cpu")))

    def inputs(
        self, x_t: Float[Tensor, "b c f h w"], t: Float[Tensor, " b *s"]
    ) -> Float[Tensor, "b c f h w"]:
        """Return the network's input at ``x_t``."""
        return x_t * self.prediction.input_scale(Coefficients.at(self.path, t, x_t))

    def target(
        self,
        x_0: Float[Tensor, "b c f h w"],
        noise: Float[Tensor, "b c f h w"],
        t: Float[Tensor, " b"],
    ) -> Float[Tensor, "b c f h w"]:
        return self.prediction.target(x_0, noise, Coefficients.at(self.path, t, x_0))

    def to_x0_and_noise(
        self,
        output: Float[Tensor, "b out f h w"],
        x_t: Float[Tensor, "b c f h w"],
        t: Float[Tensor, " b *s"],
    ) -> Estimate:
        """Convert an output at ``x_t`` to an estimate of the data and the noise.

        Raises ``ValueError`` for a number of channels that is neither that of ``x_t`` nor twice it.
        """
        c = x_t.shape[1]
        if output.shape[1] not in (c, 2 * c):
            raise ValueError(
                f"a prediction of {output.shape[1]} channels: must be {c}, as the latents, or "
                f"{2 * c} with a learned variance"
            )
        x_0, noise = self.prediction.to_x0_and_noise(
            output[:, :c], x_t, Coefficients.at(self.path, t, x_t)
        )
        return Estimate(x_0, noise, output[:, c:] if output.shape[1] > c else None)

    def denoise(
        self,
        denoiser: DenoiserFunction,
        x_t: Float[Tensor, "b c f h w"],
        t: Float[Tensor, ""],
        condition: Condition,
    ) -> Estimate:
        """Call the denoiser at one time for all clips and convert its output."""
        times = t.expand(len(x_t)).to(x_t)
        exact = t.double().expand(len(x_t)).to(x_t.device)
        output = denoiser(self.inputs(x_t, exact), times, condition)
        return self.to_x0_and_noise(output, x_t, exact)
