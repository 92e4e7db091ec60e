"""Convolutional streams beside a video transformer (two-stream networks, arXiv 1406.2199)."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from sora_lightning.configuration import KeepsArguments
from sora_lightning.layers.patch import Patch
from sora_lightning.layers.transformer import LayerNorm

# Below the squared gradient of the weakest edge that counts, 0.1 of the pixels' range of 2.
_SMALL = 1e-2


class ConvolutionalStream(KeepsArguments, nn.Module, ABC):
    """Convolutions over each frame of a view of the video that is summed over its colours.

    What a stream learns of clips in some colours holds in all colours. It stays so only apart from
    the pixels: a network that sees both learns the combinations of the training instead.

    Args:
        channels: The channels of each convolution, which halves rows and columns.
    """

    def __init__(self, channels: Sequence[int] = (32, 64, 128)):
        super().__init__()
        if not channels:
            raise ValueError("channels = []: must name the channels of at least one convolution")
        self.stride, self.width = 2 ** len(channels), channels[-1]
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise((2, *channels)):
            layers += [nn.Conv2d(fan_in, fan_out, 3, stride=2, padding=1), nn.GELU()]
        self.convolutions = nn.Sequential(*layers)
        self.norm = LayerNorm(self.width, affine=True)

    @abstractmethod
    def view(self, videos: Float[Tensor, "b 3 F H W"]) -> Float[Tensor, "b 2 F H W"]:
        """Return what the convolutions see of pixels in [-1, 1]."""

    def check(self, patch: Patch) -> None:
        """Raise ``ValueError`` if the stride does not divide a tubelet's rows and columns."""
        if patch.h % self.stride or patch.w % self.stride:
            raise ValueError(
                f"tubelet = {[patch.f, patch.h, patch.w]}: rows and columns must be multiples of "
                f"{self.stride}, the stride of {type(self).__name__}"
            )

    def forward(self, videos: Float[Tensor, "b 3 F H W"], patch: Patch) -> Float[Tensor, "b n c"]:
        """Return the normalised mean of the features over each tubelet."""
        b, frames = len(videos), rearrange(self.view(videos), "b c F H W -> (b F) c H W")
        tokens = reduce(
            self.convolutions(frames),
            "(b f p) c (h q) (w r) -> b (f h w) c",
            "mean",
            b=b,
            p=patch.f,
            q=patch.h // self.stride,
            r=patch.w // self.stride,
        )
        return self.norm(tokens)


class EdgeStream(ConvolutionalStream):
    """Sees edges: the norm over the colours of the differences of neighbours, by rows and by
    columns. The sign, which tells light from dark, is lost.
    """

    def view(self, videos: Float[Tensor, "b 3 F H W"]) -> Float[Tensor, "b 2 F H W"]:
        _, y, x = _derivatives(videos)
        return torch.stack([y.norm(dim=1), x.norm(dim=1)], dim=1)


class MotionStream(ConvolutionalStream):
    """Sees how edges move: the products of the derivative by time with those by rows and columns,
    summed over the colours and divided by the gradient's norm (normal flow; Horn and Schunck 1981,
    section 4).
    """

    def view(self, videos: Float[Tensor, "b 3 F H W"]) -> Float[Tensor, "b 2 F H W"]:
        t, y, x = _derivatives(videos)
        norm = ((t**2 + y**2 + x**2).sum(1, keepdim=True) + _SMALL).sqrt()
        return torch.stack([(t * y).sum(1), (t * x).sum(1)], dim=1) / norm


def _derivatives(videos: Float[Tensor, "b 3 F H W"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return differences of neighbours along time, rows and columns, 0 at the border."""
    return (
        F.pad(videos.diff(dim=2), (0, 0, 0, 0, 1, 0)),
        F.pad(videos.diff(dim=3), (0, 0, 0, 1)),
        F.pad(videos.diff(dim=4), (0, 1)),
    )
