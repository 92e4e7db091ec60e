"""Pretrained autoencoders of diffusers as tokenizers: of images, Wan, LTX-Video, CogVideoX,
HunyuanVideo and Allegro.

diffusers is imported only if a network is built. Compression, channels and the latents' published
statistics are read from its configuration.
"""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from sora_lightning.diffusers_folders import (
    Config,
    diffusers_class,
    part_of_pipeline,
    read_config,
    read_network,
)
from sora_lightning.tokenizers.base import CausalTokenizer, VideoTokenizer
from sora_lightning.tokenizers.framewise import FramewiseTokenizer
from sora_lightning.tokenizers.posterior import DiagonalGaussian
from sora_lightning.types import Compression


def pretrained_tokenizer(path: Path) -> VideoTokenizer:
    """Return the frozen autoencoder of a folder that diffusers' ``save_pretrained`` wrote, or of a
    whole pipeline's folder. On the meta device no weights are read.

    Raises ``ValueError`` for a folder without configuration or weights, and for any class but these
    six.
    """
    path = part_of_pipeline(Path(path), "vae")
    config = read_config(path, _KINDS, "a tokenizer", "an autoencoder", "vae")
    name = config["_class_name"]
    tokenizer = _KINDS[name](config)
    if not torch.empty(0).is_meta:
        tokenizer.vae.load_state_dict(read_network(path, name).state_dict())
        _normalise_as_published(tokenizer, tokenizer.vae)
    class_path = f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}"
    tokenizer.specification = {"class_path": class_path, "init_args": {"config": config}}
    return tokenizer.requires_grad_(False).eval()


