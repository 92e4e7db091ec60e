"""The first frame of a clip, as Wan's networks from image to video see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from sora_lightning.conditioning.images import ImageEncoder
from sora_lightning.conditioning.known_frames import (
    ConcatConditioning,
    LatentSpace,
    clips_with_image,
)
from sora_lightning.conditioning.masks import FrameMask


class FirstFrameThenGrey(ConcatConditioning):
    """Concatenates the latents of a clip whose first frame is known and whose others are grey, and
    the mask (Wan, arXiv 2503.20314, section 5.1).

    The first frame's pixels are those of its latents: each step decodes one frame, and encodes a
    clip. Latent frames after the first are of ``frames_per_latent`` frames.
    """

    frames_per_latent: ClassVar[int] = 4

    def __init__(
        self,
        masks: Sequence[FrameMask],
        image_encoder: Callable[[int, int], ImageEncoder] | None = None,
        drop_frames: float = 0.05,
        drop_both: float = 0.05,
    ):
        super().__init__(masks, None, image_encoder, drop_frames, drop_both)

    @torch.no_grad()
    def shown(
        self,
        latents: Float[Tensor, "b c f h w"],
        mask: Bool[Tensor, "b 1 f h w"],
        space: LatentSpace,
    ) -> Float[Tensor, "b c_and_1 f h w"]:
        """See ``ConcatConditioning``. Raises ``ValueError`` where other frames are known."""
        has_image = rearrange(clips_with_image(mask, type(self).__name__), "b -> b 1 1 1 1")
        first = space.decode(latents[:, :, :1])[:, :, :1]
        num_grey = (latents.shape[2] - 1) * self.frames_per_latent
        grey = first.new_zeros(*first.shape[:2], num_grey, *first.shape[3:])
        encoded = space.encode(torch.cat([first, grey], dim=2)).to(latents)
        return torch.cat([torch.where(has_image, encoded, 0), mask.to(latents)], dim=1)
