"""Gaussian data: the best denoiser, the flow and the losses have closed forms on every path."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sora_lightning.diffusion import Process
from sora_lightning.diffusion.paths import broadcast_time
from sora_lightning.types import Condition


def condition(b: int, value: float = 0.0) -> Condition:
    return Condition(
        torch.zeros(b, 1, 2), torch.ones(b, 1, dtype=torch.bool), torch.full((b, 2), value)
    )


@dataclass(frozen=True)
class Gaussian:
    """Every value of the data is N(mean, std^2)."""

    mean: float = 0.4
    std: float = 0.5

    def denoiser(self, process: Process):
        """Return the optimal denoiser of ``process``."""

        def best(x_in: Tensor, t: Tensor, _: Condition) -> Tensor:
            x_t = x_in / process.inputs(torch.ones_like(x_in), t)
            alpha, sigma = (
                broadcast_time(share(t), x_t) for share in (process.path.alpha, process.path.sigma)
            )
            surprise = (x_t - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)
            x_0 = self.mean + alpha * self.std**2 * surprise
            return process.target(x_0, sigma * surprise, t)

        return best

    def at(self, process: Process, t: float, quantile: Tensor) -> Tensor:
        """``x_t`` at so many standard deviations from its mean, which the flow keeps."""
        time = torch.tensor(t, dtype=torch.float64)
        alpha, sigma = process.path.alpha(time), process.path.sigma(time)
        return alpha * self.mean + (alpha**2 * self.std**2 + sigma**2).sqrt() * quantile

    def data_variance(self, process: Process, t: Tensor) -> Tensor:
        """Variance of the data given ``x_t``."""
        alpha, sigma = process.path.alpha(t), process.path.sigma(t)
        return self.std**2 * sigma**2 / (alpha**2 * self.std**2 + sigma**2)