class ImageTokenizer(FramewiseTokenizer):
    """``AutoencoderKL``, the autoencoder of Stable Diffusion and similar models, frame by frame."""

    def __init__(self, config: Config):
        vae = _new("AutoencoderKL", config)
        space = 2 ** (len(vae.config.block_out_channels) - 1)
        super().__init__(Compression(1, space, space), vae.config.latent_channels)
        self.vae = vae
        _normalise_as_published(self, vae)

    def image_moments(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n d h w"]:
        """See ``FramewiseTokenizer``."""
        return self.vae.encode(images).latent_dist.parameters

    def decode_images(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        """See ``FramewiseTokenizer``."""
        return self.vae.decode(latents).sample


class WanTokenizer(CausalTokenizer):
    """``AutoencoderKLWan`` of Wan 2.1 and 2.2, piece by piece: the state of its causal convolutions
    is passed as a value.
    """

    def __init__(self, config: Config):
        vae = _new("AutoencoderKLWan", config)
        halvings = len(vae.config.dim_mult) - 1
        space = (vae.config.patch_size or 1) * 2**halvings
        time = 2 ** sum(vae.config.temperal_downsample[:halvings])
        super().__init__(Compression(time, space, space), vae.config.z_dim)
        self.vae = vae
        _normalise_as_published(self, vae)

    def posterior_step(
        self, video: Float[Tensor, "b 3 F H W"], past: list[Any] | None
    ) -> tuple[DiagonalGaussian, list[Any]]:
        """See ``CausalTokenizer``. The network runs on one latent frame at a time."""
        p, step = self.vae.config.patch_size or 1, self.compression.frames
        x = rearrange(video, "b c f (h p) (w q) -> b (c q p) f h w", p=p, q=p)
        chunks = [x[:, :, :1], *_chunks(x[:, :, 1:], step)] if past is None else _chunks(x, step)
        cache = self._cache("encoder", past)
        moments = [self.vae.encoder(chunk, feat_cache=cache, feat_idx=[0]) for chunk in chunks]
        return DiagonalGaussian.from_moments(self.vae.quant_conv(torch.cat(moments, dim=2))), cache

    def decode_step(
        self, latents: Float[Tensor, "b c f h w"], past: list[Any] | None
    ) -> tuple[Float[Tensor, "b 3 F H W"], list[Any]]:
        """See ``CausalTokenizer``."""
        p, cache = self.vae.config.patch_size or 1, self._cache("decoder", past)
        chunks = zip(count(), _chunks(self.vae.post_quant_conv(latents), 1))
        pieces = [
            self.vae.decoder(
                chunk, feat_cache=cache, feat_idx=[0], first_chunk=past is None and number == 0
            )
            for number, chunk in chunks
        ]
        x = torch.cat(pieces, dim=2)
        return rearrange(x, "b (c q p) f h w -> b c f (h p) (w q)", p=p, q=p), cache

    def _cache(self, side: str, past: list[Any] | None) -> list[Any]:
        """Return a list that the network may write new tensors to."""
        if past is not None:
            return list(past)
        causal = type(self.vae.quant_conv)
        layers = self.vae.get_submodule(side).modules()
        return [None] * sum(isinstance(layer, causal) for layer in layers)


class CogVideoXTokenizer(VideoTokenizer):
    """``AutoencoderKLCogVideoX``. A clip has 1 + a multiple of twice the compression frames, since
    its decoder doubles time in pairs of latent frames after the first.

    It is not causal: its group norms take statistics over the eight frames that it encodes at a
    time. It does not run in other pieces, which would give other latents.
    """

    def __init__(self, config: Config):
        vae = _new("AutoencoderKLCogVideoX", config)
        space = 2 ** (len(vae.config.block_out_channels) - 1)
        compression = Compression(int(vae.config.temporal_compression_ratio), space, space)
        super().__init__(compression, vae.config.latent_channels)
        self.vae = vae
        _normalise_as_published(self, vae)

    def posterior(self, video: Float[Tensor, "b 3 F H W"]) -> DiagonalGaussian:
        """See ``VideoTokenizer``."""
        self._check(1 + (video.shape[2] - 1) // self.compression.frames)
        return DiagonalGaussian.from_moments(self.vae.encode(video).latent_dist.parameters)

    def decode_raw(self, latents: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b 3 F H W"]:
        """See ``VideoTokenizer``."""
        self._check(latents.shape[2])
        return self.vae.decode(latents).sample

    def _check(self, latent_frames: int) -> None:
        if latent_frames % 2 == 0:
            time = self.compression.frames
            raise ValueError(
                f"{1 + (latent_frames - 1) * time} frames: CogVideoX's autoencoder takes 1 + a "
                f"multiple of {2 * time}"
            )


class WholeClipTokenizer(VideoTokenizer):
    """An autoencoder that is not causal, and sees a whole clip."""

    network_class: ClassVar[str]

    def __init__(self, config: Config):
        vae = _new(self.network_class, config)
        space = vae.spatial_compression_ratio
        super().__init__(Compression(self._frames(vae), space, space), vae.config.latent_channels)
        self.vae = vae
        _normalise_as_published(self, vae)

    @staticmethod
    def _frames(vae: Any) -> int:
        """Return the number of frames of a latent frame."""
        return vae.temporal_compression_ratio

    def posterior(self, video: Float[Tensor, "b 3 F H W"]) -> DiagonalGaussian:
        """See ``VideoTokenizer``."""
        return DiagonalGaussian.from_moments(self.vae.encode(video).latent_dist.parameters)

    def decode_raw(self, latents: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b 3 F H W"]:
        """See ``VideoTokenizer``."""
        return self.vae.decode(latents).sample


class HunyuanVideoTokenizer(WholeClipTokenizer):
    """``AutoencoderKLHunyuanVideo``. Clips of more than 16 frames are encoded in overlapping pieces
    that are blended, as in diffusers.

    It is not causal, since group norms and blending let frames see later ones.
    """

    network_class = "AutoencoderKLHunyuanVideo"


class LTXTokenizer(WholeClipTokenizer):
    """``AutoencoderKLLTXVideo`` of LTX-Video (arXiv 2501.00103). Its decoder sees later frames.

    A decoder that takes a time, as of LTX-Video 0.9.1, gets 0: latents without noise.
    """

    network_class = "AutoencoderKLLTXVideo"

    def decode_raw(self, latents: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b 3 F H W"]:
        """See ``VideoTokenizer``."""
        time = latents.new_zeros(len(latents)) if self.vae.config.timestep_conditioning else None
        return self.vae.decode(latents, time).sample


class AllegroTokenizer(WholeClipTokenizer):
    """``AutoencoderKLAllegro`` of Allegro (arXiv 2410.15458), for whole clips.

    Its latent frames are all of four frames: the first frame of a clip is encoded four times.
    diffusers' class encodes in tiles alone, of 24 frames and 320 x 320 pixels; here ``tiling`` cuts
    larger clips. For one tile the two are equal.
    """

    network_class = "AutoencoderKLAllegro"

    @staticmethod
    def _frames(vae: Any) -> int:
        return int(vae.config.temporal_compression_ratio)

    def posterior(self, video: Float[Tensor, "b 3 F H W"]) -> DiagonalGaussian:
        """See ``VideoTokenizer``."""
        first = repeat(video[:, :, 0], "b c h w -> b c n h w", n=self.compression.frames - 1)
        moments = self.vae.encoder(torch.cat([first, video], dim=2))
        return DiagonalGaussian.from_moments(_by_frame(self.vae.quant_conv, moments))

    def decode_raw(self, latents: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b 3 F H W"]:
        """See ``VideoTokenizer``."""
        video = self.vae.decoder(_by_frame(self.vae.post_quant_conv, latents))
        return video[:, :, self.compression.frames - 1 :]


_KINDS: dict[str, Any] = {
    "AutoencoderKL": ImageTokenizer,
    "AutoencoderKLWan": WanTokenizer,
    "AutoencoderKLLTXVideo": LTXTokenizer,
    "AutoencoderKLCogVideoX": CogVideoXTokenizer,
    "AutoencoderKLHunyuanVideo": HunyuanVideoTokenizer,
    "AutoencoderKLAllegro": AllegroTokenizer,
}


def _new(name: str, config: Config) -> Any:
    """Return the network of this configuration, without its weights."""
    vae = diffusers_class(name).from_config(config)
    assert isinstance(vae, nn.Module)
    return vae


def _normalise_as_published(tokenizer: VideoTokenizer, vae: Any) -> None:
    """Set the latents' mean and standard deviation from ``latents_mean`` and ``latents_std``,
    ``shift_factor`` and ``scaling_factor``, whichever exist. LTX's are among its weights.

    diffusers' pipelines give the denoiser (z - mean) * scale / std.
    """
    config, weights = vae.config, dict(vae.named_buffers())
    mean = weights.get("latents_mean", config.get("latents_mean") or config.get("shift_factor"))
    std = weights.get("latents_std", config.get("latents_std") or 1.0)
    scale = config.get("scaling_factor") or 1.0
    tokenizer.latent_mean.copy_(_like(tokenizer, 0.0 if mean is None else mean))
    tokenizer.latent_std.copy_(_like(tokenizer, std) / scale)


def _like(tokenizer: VideoTokenizer, values: Any) -> Tensor:
    like = tokenizer.latent_mean
    return torch.as_tensor(values, dtype=like.dtype, device=like.device)


def _by_frame(layer: nn.Module, x: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b d f h w"]:
    frames = rearrange(x, "b c f h w -> (b f) c h w")
    return rearrange(layer(frames), "(b f) c h w -> b c f h w", b=len(x))


def _chunks(x: Float[Tensor, "b c f h w"], length: int) -> list[Tensor]:
    """Return pieces of so many frames; none for no frames."""
    return [chunk for chunk in x.split(length, dim=2) if chunk.shape[2]]
