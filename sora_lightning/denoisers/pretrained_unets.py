"""Video U-Nets of diffusers: ModelScope's from text to video, and I2VGen-XL from image to video.

A U-Net has no tokens. Its patch is one latent position, by which token counts and masks of known
frames are in latent positions.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sora_lightning.denoisers.pretrained_base import PretrainedDenoiser, exactly, step_from_0
from sora_lightning.layers.patch import Patch
from sora_lightning.types import Condition


class VideoUNet(PretrainedDenoiser):
    """A public U-Net.

    It attends to all of its text tokens, those of padding included: the conditioner should encode
    CLIP's whole context, as ``PretrainedText`` with ``padded``; missing ones are zeros.
    """

    num_text_tokens: ClassVar[int] = 77

    @staticmethod
    def patch_of(config: Any) -> Patch:
        return Patch()

    @property
    def text_width(self) -> int:
        return self.network.config.cross_attention_dim


class UNet3DDenoiser(VideoUNet):
    """``UNet3DConditionModel`` of ModelScope (arXiv 2308.06571), from text to video."""

    network_class = "UNet3DConditionModel"
    pipeline_class = "TextToVideoSDPipeline"

    def predict(
        self, x_t: Float[Tensor, "b c f h w"], t: Float[Tensor, " b"], condition: Condition
    ) -> Float[Tensor, "b c f h w"]:
        """See ``PretrainedDenoiser``."""
        text = exactly(self.num_text_tokens, condition.tokens)
        return self.network(x_t, step_from_0(t), text, return_dict=False)[0]


class I2VGenXLDenoiser(VideoUNet):
    """``I2VGenXLUNet`` of I2VGen-XL (arXiv 2311.04145), from image and text to video.

    ``concat_latents`` are those of ``FirstFrameAndPosition``. A token after the text's 77 is the
    image's embedding, that of ``ClipEmbedding``; without it the embedding is 0, as in the
    unconditional half of the pipeline's guidance.
    """

    network_class = "I2VGenXLUNet"
    pipeline_class = "I2VGenXLPipeline"
    takes_frames = True

    def predict(
        self, x_t: Float[Tensor, "b c f h w"], t: Float[Tensor, " b"], condition: Condition
    ) -> Float[Tensor, "b c f h w"]:
        """See ``PretrainedDenoiser``. Raises ``ValueError`` for several tokens of the image."""
        if condition.tokens.shape[1] > self.num_text_tokens + 1:
            raise ValueError(
                f"I2VGenXLUNet takes {self.num_text_tokens} tokens of text and one of the image: "
                "image_encoder must be ClipEmbedding"
            )
        tokens = exactly(self.num_text_tokens + 1, condition.tokens)
        frames = condition.concat_latents
        return self.network(
            x_t,
            step_from_0(t),
            x_t.new_full((len(x_t),), self.fps),
            torch.zeros_like(x_t) if frames is None else frames[:, : self.latent_channels],
            tokens[:, self.num_text_tokens :],
            tokens[:, : self.num_text_tokens],
            return_dict=False,
        )[0]
