"""The Gaussian that a variational encoder predicts (Kingma and Welling, arXiv 1312.6114)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass
class DiagonalGaussian:
    """Independent normal distributions, one for each latent value."""

    mean: Float[Tensor, "b c f h w"]
    log_variance: Float[Tensor, "b c f h w"]

    @classmethod
    def from_moments(cls, moments: Float[Tensor, "b d f h w"]) -> "DiagonalGaussian":
        """Split channels into mean and log-variance, clamped to [-30, 20] (latent diffusion)."""
        mean, log_variance = moments.chunk(2, dim=1)
        return cls(mean, log_variance.clamp(-30, 20))

    def sample(self, noise: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b c f h w"]:
        """Return the sample for standard normal ``noise``."""
        return self.mean + torch.exp(0.5 * self.log_variance) * noise

    def kl(self) -> Float[Tensor, " b"]:
        """Return the KL divergence from the standard normal, in nats, summed over each clip's
        latents.
        """
        per_value = 0.5 * (self.mean**2 + self.log_variance.exp() - 1 - self.log_variance)
        return per_value.flatten(1).sum(1)
