"""Guidance wraps a denoiser and returns a denoiser: models and samplers know nothing of it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sora_lightning.types import Condition, DenoiserFunction


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """``u + scale (c - u)`` (arXiv 2207.12598, equation 6, with its w + 1 as ``scale``): 1 is no
    guidance.

    Both predictions come from one call on a doubled batch. ``null`` is the condition of no caption,
    for as many clips as the batch holds.
    """

    denoiser: DenoiserFunction
    null: Condition
    scale: float

    def __call__(
        self, x_t: Float[Tensor, "b c f h w"], t: Float[Tensor, " b"], condition: Condition
    ) -> Float[Tensor, "b c f h w"]:
        if self.scale == 1:
            return self.denoiser(x_t, t, condition)
        both = self.denoiser(
            torch.cat([x_t, x_t]), torch.cat([t, t]), Condition.cat(condition, self.null)
        )
        conditional, unconditional = both.chunk(2)
        return unconditional + self.scale * (conditional - unconditional)
