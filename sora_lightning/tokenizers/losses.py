"""What a tokenizer is trained for: to give back its pixels through few, well-behaved latents."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sora_lightning.tokenizers.posterior import DiagonalGaussian


@dataclass(frozen=True)
class ReconstructionLoss:
    """Absolute and squared error per pixel value, and the posterior's KL divergence.

    The divergence, in nats a clip, is divided by the clip's number of pixel values, so that one
    ``kl`` weight serves all sizes.
    """

    l1: float = 1.0
    l2: float = 1.0
    kl: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("l1", "l2", "kl"):
            if getattr(self, name) < 0:
                raise ValueError(f"weight {name} = {getattr(self, name)} must not be negative")
        if self.l1 == self.l2 == 0:
            raise ValueError("l1 and l2 are both 0: nothing asks for a reconstruction")

    def __call__(
        self,
        reconstruction: Float[Tensor, "b 3 F H W"],
        video: Float[Tensor, "b 3 F H W"],
        posterior: DiagonalGaussian,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The weighted sum, and its unweighted terms by name."""
        error = reconstruction - video
        terms = {
            "l1": error.abs().mean(),
            "l2": error.square().mean(),
            "kl": posterior.kl().mean() / video[0].numel(),
        }
        total = self.l1 * terms["l1"] + self.l2 * terms["l2"] + self.kl * terms["kl"]
        return total, terms
