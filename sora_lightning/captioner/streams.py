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

# Rows and columns over which the flow is taken as constant.
_WINDOW = 9
# Below the mean squared gradient of a window with an edge.
_DAMPING = 3e-4


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
        y, x = _derivatives(videos)
        # Several times as fast as the norm along a dimension that is not the last.
        return torch.stack([y.square().sum(1), x.square().sum(1)], dim=1).sqrt()


class MotionStream(ConvolutionalStream):
    """Sees the optical flow from the frame before, in pixels a frame, by rows and by columns: in
    the window around each pixel, the displacement that best explains the change of all colours
    (Lucas and Kanade 1981, An iterative image registration technique, one iteration).

    It does not depend on the contrast, and grows with displacements of up to about two pixels.
    Windows without edges have none, and neither has the first frame.
    """

    def view(self, videos: Float[Tensor, "b 3 F H W"]) -> Float[Tensor, "b 2 F H W"]:
        before, after = videos[:, :, :-1], videos[:, :, 1:]
        t, (y, x) = after - before, _derivatives((before + after) / 2)
        yy, xx, yx, ty, tx = map(_window_mean, (y * y, x * x, y * x, t * y, t * x))
        # The normal equations, damped where a window says nothing along a direction.
        yy, xx = yy + _DAMPING, xx + _DAMPING
        down, right = yx * tx - xx * ty, yx * ty - yy * tx
        flow = torch.stack([down, right], dim=1) / rearrange(
            yy * xx - yx**2, "b F H W -> b 1 F H W"
        )
        return F.pad(flow, (0, 0, 0, 0, 1, 0))


def _window_mean(products: Float[Tensor, "b 3 F H W"]) -> Float[Tensor, "b F H W"]:
    """Return the sum over the colours, and its mean over the window around each pixel."""
    means = reduce(products, "b c F H W -> (b F) 1 H W", "sum")
    for rows, columns in ((_WINDOW, 1), (1, _WINDOW)):  # 18 additions a pixel, not 81
        means = F.avg_pool2d(means, (rows, columns), stride=1, padding=(rows // 2, columns // 2))
    return rearrange(means, "(b F) 1 H W -> b F H W", b=len(products))


def _derivatives(videos: Float[Tensor, "b 3 F H W"]) -> tuple[Tensor, Tensor]:
    """Return differences of neighbours along rows and columns, 0 at the border."""
    return F.pad(videos.diff(dim=3), (0, 0, 0, 1)), F.pad(videos.diff(dim=4), (0, 1))
