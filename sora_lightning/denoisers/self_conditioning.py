"""Self-conditioning: a network sees its own earlier estimate of the data (arXiv 2208.04202, and
W.A.L.T, arXiv 2312.06662).
"""

from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from sora_lightning.types import Condition, DenoiserFunction

# The data that a prediction at x_t and t points back to, say ``diffusion.data_from_velocity``.
ToData = Callable[[Tensor, Tensor, Tensor], Tensor]


class SelfConditioned:
    """For sampling: a ``DenoiserFunction`` that hands a network the estimate of its last call.

    It serves one sampling run; guidance goes around it, so that both of its predictions keep an
    estimate each. ``denoiser`` is a ``DiT`` with ``self_conditioning``.
    """

    def __init__(self, denoiser: Callable[..., Tensor], to_data: ToData):
        self.denoiser = denoiser
        self.to_data = to_data
        self.estimate: Tensor | None = None

    def __call__(
        self, x_t: Float[Tensor, "b c f h w"], t: Float[Tensor, " b"], condition: Condition
    ) -> Float[Tensor, "b c f h w"]:
        prediction = self.denoiser(x_t, t, condition, self.estimate)
        self.estimate = self.to_data(x_t, prediction, t).detach()
        return prediction


def with_own_estimate(
    denoiser: Callable[..., Tensor], to_data: ToData, chosen: Bool[Tensor, " b"]
) -> DenoiserFunction:
    """For training: the ``chosen`` clips see the estimate of a first call, through which no
    gradient runs; the others see zeros.
    """

    def predict(
        x_t: Float[Tensor, "b c f h w"], t: Float[Tensor, " b"], condition: Condition
    ) -> Float[Tensor, "b c f h w"]:
        with torch.no_grad():
            estimate = to_data(x_t, denoiser(x_t, t, condition), t)
        seen = rearrange(chosen, "b -> b 1 1 1 1")
        return denoiser(x_t, t, condition, torch.where(seen, estimate, 0))

    return predict
