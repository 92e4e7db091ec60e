"""Video transformers of diffusers: Wan, LTX-Video, CogVideoX, HunyuanVideo and Latte.

Each class says how time, text and patches of ours map to the network's.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, ClassVar

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from sora_lightning.denoisers.pretrained_base import (
    NUM_STEPS,
    PretrainedDenoiser,
    exactly,
    step_from_0,
)
from sora_lightning.diffusers_folders import Config
from sora_lightning.layers.patch import Patch
from sora_lightning.types import Condition


class WanDenoiser(PretrainedDenoiser):
    """``WanTransformer3DModel`` of Wan 2.1 and 2.2 (arXiv 2503.20314), from text or image to video.

    It attends to 512 text tokens, of which those after a caption's end are zeros. Wan 2.2 5B, whose
    tokens have times of their own, takes a known first frame at time zero as well.

    From image to video its input has the latents, four channels of the mask, and
    ``concat_latents``, those of ``FirstFrameThenGrey``. The last 257 tokens of such a condition are
    the image's, of ``ClipPatches``. Without an image all of these are 0.
    """

    network_class = "WanTransformer3DModel"
    pipeline_class = "WanPipeline"
    times_of_tokens = True
    num_text_tokens: ClassVar[int] = 512
    num_image_tokens: ClassVar[int] = 257  # of CLIP's ViT-H/14 at 224 x 224
    mask_channels: ClassVar[int] = 4  # one for each frame of a latent frame

    def __init__(self, config: Config, activation_checkpointing: bool, fps: float):
        super().__init__(config, activation_checkpointing, fps)
        self.takes_frames = self.concat_channels_of(self.network.config) > 0
        if self.network.config.pos_embed_seq_len is not None:
            raise ValueError("pos_embed_seq_len is set: Wan's first and last frames are not read")

    @staticmethod
    def patch_of(config: Any) -> Patch:
        return Patch.of(config.patch_size)

    @staticmethod
    def concat_channels_of(config: Any) -> int:
        beside = WanDenoiser.mask_channels + config.out_channels
        return beside if config.in_channels == config.out_channels + beside else 0

    @property
    def text_width(self) -> int:
        return self.network.config.text_dim

    def predict(
        self, x_t: Float[Tensor, "b c f h w"], t: Float[Tensor, " b *n"], condition: Condition
    ) -> Float[Tensor, "b c f h w"]:
        """See ``PretrainedDenoiser``. Raises ``ValueError`` for frames without image tokens."""
        tokens, image = condition.tokens * condition.mask[..., None], None
        if self.takes_frames:
            x_t = torch.cat([x_t, self._beside(x_t, condition.concat_latents)], dim=1)
            tokens, image = self._split(tokens, condition.concat_latents is not None)
        text = exactly(self.num_text_tokens, tokens)
        return self.network(x_t, t * NUM_STEPS, text, image, return_dict=False)[0]

    def _beside(
        self, x_t: Float[Tensor, "b c f h w"], frames: Float[Tensor, "b c_and_1 f h w"] | None
    ) -> Float[Tensor, "b d f h w"]:
        """Return the mask, once for each frame of a latent frame, and the latents."""
        if frames is None:
            return x_t.new_zeros(len(x_t), self.mask_channels + x_t.shape[1], *x_t.shape[2:])
        mask = repeat(frames[:, -1:], "b 1 f h w -> b m f h w", m=self.mask_channels)
        return torch.cat([mask, frames[:, :-1]], dim=1)

    def _split(self, tokens: Float[Tensor, "b l d"], with_image: bool) -> tuple[Tensor, Any]:
        """Return the tokens of the text, and those of the image in its encoder's width."""
        width = self.network.config.image_dim
        if width is None:
            return tokens, None
        num = self.num_image_tokens
        if not with_image:
            return tokens, tokens.new_zeros(len(tokens), num, width)
        if tokens.shape[1] <= num:
            raise ValueError(
                f"this WanTransformer3DModel takes {num} tokens of the image beside the text's: "
                "image_encoder must be ClipPatches"
            )
        return tokens[:, :-num], tokens[:, -num:, :width]


class LTXDenoiser(PretrainedDenoiser):
    """``LTXVideoTransformer3DModel`` of LTX-Video (arXiv 2501.00103), from text to video.

    Its positions are in seconds and pixels: ``compression`` is that of its autoencoder in frames,
    rows and columns.
    """

    network_class = "LTXVideoTransformer3DModel"
    pipeline_class = "LTXPipeline"
    times_of_tokens = True

    compression: ClassVar[tuple[int, int, int]] = (8, 32, 32)

    @staticmethod
    def patch_of(config: Any) -> Patch:
        return Patch(config.patch_size_t, config.patch_size, config.patch_size)

    @property
    def text_width(self) -> int:
        return self.network.config.caption_channels

    def predict(
        self, x_t: Float[Tensor, "b c f h w"], t: Float[Tensor, " b *n"], condition: Condition
    ) -> Float[Tensor, "b c f h w"]:
        """See ``PretrainedDenoiser``."""
        grid = self.patch.grid(*x_t.shape[2:])
        parts = {"p": self.patch.f, "q": self.patch.h, "r": self.patch.w}
        x = rearrange(x_t, "b c (f p) (h q) (w r) -> b (f h w) (c p q r)", **parts)
        frames, *pixels = self.compression
        output = self.network(
            x,
            condition.tokens,
            t * NUM_STEPS,
            condition.mask.to(x),
            num_frames=grid.f,
            height=grid.h,
            width=grid.w,
            rope_interpolation_scale=(frames / self.fps, *pixels),
            return_dict=False,
        )[0]
        pattern = "b (f h w) (c p q r) -> b c (f p) (h q) (w r)"
        return rearrange(output, pattern, f=grid.f, h=grid.h, w=grid.w, **parts)


