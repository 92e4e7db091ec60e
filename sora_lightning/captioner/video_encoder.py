"""A video encoder over tubelets of pixels, in any attention layout, and attention pooling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sora_lightning.captioner.attention import Attention
from sora_lightning.captioner.streams import ConvolutionalStream
from sora_lightning.checks import require_at_least
from sora_lightning.configuration import KeepsArguments
from sora_lightning.layers.packed_sequence import PackedSequence
from sora_lightning.layers.partitions import JOINT, AttentionLayout, Joint
from sora_lightning.layers.patch import Patch
from sora_lightning.layers.transformer import LayerNorm, TransformerSize
from sora_lightning.tokenizers.vivit import Positions, Transformer
from sora_lightning.tokenizers.vivit_encoder import VIT_SIZES, initialise
from sora_lightning.types import Compression

Videos = Float[Tensor, "b 3 F H W"] | Sequence[Float[Tensor, "3 _F _H _W"]]
"""Clips of one size as a batch, or clips of any sizes as a list."""


class VideoEncoder(KeepsArguments, nn.Module):
    """Tubelets to tokens, and a transformer over them (ViViT, arXiv 2103.15691), for clips of any
    sizes in one sequence (NaViT, arXiv 2307.06304).

    ``tubelet`` counts frames, rows and columns of pixels of a token. Copies of the first frame fill
    its tubelet, so an image is a video of one frame. The features of each of the ``streams`` are
    joined to the transformer's tokens, channel after channel: ``width`` counts all of them.
    """

    def __init__(
        self,
        size: TransformerSize = VIT_SIZES["S"],
        tubelet: Sequence[int] = (4, 8, 8),
        layout: AttentionLayout | None = None,
        positions: Positions | None = None,
        streams: Sequence[ConvolutionalStream] = (),
    ):
        super().__init__()
        self.patch = Patch.of(tubelet, "tubelet")
        self.width = size.width + sum(stream.width for stream in streams)
        self.compression = Compression(*tubelet)
        self.pixels_in = nn.Linear(3 * self.patch.volume, size.width)
        self.transformer = Transformer(size, layout or Joint(), positions or Positions())
        initialise(self)
        for stream in streams:
            stream.check(self.patch)
        self.streams = nn.ModuleList(streams)

    def forward(
        self, videos: Videos, kept: Sequence[Int[Tensor, " _n"]] | None = None
    ) -> tuple[Float[Tensor, "b n d"], PackedSequence]:
        """Return the tokens of pixels in [-1, 1], and their sequence.

        ``kept`` holds the indices of each clip's tokens that take part; ``None`` keeps all. The
        convolutions of ``streams`` also see others beside these. Raises ``ValueError`` for a size
        that the tubelets do not divide.
        """
        clips = [videos] if isinstance(videos, Tensor) else [video[None] for video in videos]
        filled = [
            F.pad(clip, (0, 0, 0, 0, self.patch.f - 1, 0), mode="replicate") for clip in clips
        ]
        grids = [self.patch.grid(*clip.shape[2:]) for clip in filled]
        sequence = PackedSequence(grids, clips[0].device, kept=kept)
        tubelets = sequence.select([self.patch.patchify(clip) for clip in filled])
        parts = [self.transformer(self.pixels_in(torch.cat(tubelets, dim=1)), sequence)]
        for stream in self.streams:
            features = sequence.select([stream(clip, self.patch) for clip in filled])
            parts.append(torch.cat(features, dim=1))
        return torch.cat(parts, dim=2), sequence


class ProjectedTokens(nn.Module):
    """All tokens of each clip, projected to another width and normalised."""

    def __init__(self, width: int, context_width: int):
        super().__init__()
        self.projection = nn.Linear(context_width, width)
        self.norm = LayerNorm(width, affine=True)

    def forward(
        self, tokens: Float[Tensor, "b n c"], sequence: PackedSequence
    ) -> tuple[Float[Tensor, "clips l d"], Bool[Tensor, "clips l"] | None]:
        """Return the tokens, padded to those of the longest clip, and True where they are real;
        ``None`` for clips of one length, whose tokens all are.
        """
        parts = sequence.grouping(JOINT).group(self.norm(self.projection(tokens)))
        if len(parts) == 1:
            return in_clip_order(parts[0], sequence), None
        longest = max(part.shape[1] for part in parts)
        padded = torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts])
        lengths = torch.tensor([part.shape[1] for part in parts for _ in part])
        mask = (torch.arange(longest) < lengths[:, None]).to(tokens.device)
        return in_clip_order(padded, sequence), in_clip_order(mask, sequence)


def in_clip_order(by_length: Tensor, sequence: PackedSequence) -> Tensor:
    """Sort rows of clips, the shortest first, to the order of the clips in the sequence."""
    if sequence.clips_by_length is None:
        return by_length
    return by_length[torch.argsort(sequence.clips_by_length)]


class AttentionPooler(nn.Module):
    """Learned queries that attend to all tokens of their clip (CoCa, arXiv 2205.01917, section
    3.2).

    Clips of any number of tokens give the same number of vectors.
    """

    def __init__(self, num_queries: int, width: int, num_heads: int, context_width: int):
        super().__init__()
        require_at_least(1, num_queries=num_queries)
        self.queries = nn.Parameter(torch.empty(num_queries, width))
        nn.init.trunc_normal_(self.queries, std=0.02)
        self.attention = Attention(width, num_heads, context_width)
        self.norm = LayerNorm(width, affine=True)

    def forward(
        self, tokens: Float[Tensor, "b n c"], sequence: PackedSequence
    ) -> tuple[Float[Tensor, "clips q d"], None]:
        """Return the vectors; ``None`` stands for a mask, since all are real."""
        parts = sequence.grouping(JOINT).group(tokens)  # clips of one length each
        return in_clip_order(torch.cat([self._pooled(part) for part in parts]), sequence), None

    def _pooled(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b q d"]:
        queries = repeat(self.queries, "q d -> b q d", b=len(tokens))
        return self.norm(self.attention(queries, self.attention.keys_values(tokens)))
