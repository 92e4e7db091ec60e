"""Probes of a tokenizer: causality, seams, information in its channels, cost of 8-bit latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from sora_lightning.tokenizers import CausalTokenizer, Tiling, VideoTokenizer

# A channel with less information about a clip than this is dead.
DEAD_BITS = 0.1
_LEVELS = 255


@dataclass(frozen=True)
class Causality:
    """Largest changes of past frames when future frames are replaced.

    ``latents`` is in standard deviations, ``pixels`` in 0..255; both are 0 for a causal tokenizer,
    up to rounding. ``control`` is the largest change of the later latents: if it is 0, the test is
    void.
    """

    latents: float
    pixels: float
    control: float


def causality(tokenizer: VideoTokenizer, video: Float[Tensor, "b 3 F H W"]) -> Causality:
    """Measure causality at each latent frame except the last.

    Later pixels are negated and flipped vertically, later latents negated. The video must have at
    least two latent frames.
    """
    step = tokenizer.compression.frames
    whole = tokenizer.encode(video)
    pixels = tokenizer.decode(whole)
    changes = Causality(0.0, 0.0, 0.0)
    for last in range(whole.shape[2] - 1):
        shown = 1 + last * step
        other = torch.cat([video[:, :, :shown], -video[:, :, shown:].flip(3)], dim=2)
        moved = (tokenizer.encode(other) - whole).abs()
        latents = torch.cat([whole[:, :, : last + 1], -whole[:, :, last + 1 :]], dim=2)
        repainted = (tokenizer.decode(latents) - pixels)[:, :, :shown].abs()
        changes = Causality(
            max(changes.latents, float(moved[:, :, : last + 1].max())),
            max(changes.pixels, float(repainted.max()) * 127.5),
            max(changes.control, float(moved[:, :, last + 1 :].max())),
        )
    return changes


def seams(tokenizer: CausalTokenizer, video: Float[Tensor, "b 3 F H W"]) -> tuple[float, float]:
    """Largest differences of a video processed in pieces of one latent frame from the whole.

    They are those of the latents (in standard deviations) and of the pixels (in 0..255).
    """
    step = tokenizer.compression.frames
    pieces = [video[:, :, :1], *video[:, :, 1:].split(step, dim=2)]
    latents = tokenizer.encode(video)
    joined = torch.cat(list(tokenizer.encode_pieces(pieces)), dim=2)
    pixels = torch.cat(list(tokenizer.decode_pieces(latents.split(1, dim=2))), dim=2)
    apart = (tokenizer.decode(latents) - pixels).abs().max()
    return float((joined - latents).abs().max()), float(apart) * 127.5


def smallest_tiling(tokenizer: VideoTokenizer) -> Tiling:
    """Tiles of 6 latent positions a side with an overlap of 2, smaller than any useful tiling."""
    side = max(tokenizer.compression.height, tokenizer.compression.width)
    return Tiling(tile=6 * side, overlap=2 * side)


def tile_seams(tokenizer: VideoTokenizer, video: Float[Tensor, "b 3 F H W"]) -> tuple[float, float]:
    """Largest differences of a video encoded and decoded in the smallest tiles, in 0..255.

    The first is over pixels. The second is over means of a colour over a latent position's pixels
    and all frames, which detects colour shifts between tiles.
    """
    tiled = smallest_tiling(tokenizer)(tokenizer)
    apart = tiled.decode(tiled.encode(video)) - tokenizer.decode(tokenizer.encode(video))
    c = tokenizer.compression
    means = reduce(apart, "b c f (h p) (w q) -> b c h w", "mean", p=c.height, q=c.width)
    return float(apart.abs().max()) * 127.5, float(means.abs().max()) * 127.5


def bits_per_channel(
    tokenizer: VideoTokenizer, videos: Sequence[Float[Tensor, "b 3 F H W"]]
) -> Float[Tensor, " c"]:
    """Information of one value of each channel about the clips, in bits.

    It is that of a Gaussian channel whose signal is the posterior's mean and whose noise is its
    standard deviation. It is 0 for a constant channel.
    """
    posteriors = [tokenizer.posterior(video) for video in videos]
    means = torch.cat([rearrange(p.mean.double(), "b c f h w -> (b f h w) c") for p in posteriors])
    noise = torch.cat([rearrange(p.log_variance, "b c f h w -> (b f h w) c") for p in posteriors])
    signal = means.var(dim=0)
    # A posterior without noise still has rounding errors of float32.
    least = 1e-12 * means.square().mean(dim=0) + 1e-30
    return 0.5 * torch.log2(1 + signal / noise.double().exp().mean(dim=0).maximum(least))


def quantised(latents: Float[Tensor, "1 c f h w"]) -> tuple[Float[Tensor, "1 c f h w"], int]:
    """Return the latents of a clip after 8-bit quantisation, and their number of bytes.

    Values are quantised between the minimum and maximum of each channel. A value takes one byte,
    and each channel stores two half-precision bounds.
    """
    low = latents.amin(dim=(2, 3, 4), keepdim=True).half().float()
    high = latents.amax(dim=(2, 3, 4), keepdim=True).half().float()
    step = (high - low).clamp(min=1e-6) / _LEVELS
    levels = ((latents - low) / step).round().clamp(0, _LEVELS)
    return low + levels * step, latents.numel() + 4 * latents.shape[1]
