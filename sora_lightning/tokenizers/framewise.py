"""Video by an autoencoder of images, frame by frame."""

from abc import abstractmethod
from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from sora_lightning.tokenizers.base import CausalTokenizer
from sora_lightning.tokenizers.posterior import DiagonalGaussian


class FramewiseTokenizer(CausalTokenizer):
    """Encodes every frame by itself, without temporal compression."""

    @abstractmethod
    def image_moments(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n d h w"]:
        """Return means, then log-variances, of the posterior of images."""

    @abstractmethod
    def decode_images(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        """Return the pixels of images from unnormalised latents, not clamped."""

    def posterior_step(
        self, video: Float[Tensor, "b 3 F H W"], past: list[Any] | None
    ) -> tuple[DiagonalGaussian, list[Any]]:
        """See ``CausalTokenizer``; there is no state."""
        moments = self.image_moments(rearrange(video, "b c f h w -> (b f) c h w"))
        moments = rearrange(moments, "(b f) d h w -> b d f h w", b=len(video))
        return DiagonalGaussian.from_moments(moments), []

    def decode_step(
        self, latents: Float[Tensor, "b c f h w"], past: list[Any] | None
    ) -> tuple[Float[Tensor, "b 3 F H W"], list[Any]]:
        """See ``CausalTokenizer``; there is no state."""
        images = self.decode_images(rearrange(latents, "b c f h w -> (b f) c h w"))
        return rearrange(images, "(b f) c h w -> b c f h w", b=len(latents)), []