class CogVideoXDenoiser(PretrainedDenoiser):
    """``CogVideoXTransformer3DModel`` of CogVideoX 2B and 5B (arXiv 2408.06072), text to video.

    It attends to all of its text tokens, those of padding included: the conditioner should encode
    these, as ``PretrainedText`` with ``padded``; missing ones are zeros.
    """

    network_class = "CogVideoXTransformer3DModel"
    pipeline_class = "CogVideoXPipeline"

    @staticmethod
    def patch_of(config: Any) -> Patch:
        if config.patch_size_t is not None:
            raise ValueError("CogVideoX 1.5 is not supported: its tokens hold several frames")
        return Patch(1, config.patch_size, config.patch_size)

    @property
    def text_width(self) -> int:
        return self.network.config.text_embed_dim

    def predict(
        self, x_t: Float[Tensor, "b c f h w"], t: Float[Tensor, " b"], condition: Condition
    ) -> Float[Tensor, "b c f h w"]:
        """See ``PretrainedDenoiser``."""
        output = self.network(
            rearrange(x_t, "b c f h w -> b f c h w"),
            exactly(self.network.config.max_text_seq_length, condition.tokens),
            step_from_0(t),
            image_rotary_emb=self._rotary(x_t),
            return_dict=False,
        )[0]
        return rearrange(output, "b f c h w -> b c f h w")

    def _rotary(self, x_t: Float[Tensor, "b c f h w"]) -> tuple[Tensor, Tensor] | None:
        config = self.network.config
        if not config.use_rotary_positional_embeddings:
            return None
        embeddings = import_module("diffusers.models.embeddings")
        pipeline = import_module("diffusers.pipelines.cogvideo.pipeline_cogvideox")
        grid, p = self.patch.grid(*x_t.shape[2:]), config.patch_size
        crop = pipeline.get_resize_crop_region_for_grid(
            (grid.h, grid.w), config.sample_width // p, config.sample_height // p
        )
        return embeddings.get_3d_rotary_pos_embed(
            config.attention_head_dim, crop, (grid.h, grid.w), grid.f, device=x_t.device
        )


class HunyuanVideoDenoiser(PretrainedDenoiser):
    """``HunyuanVideoTransformer3DModel`` of HunyuanVideo (arXiv 2412.03603), from text to video.

    The condition's tokens are those of its language model, the pooled vector is CLIP's. The public
    weights are distilled from guidance and take its scale as an input, ``embedded_guidance``, which
    is the pipeline's default.
    """

    network_class = "HunyuanVideoTransformer3DModel"
    pipeline_class = "HunyuanVideoPipeline"

    embedded_guidance: ClassVar[float] = 6.0

    @staticmethod
    def patch_of(config: Any) -> Patch:
        if (kind := config.image_condition_type) is not None:
            raise ValueError(
                f"image_condition_type = {kind}: of HunyuanVideo only text to video is supported"
            )
        return Patch(config.patch_size_t, config.patch_size, config.patch_size)

    @property
    def text_width(self) -> int:
        return self.network.config.text_embed_dim

    def predict(
        self, x_t: Float[Tensor, "b c f h w"], t: Float[Tensor, " b"], condition: Condition
    ) -> Float[Tensor, "b c f h w"]:
        """See ``PretrainedDenoiser``."""
        scale = x_t.new_full((len(x_t),), self.embedded_guidance) * NUM_STEPS
        return self.network(
            x_t,
            t * NUM_STEPS,
            condition.tokens,
            condition.mask.to(x_t),
            condition.pooled,
            guidance=scale if self.network.config.guidance_embeds else None,
            return_dict=False,
        )[0]


class LatteDenoiser(PretrainedDenoiser):
    """``LatteTransformer3DModel`` of Latte (arXiv 2401.03048), from text to video.

    It attends to a caption's tokens alone, as its pipeline does for one prompt, and takes clips of
    its ``video_length``, or images. Its variances are not used.
    """

    network_class = "LatteTransformer3DModel"
    pipeline_class = "LattePipeline"
    learned_variance = True

    @staticmethod
    def patch_of(config: Any) -> Patch:
        return Patch(1, config.patch_size, config.patch_size)

    @property
    def text_width(self) -> int:
        return self.network.config.caption_channels

    def predict(
        self, x_t: Float[Tensor, "b c f h w"], t: Float[Tensor, " b"], condition: Condition
    ) -> Float[Tensor, "b c f h w"]:
        """See ``PretrainedDenoiser``. Raises ``ValueError`` for another number of frames."""
        f, length = x_t.shape[2], self.network.config.video_length
        if f not in (1, length):
            raise ValueError(f"{f} latent frames: this Latte takes {length}, or 1 for an image")
        bias = (~condition.mask).to(x_t.dtype) * -10000.0  # of scores, as diffusers masks them
        output = self.network(
            x_t,
            step_from_0(t),
            condition.tokens,
            repeat(bias, "b l -> (b f) 1 l", f=f),
            return_dict=False,
        )[0]
        return output[:, : self.latent_channels]
