"""A transformer VAE over tubelets of pixels, in any attention layout (ViViT, arXiv 2103.15691), for
clips of any sizes in one sequence (NaViT, arXiv 2307.06304).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sora_lightning.layers.packed_sequence import PackedSequence
from sora_lightning.layers.partitions import AttentionLayout, Joint
from sora_lightning.layers.patch import Patch
from sora_lightning.layers.positions.absolute import (
    PositionEmbedding,
    PositionEmbeddings,
    Sinusoidal,
)
from sora_lightning.layers.positions.rotary import Rotary
from sora_lightning.layers.transformer import LayerNorm, RMSNorm, TransformerSize
from sora_lightning.tokenizers.base import VideoTokenizer
from sora_lightning.tokenizers.posterior import DiagonalGaussian
from sora_lightning.tokenizers.vivit_encoder import VIT_SIZES, EncoderBlock, initialise
from sora_lightning.types import Compression, PackedLatents, TokenGrid

_LATENTS = Patch()  # a latent position is a token


@dataclass(frozen=True)
class Positions:
    """Positions of a transformer: vectors ``added`` to the tokens, and ``rotary`` angles of queries
    and keys; null is none. The defaults serve grids of any size.
    """

    added: Sequence[Callable[[int], PositionEmbedding]] = (Sinusoidal,)
    rotary: Rotary | None = field(default_factory=Rotary)


class ViViTTokenizer(VideoTokenizer):
    """Tubelets to tokens, a transformer to latents, and a transformer back to tubelets.

    ``tubelet`` counts frames, rows and columns of pixels of a token, which becomes a latent
    position. Copies of the first frame fill its tubelet, so an image is a video of one frame.
    ``encoder`` and ``decoder`` are the sizes of the transformers; the decoder's is the encoder's by
    default. Both attend in ``layout``, any of the denoiser's.

    It is not a ``CausalTokenizer``: tokens of a group see each other in both directions, so a
    latent frame depends on later frames, and an image's latents are not those of a video's first
    frame. A causal mask would halve what attention sees, and still need memory that grows with the
    video. For encoding piece by piece, take ``ConvTokenizer``. Frames that a sampler is to keep are
    encoded by themselves, as ``generation.tasks`` does.
    """

    supports_packing: ClassVar[bool] = True

    def __init__(
        self,
        latent_channels: int = 16,
        tubelet: Sequence[int] = (4, 8, 8),
        encoder: TransformerSize | None = None,
        decoder: TransformerSize | None = None,
        layout: AttentionLayout | None = None,
        positions: Positions | None = None,
    ):
        patch = Patch.of(tubelet, "tubelet")
        super().__init__(Compression(*tubelet), latent_channels)
        self.patch = patch
        encoder = encoder or VIT_SIZES["S"]
        decoder = decoder or encoder
        shared = (layout or Joint(), positions or Positions())
        values = 3 * self.patch.volume
        self.pixels_in = nn.Linear(values, encoder.width)
        self.encoder = Transformer(encoder, *shared)
        self.moments_out = nn.Linear(encoder.width, 2 * latent_channels)
        self.latents_in = nn.Linear(latent_channels, decoder.width)
        self.decoder = Transformer(decoder, *shared)
        self.pixels_out = nn.Linear(decoder.width, values)
        initialise(self)
        # Start with little noise (std 0.05): at 1, training first has to learn to avoid it.
        nn.init.constant_(self.moments_out.bias[latent_channels:], -6.0)

    def posterior(self, video: Float[Tensor, "b 3 F H W"]) -> DiagonalGaussian:
        """See ``VideoTokenizer``. ``ValueError`` for a size that the tubelets do not divide."""
        tubelets, grid = self._tubelets(video)
        moments = self._moments(tubelets, PackedSequence([grid], video.device))
        return DiagonalGaussian.from_moments(_LATENTS.unpatchify(moments, grid))

    def decode_raw(self, latents: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b 3 F H W"]:
        """See ``VideoTokenizer``."""
        grid = TokenGrid(*latents.shape[2:])
        tokens = _LATENTS.patchify(latents)
        return self._video(self._pixels(tokens, PackedSequence([grid], latents.device)), grid)

    def posterior_packed(
        self, videos: Sequence[Float[Tensor, "3 _F _H _W"]]
    ) -> list[DiagonalGaussian]:
        """Return the posterior of each clip, as a batch of one. All clips share one sequence."""
        parts, grids = zip(*(self._tubelets(video[None]) for video in videos), strict=True)
        sequence = PackedSequence(grids, videos[0].device)
        moments = self._moments(torch.cat(parts, dim=1), sequence)
        clips = moments.split([grid.num_tokens for grid in grids], dim=1)
        return [
            DiagonalGaussian.from_moments(_LATENTS.unpatchify(clip, grid))
            for clip, grid in zip(clips, grids, strict=True)
        ]

    def decode_packed(self, latents: PackedLatents) -> list[Float[Tensor, "3 _F _H _W"]]:
        """Return the pixels of each clip from unnormalised latents, not clamped. All clips share
        one sequence.
        """
        grids = [TokenGrid(*clip.shape[1:]) for clip in latents.clips]
        tokens = torch.cat([_LATENTS.patchify(clip[None]) for clip in latents.clips], dim=1)
        pixels = self._pixels(tokens, PackedSequence(grids, tokens.device))
        clips = pixels.split([grid.num_tokens for grid in grids], dim=1)
        return [self._video(clip, grid)[0] for clip, grid in zip(clips, grids, strict=True)]

    def last_layer(self) -> Tensor:
        """See ``VideoTokenizer``."""
        return self.pixels_out.weight

    def decoder_parts(self) -> list[nn.Module]:
        """See ``VideoTokenizer``."""
        return [self.latents_in, self.decoder, self.pixels_out]

    def _tubelets(
        self, video: Float[Tensor, "b 3 F H W"]
    ) -> tuple[Float[Tensor, "b n p"], TokenGrid]:
        filled = F.pad(video, (0, 0, 0, 0, self.patch.f - 1, 0), mode="replicate")
        return self.patch.patchify(filled), self.patch.grid(*filled.shape[2:])

    def _video(self, tubelets: Float[Tensor, "b n p"], grid: TokenGrid) -> Tensor:
        return self.patch.unpatchify(tubelets, grid)[:, :, self.patch.f - 1 :]

    def _moments(self, tubelets: Tensor, sequence: PackedSequence) -> Float[Tensor, "b n m"]:
        return self.moments_out(self.encoder(self.pixels_in(tubelets), sequence))

    def _pixels(self, latents: Tensor, sequence: PackedSequence) -> Float[Tensor, "b n p"]:
        return self.pixels_out(self.decoder(self.latents_in(latents), sequence))


class Transformer(nn.Module):
    """Positions, blocks of attention in a layout, and a norm, over the tokens of a sequence."""

    def __init__(
        self,
        size: TransformerSize,
        layout: AttentionLayout,
        positions: Positions,
    ):
        super().__init__()
        width = size.width
        self.positions = PositionEmbeddings(
            (position(width) for position in positions.added), size.depth - 1
        )
        self.blocks = nn.ModuleList(
            EncoderBlock(size, partitions, qk_norm=RMSNorm)
            for partitions in layout.schedule(size.depth)
        )
        self.norm = LayerNorm(width, affine=True)
        self.rotary = positions.rotary
        self.head_width = size.head_width

    def forward(
        self, x: Float[Tensor, "b n d"], sequence: PackedSequence
    ) -> Float[Tensor, "b n d"]:
        angles = None
        if self.rotary is not None:
            angles = self.rotary.angles(sequence, self.head_width)
        for i, block in enumerate(self.blocks):
            x = self.positions.add(x, i, sequence)
            x = block(x, sequence, angles)
        return self.norm(x)
