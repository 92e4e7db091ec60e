"""Known frames as further channels of the network's input, the other way than time 0 to tell a
denoiser what is known.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor


class GivenChannels(ABC):
    """Puts known latents beside the noisy ones. A clip of which nothing is known has zeros."""

    @abstractmethod
    def __call__(
        self, latents: Float[Tensor, "b c f h w"], mask: Bool[Tensor, "b 1 f h w"]
    ) -> Float[Tensor, "b c_and_1 f h w"]:
        """As many channels as the latents have, and one for what is known. Nothing of the latents
        outside of ``mask`` may show.
        """


@dataclass(frozen=True)
class MaskedLatents(GivenChannels):
    """The known latents with zeros elsewhere, and the mask (W.A.L.T, arXiv 2312.06662, section
    3.3): any task.
    """

    def __call__(
        self, latents: Float[Tensor, "b c f h w"], mask: Bool[Tensor, "b 1 f h w"]
    ) -> Float[Tensor, "b c_and_1 f h w"]:
        return torch.cat([torch.where(mask, latents, 0), mask.to(latents)], dim=1)


@dataclass(frozen=True)
class PictureAndPlaces(GivenChannels):
    """The first frame's latents, and after them each frame's place in the clip from 0 to 1 in all
    channels, as the public I2VGen-XL does (arXiv 2311.04145): image to video. The last channel is
    1 where there is a picture.

    Raises ``ValueError`` for a clip of which anything but the whole first frame is known.
    """

    def __call__(
        self, latents: Float[Tensor, "b c f h w"], mask: Bool[Tensor, "b 1 f h w"]
    ) -> Float[Tensor, "b c_and_1 f h w"]:
        f = latents.shape[2]
        there = mask[:, :, :1].flatten(1).all(1)
        only_first = torch.zeros_like(mask)
        only_first[:, :, :1] = rearrange(there, "b -> b 1 1 1 1")
        if not torch.equal(mask, only_first):
            raise ValueError(
                "PictureAndPlaces tells of the first latent frame alone: the tasks must be "
                "TextToVideo and FirstFrames with most = 1, and the context one frame"
            )
        places = torch.arange(f, device=latents.device) / max(f - 1, 1)
        places = repeat(places.to(latents), "f -> b c f h w", **_extents(latents))
        picture = torch.cat([latents[:, :, :1], places[:, :, 1:]], dim=2)
        shown = rearrange(there.to(latents), "b -> b 1 1 1 1")
        return torch.cat([picture * shown, torch.ones_like(picture[:, :1]) * shown], dim=1)


def _extents(latents: Float[Tensor, "b c f h w"]) -> dict[str, int]:
    b, c, _, h, w = latents.shape
    return {"b": b, "c": c, "h": h, "w": w}


@dataclass(frozen=True)
class Concatenation:
    """How a training tells of known frames by ``channels``, and the shares of clips that it leaves
    without text, without frames, and without both, by one draw (InstructPix2Pix, arXiv 2211.09800,
    section 3.2.1): sampling then weighs the two apart.
    """

    channels: GivenChannels = field(default_factory=MaskedLatents)
    drop_text: float = 0.05
    drop_frames: float = 0.05
    drop_both: float = 0.05

    def __post_init__(self) -> None:
        shares = (self.drop_text, self.drop_frames, self.drop_both)
        if min(shares) < 0 or sum(shares) >= 1:
            raise ValueError(
                f"drop_text, drop_frames, drop_both = {shares}: must not be negative, and less "
                "than 1 together"
            )

    def drops(self, numbers: Float[Tensor, " b"]) -> tuple[Bool[Tensor, " b"], Bool[Tensor, " b"]]:
        """Which clips lose their text and which their frames, by a uniform number each."""
        text_only = self.drop_text
        both = text_only + self.drop_both
        return numbers < both, (numbers >= text_only) & (numbers < both + self.drop_frames)
