"""What a system asks of a denoiser network."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn

from sora_lightning.layers.patch import Patch
from sora_lightning.types import Condition


class Denoiser(nn.Module, ABC):
    """A network that is a ``DenoiserFunction`` over latents cut into patches of ``patch``."""

    def __init__(self, patch: Patch):
        super().__init__()
        self.patch = patch

    @abstractmethod
    def forward(
        self,
        x_t: Float[Tensor, "b c f h w"],
        t: Float[Tensor, " b"],
        condition: Condition,
    ) -> Float[Tensor, "b c f h w"]:
        """The prediction at noisy latents ``x_t`` and time ``t`` (0 = data, 1 = noise)."""
