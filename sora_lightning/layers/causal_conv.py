"""Causal 3-D convolution, which does not see later frames (MAGVIT-2, arXiv 2310.05737, section
3.1).

A video may also pass these layers piece by piece: ``step`` takes a piece and the state after the
pieces before it (``None`` at the beginning), and returns the output and the next state. The
outputs, concatenated, equal those of the whole video.
"""

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from jaxtyping import Float
from torch import Tensor, nn


class CausalConv3d(nn.Conv3d):
    """Convolution whose output at frame i depends on input frames up to i * stride only.

    All ``kernel - 1`` frames of temporal padding are copies of the first frame and precede it, so a
    single image behaves as a still video. Space is padded with zeros on both sides.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int, int] = (3, 3, 3),
        stride: tuple[int, int, int] = (1, 1, 1),
    ):
        if any(k % 2 == 0 for k in kernel_size[1:]):
            raise ValueError(f"kernel_size = {kernel_size}: height and width must be odd")
        padding = (0, kernel_size[1] // 2, kernel_size[2] // 2)
        super().__init__(in_channels, out_channels, kernel_size, stride, padding)

    def forward(self, x: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b d g i j"]:
        return self.step(x, None)[0]

    def step(
        self, x: Float[Tensor, "b c f h w"], past: Float[Tensor, "b c p h w"] | None
    ) -> tuple[Float[Tensor, "b d g i j"], Float[Tensor, "b c p h w"] | None]:
        """Convolve one piece; ``past`` holds the ``kernel - stride`` frames before it.

        All pieces after the first one must hold a multiple of the temporal stride in frames.
        """
        num_past = self.kernel_size[0] - 1
        if past is not None:
            x = torch.cat([past, x], dim=2)
        elif num_past:
            x = F.pad(x, (0, 0, 0, 0, num_past, 0), mode="replicate")
        num_kept = self.kernel_size[0] - self.stride[0]
        # A copy, since a slice would keep the whole piece in memory.
        kept = x[:, :, x.shape[2] - max(num_kept, 0) :].clone()
        return self._convolve(x), kept

    def _convolve(self, x: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b d g i j"]:
        """Convolve without temporal padding. A kernel through time alone runs in 2-D, over frames
        and positions: for it PyTorch has no fast 3-D convolution on one thread.
        """
        if self.kernel_size[1:] != (1, 1) or self.stride[1:] != (1, 1):
            return super().forward(x)
        weight = rearrange(self.weight, "d c k 1 1 -> d c k 1")
        positions = rearrange(x, "b c f h w -> b c f (h w)")
        y = F.conv2d(positions, weight, self.bias, stride=(self.stride[0], 1))
        return rearrange(y, "b d g (h w) -> b d g h w", h=x.shape[3])


class CausalDownsample(nn.Module):
    """Halve space, time or both by a strided causal convolution: F frames become 1 + (F - 1) / 2.

    A shortcut without parameters is added: each box of pixels becomes channels, averaged in groups
    down to ``out_channels`` (DC-AE, arXiv 2410.10733, section 3.1). It carries the content of each
    position from the first step on, so training starts from sharp latents.
    """

    def __init__(self, in_channels: int, out_channels: int, *, time: bool, space: bool):
        super().__init__()
        self.factors = _factors(time, space)
        folded = in_channels * prod(self.factors)
        if folded % out_channels:
            raise ValueError(
                f"halving {in_channels} channels by {self.factors} folds them into {folded}, "
                f"which is no multiple of the next level's {out_channels}"
            )
        self.out_channels = out_channels
        kernel = (3 if time else 1, 3 if space else 1, 3 if space else 1)
        self.conv = CausalConv3d(in_channels, out_channels, kernel, self.factors)

    def forward(self, x: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b d g i j"]:
        return self.step(x, None)[0]

    def step(
        self, x: Float[Tensor, "b c f h w"], past: Tensor | None
    ) -> tuple[Float[Tensor, "b d g i j"], Tensor | None]:
        """Downsample one piece; the state is that of its convolution."""
        p, q, r = self.factors
        padded = F.pad(x, (0, 0, 0, 0, p - 1, 0), mode="replicate") if past is None else x
        boxes = rearrange(padded, "b c (f p) (h q) (w r) -> b (c p q r) f h w", p=p, q=q, r=r)
        shortcut = reduce(boxes, "b (d group) f h w -> b d f h w", "mean", d=self.out_channels)
        y, past = self.conv.step(x, past)
        return y + shortcut, past


class CausalUpsample(nn.Module):
    """Double space, time or both, depth to space: f frames become 1 + 2 (f - 1).

    The first frame becomes one frame. The shortcut mirrors that of ``CausalDownsample``: it repeats
    channels and unfolds them.
    """

    def __init__(self, in_channels: int, out_channels: int, *, time: bool, space: bool):
        super().__init__()
        self.factors = _factors(time, space)
        unfolded = out_channels * prod(self.factors)
        if unfolded % in_channels:
            raise ValueError(
                f"doubling to {out_channels} channels by {self.factors} needs {unfolded} folded "
                f"channels, no multiple of the level's {in_channels}"
            )
        self.copies = unfolded // in_channels
        self.conv = CausalConv3d(in_channels, unfolded, (1, 1, 1))

    def forward(self, x: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b d g i j"]:
        return self.step(x, None)[0]

    def step(
        self, x: Float[Tensor, "b c f h w"], past: bool | None
    ) -> tuple[Float[Tensor, "b d g i j"], bool]:
        """Upsample one piece; the state says whether there was a piece before it."""
        p, q, r = self.factors
        folded = self.conv(x) + repeat(x, "b c f h w -> b (c copy) f h w", copy=self.copies)
        y = rearrange(folded, "b (d p q r) f h w -> b d (f p) (h q) (w r)", p=p, q=q, r=r)
        return (y if past else y[:, :, p - 1 :]), True


def step_through(layers: nn.Sequential, x: Tensor, past: list[Any] | None) -> tuple[Tensor, list]:
    """Pass one piece through consecutive layers. Layers without ``step`` take each frame alone."""
    following = []
    for layer, own in zip(layers, past or [None] * len(layers), strict=True):
        step = getattr(layer, "step", None)
        x, own = step(x, own) if step else (layer(x), None)
        following.append(own)
    return x, following


def _factors(time: bool, space: bool) -> tuple[int, int, int]:
    return (2 if time else 1, 2 if space else 1, 2 if space else 1)
