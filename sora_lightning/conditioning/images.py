"""Encoders of the first frame into tokens that are attended to beside those of the text (I2VGen-XL,
arXiv 2311.04145, section 3.1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from sora_lightning.checks import require_at_least
from sora_lightning.configuration import KeepsArguments
from sora_lightning.diffusers_folders import part_of_pipeline
from sora_lightning.transformers_folders import model_type, read_network, transformers_class
from sora_lightning.types import ImageTokens, as_levels

Decode = Callable[[Tensor], Tensor]
"""Decodes normalised latents to pixels in [-1, 1], as a tokenizer does."""

# Radford et al., 2021 (arXiv 2103.00020): mean and standard deviation of CLIP's
# training images.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ImageEncoder(KeepsArguments, nn.Module, ABC):
    """Turns a clip's first latent frame into tokens of the conditioner's width.

    Its inputs are latents in training and in sampling alike, since a cache serves no pixels.
    ``decode`` returns their pixels. The first latent frame of a causal tokenizer holds the first
    frame alone.

    ``specification`` is the ``class_path`` and ``init_args`` of an encoder that was loaded from
    files; a system keeps it in its own checkpoint, beside the weights.
    """

    specification: dict[str, Any] | None = None

    @abstractmethod
    def forward(
        self, latents: Float[Tensor, "b c 1 h w"], decode: Decode
    ) -> Float[Tensor, "b m d"]:
        """Return tokens, as many for latents of any size."""

    def known(
        self, latents: Float[Tensor, "b c f h w"], mask: Bool[Tensor, "b 1 f h w"], decode: Decode
    ) -> ImageTokens:
        """Return the tokens of each clip whose whole first frame is known, and none of others."""
        has_image = mask[:, :, :1].flatten(1).all(1)
        tokens = self(latents[:, :, :1], decode)
        tokens = torch.where(rearrange(has_image, "b -> b 1 1"), tokens, 0)
        return ImageTokens(tokens, repeat(has_image, "b -> b m", m=tokens.shape[1]))


class GlobalEncoder(ImageEncoder):
    """Two convolutions over the latents, averaged to ``side`` x ``side`` positions of a token each.

    It trains with the denoiser and needs no weights.
    """

    def __init__(self, latent_channels: int, width: int, hidden: int = 64, side: int = 4):
        super().__init__()
        require_at_least(1, side=side)
        self.features = nn.Sequential(
            nn.Conv2d(latent_channels, hidden, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(side),
        )
        self.out = nn.Linear(hidden, width)
        # Attention does not see an order: each position has a vector of its own.
        self.positions = nn.Parameter(0.02 * torch.randn(side**2, width))

    def forward(
        self, latents: Float[Tensor, "b c 1 h w"], decode: Decode
    ) -> Float[Tensor, "b m d"]:
        """See ``ImageEncoder``."""
        features = self.features(latents[:, :, 0])
        return self.out(rearrange(features, "b d h w -> b (h w) d")) + self.positions


class ClipEmbedding(ImageEncoder):
    """Encodes an image as one token, the embedding of a frozen CLIP, for the public I2VGen-XL,
    which has a projection of its own.

    ``folder`` is that of a CLIP as transformers writes it, or of a pipeline with an
    ``image_encoder``; ``config`` is the configuration of its vision tower in place of a folder: the
    weights are then random, or those of the checkpoint that holds them. Raises ``ValueError`` where
    neither or both are given, the folder holds no CLIP, or its embedding is not of ``width``.
    """

    def __init__(
        self,
        latent_channels: int,
        width: int,
        folder: Path | None = None,
        config: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.tower = _frozen_tower(folder, config)
        if (dim := self.tower.config.projection_dim) != width:
            raise ValueError(f"the image's embedding has width {dim}, and the text's {width}")
        if folder is not None:
            self.specification = _specification(self)

    def forward(
        self, latents: Float[Tensor, "b c 1 h w"], decode: Decode
    ) -> Float[Tensor, "b 1 d"]:
        """See ``ImageEncoder``."""
        return rearrange(_embedding(self.tower, latents, decode), "b d -> b 1 d")


class ClipPatches(ImageEncoder):
    """Encodes an image as the hidden states before the last layer of a frozen CLIP, one for the
    image and one for each patch, padded with zeros to ``width``. Wan's image-to-video models attend
    to them.

    ``folder`` and ``config`` are those of ``ClipEmbedding``. Raises ``ValueError`` as it does, and
    for states wider than ``width``.
    """

    def __init__(
        self,
        latent_channels: int,
        width: int,
        folder: Path | None = None,
        config: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.tower, self.width = _frozen_tower(folder, config, "CLIPVisionModel"), width
        if (own := self.tower.config.hidden_size) > width:
            raise ValueError(f"the image's tokens have width {own}, and the text's {width}")
        if folder is not None:
            self.specification = _specification(self)

    @torch.no_grad()
    def forward(
        self, latents: Float[Tensor, "b c 1 h w"], decode: Decode
    ) -> Float[Tensor, "b m d"]:
        """See ``ImageEncoder``."""
        images = clip_pixels(decode(latents)[:, :, 0], self.tower.config.image_size)
        output = self.tower.eval()(pixel_values=images, output_hidden_states=True)
        states = output.hidden_states[-2]
        return F.pad(states, (0, self.width - states.shape[2]))


class ClipEncoder(ImageEncoder):
    """I2VGen-XL's two encoders, to train with the denoiser: a frozen CLIP, whose embedding a
    perceptron turns into ``num_tokens`` tokens, and a ``GlobalEncoder``.

    ``folder`` and ``config`` are those of ``ClipEmbedding``, and so are the errors.
    """

    def __init__(
        self,
        latent_channels: int,
        width: int,
        folder: Path | None = None,
        config: dict[str, Any] | None = None,
        num_tokens: int = 4,
        side: int = 4,
    ):
        super().__init__()
        self.num_tokens = num_tokens
        self.tower = _frozen_tower(folder, config)
        if folder is not None:
            self.specification = _specification(self, num_tokens=num_tokens, side=side)
        embedding = self.tower.config.projection_dim
        self.project = nn.Sequential(
            nn.Linear(embedding, width), nn.SiLU(), nn.Linear(width, num_tokens * width)
        )
        self.whole = GlobalEncoder(latent_channels, width, side=side)

    def forward(
        self, latents: Float[Tensor, "b c 1 h w"], decode: Decode
    ) -> Float[Tensor, "b m d"]:
        """See ``ImageEncoder``."""
        embedding = _embedding(self.tower, latents, decode)
        tokens = rearrange(self.project(embedding), "b (m d) -> b m d", m=self.num_tokens)
        return torch.cat([tokens, self.whole(latents, decode)], dim=1)


def _frozen_tower(
    folder: Path | None,
    config: dict[str, Any] | None,
    kind: str = "CLIPVisionModelWithProjection",
) -> Any:
    if (folder is None) == (config is None):
        raise ValueError(f"folder = {folder}, config = {config}: give one of them")
    if folder is not None:
        return _loaded(folder, kind).requires_grad_(False)
    made = transformers_class(kind)(transformers_class("CLIPVisionConfig")(**config or {}))
    return made.requires_grad_(False)


def _specification(encoder: Any, **arguments: Any) -> dict[str, Any]:
    """Return what builds the encoder again without its folder."""
    path = f"{type(encoder).__module__}.{type(encoder).__qualname__}"
    return {"class_path": path, "init_args": {"config": encoder.tower.config.to_dict()} | arguments}


@torch.no_grad()
def _embedding(
    tower: Any, latents: Float[Tensor, "b c 1 h w"], decode: Decode
) -> Float[Tensor, "b d"]:
    images = clip_pixels(decode(latents)[:, :, 0], tower.config.image_size)
    return tower.eval()(pixel_values=images).image_embeds


def clip_pixels(images: Float[Tensor, "b 3 H W"], side: int) -> Float[Tensor, "b 3 {side} {side}"]:
    """Prepare images in [-1, 1] as CLIP's own processor does.

    The short side is scaled to ``side`` by a bicubic filter with antialiasing, the centre is cut
    out, and each colour is normalised.
    """
    height, width = images.shape[2:]
    scaled = [side * height // min(height, width), side * width // min(height, width)]
    # In whole levels, which the filter rounds to between its two passes as Pillow's does.
    levels = F.interpolate(as_levels(images), size=scaled, mode="bicubic", antialias=True)
    top, left = (scaled[0] - side) // 2, (scaled[1] - side) // 2
    mean, std = (images.new_tensor(x)[:, None, None] for x in (_MEAN, _STD))
    return (levels[:, :, top : top + side, left : left + side] / 255 - mean) / std


def _loaded(folder: Path, name: str) -> Any:
    folder = part_of_pipeline(Path(folder), "image_encoder")
    model_type(folder, "CLIP", ("clip", "clip_vision_model"))
    if torch.empty(0).is_meta:  # where a configuration is checked
        config = transformers_class("CLIPVisionConfig")
        return transformers_class(name)(config.from_pretrained(folder, local_files_only=True))
    return read_network(folder, name, "CLIP")
