"""The autoencoder of latent diffusion (arXiv 2112.10752, appendix G), frame by frame.

Architecture and hyperparameters are those of ``ddconfig`` of the public ``kl-f8``, the autoencoder
of Stable Diffusion. ``sora-lightning convert --source ldm`` or ``ldm-diffusers`` reads its weights.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sora_lightning.checks import require_positive
from sora_lightning.layers.attention import SelfAttention
from sora_lightning.layers.packed_sequence import PackedSequence
from sora_lightning.tokenizers.framewise import FramewiseTokenizer
from sora_lightning.types import Compression, TokenGrid

_NUM_GROUPS = 32  # of every group norm


class LDMTokenizer(FramewiseTokenizer):
    """Levels of residual 2-D convolutions with one attention over a whole frame in the middle.

    The width of a level is ``channels`` times its entry of ``multipliers``, finest first; space is
    halved between levels. The defaults are kl-f8, of 83,653,863 parameters. Latents are normalised
    by the published ``scaling_factor``, 1 over their standard deviation, until
    ``set_latent_statistics`` measures it.
    """

    def __init__(
        self,
        latent_channels: int = 4,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 4, 4),
        blocks_per_level: int = 2,
        scaling_factor: float = 0.18215,
    ):
        if not multipliers:
            raise ValueError("multipliers is empty: there must be one level at least")
        if channels % _NUM_GROUPS:
            raise ValueError(f"channels = {channels} is not a multiple of {_NUM_GROUPS} groups")
        require_positive(scaling_factor=scaling_factor)
        space = 2 ** (len(multipliers) - 1)
        super().__init__(Compression(1, space, space), latent_channels)
        self.latent_std.fill_(1 / scaling_factor)
        widths = [channels * multiplier for multiplier in multipliers]
        moments = 2 * latent_channels
        self.encoder = _encoder(moments, widths, blocks_per_level)
        self.quant_conv = nn.Conv2d(moments, moments, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.decoder = _decoder(latent_channels, widths, blocks_per_level + 1)

    def image_moments(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n d h w"]:
        """See ``FramewiseTokenizer``."""
        return self.quant_conv(self.encoder(images))

    def decode_images(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        """See ``FramewiseTokenizer``."""
        return self.decoder(self.post_quant_conv(latents))

    def decoder_parts(self) -> list[nn.Module]:
        """See ``VideoTokenizer``."""
        return [self.post_quant_conv, self.decoder]


def _encoder(out_channels: int, widths: Sequence[int], blocks: int) -> nn.Sequential:
    layers: list[nn.Module] = [_conv(3, widths[0])]
    width = widths[0]
    for level, wider in enumerate(widths):
        for _ in range(blocks):
            layers.append(ResidualBlock(width, wider))
            width = wider
        if level < len(widths) - 1:
            layers.append(Downsample(width))
    return nn.Sequential(*layers, *_middle(width), *_head(width, out_channels))


def _decoder(in_channels: int, widths: Sequence[int], blocks: int) -> nn.Sequential:
    width = widths[-1]
    layers: list[nn.Module] = [_conv(in_channels, width), *_middle(width)]
    for level, narrower in reversed(list(enumerate(widths))):
        for _ in range(blocks):
            layers.append(ResidualBlock(width, narrower))
            width = narrower
        if level:
            layers.append(Upsample(width))
    return nn.Sequential(*layers, *_head(width, 3))


def _middle(width: int) -> list[nn.Module]:
    return [ResidualBlock(width, width), FrameAttention(width), ResidualBlock(width, width)]


def _head(width: int, out_channels: int) -> list[nn.Module]:
    return [_norm(width), nn.SiLU(), _conv(width, out_channels)]


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_NUM_GROUPS, channels, eps=1e-6)


def _conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


class ResidualBlock(nn.Module):
    """Norm, SiLU and convolution, twice, added to the input (projected to another width)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            _norm(in_channels),
            nn.SiLU(),
            _conv(in_channels, out_channels),
            _norm(out_channels),
            nn.SiLU(),
            _conv(out_channels, out_channels),
        )
        self.shortcut = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h w"]:
        return self.shortcut(x) + self.layers(x)


class FrameAttention(nn.Module):
    """Attention with one head over all positions of a frame, added to the input."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.attention = SelfAttention(channels, num_heads=1, qk_norm=None)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        height, width = x.shape[2:]
        tokens = rearrange(self.norm(x), "n c h w -> n (h w) c")
        tokens = self.attention(
            tokens, None, PackedSequence([TokenGrid(1, height, width)], x.device)
        )
        return x + rearrange(tokens, "n (h w) c -> n c h w", h=height)


class Downsample(nn.Module):
    """Halve each side by a strided convolution, padded on the right and below only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c i j"]:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double each side by nearest neighbours and a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = _conv(channels, channels)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c i j"]:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
