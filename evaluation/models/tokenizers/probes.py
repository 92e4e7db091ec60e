"""What can be measured of a tokenizer beside its pictures: whether it sees the future, whether
pieces meet without a seam, which channels say nothing, what 8 bits a value cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from sora_lightning.tokenizers import CausalTokenizer, Tiling, VideoTokenizer

# A channel that says less than this about a clip is dead.
DEAD_BITS = 0.1
_LEVELS = 255


@dataclass(frozen=True)
class Causality:
    """The greatest change where the past is looked at while the future is another.

    ``latents`` is in deviations, ``pixels`` in 0..255; both are 0 for a causal tokenizer, up to
    rounding. ``control`` is the greatest change of the later latents: where it is 0, nothing was
    measured.
    """

    latents: float
    pixels: float
    control: float


def causality(tokenizer: VideoTokenizer, video: Float[Tensor, "b 3 F H W"]) -> Causality:
    """For every latent frame but the last: pixels after it are negated and turned upside down, and
    latents after it negated. The video has two latent frames at least.
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
    """How far the latents (in deviations) and the pixels (of 0..255) of a video that passes through
    in pieces of one latent frame are from those of the whole, at most.
    """
    step = tokenizer.compression.frames
    pieces = [video[:, :, :1], *video[:, :, 1:].split(step, dim=2)]
    latents = tokenizer.encode(video)
    joined = torch.cat(list(tokenizer.encode_pieces(pieces)), dim=2)
    pixels = torch.cat(list(tokenizer.decode_pieces(latents.split(1, dim=2))), dim=2)
    apart = (tokenizer.decode(latents) - pixels).abs().max()
    return float((joined - latents).abs().max()), float(apart) * 127.5


def smallest_tiling(tokenizer: VideoTokenizer) -> Tiling:
    """Tiles of 6 latent positions a side that share 2: a harder case than any that serves a use."""
    side = max(tokenizer.compression.height, tokenizer.compression.width)
    return Tiling(tile=6 * side, overlap=2 * side)


def tile_seams(tokenizer: VideoTokenizer, video: Float[Tensor, "b 3 F H W"]) -> tuple[float, float]:
    """How far a video that is encoded and decoded by the smallest tiles is from the untiled one, of
    0..255: the worst pixel, and the worst mean of a colour over a latent position's pixels and all
    frames, where a shift of colour between tiles would show.
    """
    tiled = smallest_tiling(tokenizer)(tokenizer)
    apart = tiled.decode(tiled.encode(video)) - tokenizer.decode(tokenizer.encode(video))
    c = tokenizer.compression
    means = reduce(apart, "b c f (h p) (w q) -> b c h w", "mean", p=c.height, q=c.width)
    return float(apart.abs().max()) * 127.5, float(means.abs().max()) * 127.5


def bits_per_channel(
    tokenizer: VideoTokenizer, videos: Sequence[Float[Tensor, "b 3 F H W"]]
) -> Float[Tensor, " c"]:
    """What one value of each channel says of the clips, in bits: that of a Gaussian channel whose
    signal is the posterior's mean and whose noise is its deviation. 0 for a channel that stands
    still.
    """
    posteriors = [tokenizer.posterior(video) for video in videos]
    means = torch.cat([rearrange(p.mean.double(), "b c f h w -> (b f h w) c") for p in posteriors])
    noise = torch.cat([rearrange(p.log_variance, "b c f h w -> (b f h w) c") for p in posteriors])
    signal = means.var(dim=0)
    # A posterior without noise still has float32's rounding.
    least = 1e-12 * means.square().mean(dim=0) + 1e-30
    return 0.5 * torch.log2(1 + signal / noise.double().exp().mean(dim=0).maximum(least))


def quantised(latents: Float[Tensor, "1 c f h w"]) -> tuple[Float[Tensor, "1 c f h w"], int]:
    """One clip's latents after 8 bits a value, between each channel's least and greatest, and the
    number of bytes: a value each, and two half-precision bounds a channel.
    """
    low = latents.amin(dim=(2, 3, 4), keepdim=True).half().float()
    high = latents.amax(dim=(2, 3, 4), keepdim=True).half().float()
    step = (high - low).clamp(min=1e-6) / _LEVELS
    levels = ((latents - low) / step).round().clamp(0, _LEVELS)
    return low + levels * step, latents.numel() + 4 * latents.shape[1]
