"""A causal 3-D convolutional VAE, as MAGVIT-2's and W.A.L.T's (arXiv 2310.05737, 2312.06662)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sora_lightning.layers.causal_conv import (
    CausalConv3d,
    CausalDownsample,
    CausalUpsample,
    step_through,
)
from sora_lightning.tokenizers.base import CausalTokenizer
from sora_lightning.tokenizers.posterior import DiagonalGaussian
from sora_lightning.tokenizers.tubelets import LinearTubelets
from sora_lightning.types import Compression

SPACE_TIME, SPACE, TIME = (3, 3, 3), (1, 3, 3), (3, 1, 1)


class ConvTokenizer(CausalTokenizer):
    """Levels of residual causal convolutions over patches of pixels.

    ``widths`` has one entry for each level, finest first; ``down_time`` and ``down_space`` say
    which axes are halved between levels. ``patch`` x ``patch`` pixels are folded into channels
    before the first level, which makes the finest and most expensive level cheaper by that factor.
    Compression is ``2^sum(down_time)`` frames by ``patch * 2^sum(down_space)`` pixels; the default
    is W.A.L.T's 4 x 8 x 8. ``separable`` blocks convolve space, then time, at less than a quarter
    of the cost (R(2+1)D, arXiv 1711.11248). With ``linear_tubelets`` the convolutions start at zero
    and correct a linear autoencoder that is trained with them, which gives sharp edges after a
    short training.
    """

    def __init__(
        self,
        latent_channels: int = 8,
        widths: Sequence[int] = (128, 128, 256, 512),
        down_time: Sequence[bool] = (False, True, True),
        down_space: Sequence[bool] = (True, True, True),
        patch: int = 1,
        blocks_per_level: int = 2,
        separable: bool = False,
        linear_tubelets: bool = False,
    ):
        if not len(widths) - 1 == len(down_time) == len(down_space):
            raise ValueError(
                f"widths has {len(widths)} levels, so down_time and down_space need "
                f"{len(widths) - 1} entries each, and have {len(down_time)} and {len(down_space)}"
            )
        if not all(t or s for t, s in zip(down_time, down_space, strict=True)):
            raise ValueError("between two levels time or space must be halved: both are false")
        space = patch * 2 ** sum(down_space)
        super().__init__(Compression(2 ** sum(down_time), space, space), latent_channels)
        self.patch = patch
        kernel = SPACE if separable else SPACE_TIME
        levels = list(zip(widths[:-1], widths[1:], down_time, down_space, strict=True))

        def blocks(width: int) -> list[nn.Module]:
            return [ResidualBlock(width, separable) for _ in range(blocks_per_level)]

        encoder: list[nn.Module] = [CausalConv3d(3 * patch**2, widths[0], kernel)]
        for width, wider, time, halve in levels:
            encoder += blocks(width)
            encoder += [CausalDownsample(width, wider, time=time, space=halve)]
        head = Head(widths[-1], 2 * latent_channels, kernel)
        self.encoder = nn.Sequential(*encoder, *blocks(widths[-1]), head)
        decoder = [CausalConv3d(latent_channels, widths[-1], kernel), *blocks(widths[-1])]
        for width, wider, time, halve in reversed(levels):
            decoder += [CausalUpsample(wider, width, time=time, space=halve), *blocks(width)]
        tail = Head(widths[0], 3 * patch**2, kernel)
        self.decoder = nn.Sequential(*decoder, tail)
        self.tubelets = (
            LinearTubelets(self.compression, latent_channels) if linear_tubelets else None
        )
        if linear_tubelets:
            for start_from_zero in (head, tail):
                nn.init.zeros_(start_from_zero.conv.weight)
                assert start_from_zero.conv.bias is not None
                nn.init.zeros_(start_from_zero.conv.bias)
        # Start with little noise (std 0.05): at 1, training first has to learn to avoid it.
        assert head.conv.bias is not None
        nn.init.constant_(head.conv.bias[latent_channels:], -6.0)
        # The layout in which convolutions run fastest, on CPU and GPU alike.
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def posterior_step(
        self, video: Float[Tensor, "b 3 F H W"], past: list[Any] | None
    ) -> tuple[DiagonalGaussian, list[Any]]:
        p = self.patch
        x = rearrange(video, "b c f (h p) (w q) -> b (c p q) f h w", p=p, q=p)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        moments, following = step_through(self.encoder, x, past)
        posterior = DiagonalGaussian.from_moments(moments)
        if self.tubelets is not None:
            mean = posterior.mean + self.tubelets.encode(video, alone=past is None)
            posterior = DiagonalGaussian(mean, posterior.log_variance)
        return posterior, following

    def decode_step(
        self, latents: Float[Tensor, "b c f h w"], past: list[Any] | None
    ) -> tuple[Float[Tensor, "b 3 F H W"], list[Any]]:
        p = self.patch
        x = latents.contiguous(memory_format=torch.channels_last_3d)
        x, following = step_through(self.decoder, x, past)
        video = rearrange(x, "b (c p q) f h w -> b c f (h p) (w q)", p=p, q=p)
        if self.tubelets is not None:
            video = video + self.tubelets.decode(latents, alone=past is None)
        return video, following

    def last_layer(self) -> Tensor:
        """Return the last convolution's weight, also with a linear path beside it."""
        tail = self.decoder[-1]
        assert isinstance(tail, Head)
        return tail.conv.weight

    def decoder_parts(self) -> list[nn.Module]:
        """See ``VideoTokenizer``."""
        return [self.decoder, *([self.tubelets.outward] if self.tubelets is not None else [])]


class ChannelNorm(nn.Module):
    """Root-mean-square norm over the channels of each position. Unlike group norm it is causal."""

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, x: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b c f h w"]:
        scale = torch.rsqrt(x.square().mean(dim=1, keepdim=True) + self.eps)
        return x * scale * self.gain[:, None, None, None]


class ResidualBlock(nn.Module):
    """Norm, SiLU and causal convolution, twice, added to the input; a new block is the identity."""

    def __init__(self, channels: int, separable: bool):
        super().__init__()
        last = CausalConv3d(channels, channels, TIME if separable else SPACE_TIME)
        nn.init.zeros_(last.weight)
        assert last.bias is not None
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(
            ChannelNorm(channels),
            nn.SiLU(),
            CausalConv3d(channels, channels, SPACE if separable else SPACE_TIME),
            ChannelNorm(channels),
            nn.SiLU(),
            last,
        )

    def forward(self, x: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b c f h w"]:
        return self.step(x, None)[0]

    def step(
        self, x: Float[Tensor, "b c f h w"], past: list[Any] | None
    ) -> tuple[Float[Tensor, "b c f h w"], list[Any]]:
        """Pass one piece; see ``layers.causal_conv``."""
        y, past = step_through(self.layers, x, past)
        return x + y, past


class Head(nn.Module):
    """Norm, SiLU and the last convolution."""

    def __init__(self, channels: int, out_channels: int, kernel: tuple[int, int, int]):
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.conv = CausalConv3d(channels, out_channels, kernel)

    def forward(self, x: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b d f h w"]:
        return self.step(x, None)[0]

    def step(
        self, x: Float[Tensor, "b c f h w"], past: Tensor | None
    ) -> tuple[Float[Tensor, "b d f h w"], Tensor | None]:
        """Pass one piece; see ``layers.causal_conv``."""
        return self.conv.step(F.silu(self.norm(x)), past)
