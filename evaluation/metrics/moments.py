"""Number, mean and scatter of a set of features in float64, which can be merged over shards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Number, mean and scatter (sum of outer products of centred rows) of a set, in float64."""

    n: int
    mean: Float[Tensor, " d"]
    scatter: Float[Tensor, "d d"]

    @classmethod
    def of(cls, features: Float[Tensor, "n d"]) -> Moments:
        """Moments of at least one row of features, which are converted to float64."""
        x = checked(features, least=1)
        mean = x.mean(dim=0)
        centred = x - mean
        return cls(len(x), mean, centred.T @ centred)

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets together, exact up to rounding (Chan, Golub and LeVeque, 1979)."""
        n = self.n + other.n
        delta = other.mean - self.mean
        scatter = self.scatter + other.scatter
        return Moments(
            n,
            self.mean + delta * (other.n / n),
            scatter + torch.outer(delta, delta) * (self.n * other.n / n),
        )

    def less(self, part: Moments) -> Moments:
        """Moments of the set without a part of it: the inverse of ``merge``, up to rounding."""
        n = self.n - part.n
        delta = (self.mean - part.mean) * (self.n / n)  # from the part's mean to the rest's
        between = torch.outer(delta, delta) * (n * part.n / self.n)
        return Moments(n, part.mean + delta, self.scatter - part.scatter - between)

    def factor(self, ddof: int = 1) -> Float[Tensor, "d d"]:
        """Return A with A Aᵀ equal to the covariance, where the scatter is divided by n - ``ddof``.

        Eigenvalues below the rounding error of the largest are set to zero.
        """
        if self.n < 2:
            raise ValueError(f"moments of {self.n} video: a covariance needs at least 2")
        values, vectors = torch.linalg.eigh(self.scatter / (self.n - ddof))
        noise = len(values) * torch.finfo(torch.float64).eps * values[-1].clamp(min=0)
        return vectors * torch.where(values > noise, values, 0).sqrt()


def checked(features: Float[Tensor, "n d"], least: int) -> Float[Tensor, "n d"]:
    """Convert features to float64.

    Raises ``ValueError`` for fewer rows than ``least``, and for values that are not finite.
    """
    if features.ndim != 2 or len(features) < least:
        raise ValueError(
            f"features of shape {tuple(features.shape)}: must be (videos >= {least}, features)"
        )
    x = features.detach().double()
    if not x.isfinite().all():
        bad = (~x.isfinite()).any(dim=1).nonzero().flatten().tolist()
        raise ValueError(
            f"features of video {bad[0]} are not finite ({len(bad)} of {len(x)} videos)"
        )
    return x
