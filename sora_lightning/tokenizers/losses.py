"""The losses of a tokenizer: reconstruction errors, KL divergence, and LPIPS."""

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from sora_lightning.checks import require_at_least, require_positive
from sora_lightning.tokenizers.perceptual import PerceptualDistance
from sora_lightning.tokenizers.posterior import DiagonalGaussian

log = logging.getLogger(__name__)


class PixelError(ABC):
    """The mean error over pixel values."""

    @abstractmethod
    def __call__(self, error: Float[Tensor, "b 3 F H W"]) -> Float[Tensor, ""]: ...


class L1(PixelError):
    """The absolute error, whose optimum is the median."""

    def __call__(self, error: Float[Tensor, "b 3 F H W"]) -> Float[Tensor, ""]:
        return error.abs().mean()


class L2(PixelError):
    """The squared error, whose logarithm is the PSNR."""

    def __call__(self, error: Float[Tensor, "b 3 F H W"]) -> Float[Tensor, ""]:
        return error.square().mean()


@dataclass(frozen=True)
class Charbonnier(PixelError):
    """``sqrt(e^2 + epsilon^2) - epsilon``: squared below ``epsilon``, absolute above (Charbonnier
    et al., 1994).
    """

    epsilon: float = 1e-2

    def __post_init__(self) -> None:
        require_positive(epsilon=self.epsilon)

    def __call__(self, error: Float[Tensor, "b 3 F H W"]) -> Float[Tensor, ""]:
        return (error.square() + self.epsilon**2).sqrt().mean() - self.epsilon


@dataclass(frozen=True)
class L1AndL2(PixelError):
    """A weighted sum of both."""

    l1: float = 1.0
    l2: float = 1.0

    def __post_init__(self) -> None:
        require_at_least(0, l1=self.l1, l2=self.l2)
        if self.l1 == self.l2 == 0:
            raise ValueError("l1 and l2 are both 0: nothing asks for a reconstruction")

    def __call__(self, error: Float[Tensor, "b 3 F H W"]) -> Float[Tensor, ""]:
        return self.l1 * error.abs().mean() + self.l2 * error.square().mean()


@dataclass(frozen=True)
class WithEdges(PixelError):
    """Another error plus a weighted squared error of the differences between neighbouring pixels (a
    Sobolev norm).

    Sharp corners count little in an error of pixels only. ``time`` is the weight of the differences
    between consecutive frames: flicker is more visible than an error that stays.
    """

    pixel: PixelError = field(default_factory=L1AndL2)
    weight: float = 1.0
    time: float = 0.0

    def __post_init__(self) -> None:
        require_at_least(0, where="edges: ", weight=self.weight, time=self.time)

    def __call__(self, error: Float[Tensor, "b 3 F H W"]) -> Float[Tensor, ""]:
        edges = error.diff(dim=-1).square().mean() + error.diff(dim=-2).square().mean()
        cost = self.pixel(error) + self.weight * edges
        if self.time and error.shape[2] > 1:
            cost = cost + self.time * error.diff(dim=2).square().mean()
        return cost


class Perceptual:
    """LPIPS with a weight. It is a callable, not a module: the network is neither trained, averaged
    nor saved.

    Without a file of VGG-16's weights the weight is 0 and a warning is logged, so a training does
    not need the file.
    """

    def __init__(self, weights: Path | None = None, weight: float = 1.0):
        require_at_least(0, weight=weight)
        self.weight = weight
        self._network: PerceptualDistance | None = None
        if weight and weights is not None and Path(weights).is_file():
            self._network = PerceptualDistance(weights)
        elif weight:
            why = "no file is named" if weights is None else f"there is no file {weights}"
            log.warning("LPIPS has weight 0: its `weights` are those of VGG-16, and %s", why)
            self.weight = 0.0

    def __call__(
        self, reconstruction: Float[Tensor, "b 3 F H W"], video: Float[Tensor, "b 3 F H W"]
    ) -> Float[Tensor, ""]:
        """Return the mean over the clips, or 0 without a network."""
        if self._network is None:
            return torch.zeros((), device=video.device)
        return self._network.to(video.device)(reconstruction, video).mean()


@dataclass(frozen=True)
class ReconstructionLoss:
    """The error of the pixels, the posterior's KL divergence and, optionally, LPIPS.

    The divergence, in nats for each clip, is divided by the number of the clip's pixel values, so
    one ``kl`` weight serves all sizes.
    """

    pixel: PixelError = field(default_factory=L1AndL2)
    kl: float = 1e-3
    perceptual: Perceptual | None = None

    def __post_init__(self) -> None:
        require_at_least(0, kl=self.kl)

    def __call__(
        self,
        reconstruction: Float[Tensor, "b 3 F H W"],
        video: Float[Tensor, "b 3 F H W"],
        posterior: DiagonalGaussian,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Return the weighted sum, and its unweighted terms by name."""
        terms = {
            "pixel": self.pixel(reconstruction - video),
            "kl": posterior.kl().mean() / video[0].numel(),
        }
        total = terms["pixel"] + self.kl * terms["kl"]
        if self.perceptual is not None:
            terms["lpips"] = self.perceptual(reconstruction, video)
            terms["lpips_weight"] = torch.tensor(self.perceptual.weight, device=video.device)
            total = total + self.perceptual.weight * terms["lpips"]
        return total, terms
