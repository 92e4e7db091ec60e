"""The conditioning embedding ``c`` of a forward pass, and what else a block takes beside tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sora_lightning.layers.context_parallel import TokenShards
from sora_lightning.layers.packed_sequence import PackedSequence


@dataclass(frozen=True)
class Timesteps:
    """Distinct diffusion times of each clip, one row for each.

    The tokens of a clip may have several times, since known frames have time 0, but rarely many.
    ``row_of_token`` is ``None`` if row i is the one time of clip i of a dense batch.
    """

    t: Float[Tensor, " r"]
    clip: Int[Tensor, " r"] | None
    row_of_token: Int[Tensor, "b n"] | None

    @classmethod
    def of(cls, t: Float[Tensor, "*shape"], sequence: PackedSequence) -> Timesteps:
        """Return the rows for a time of each clip, or of each token (``b n`` dense, ``n`` packed).

        Raises ``ValueError`` for any other number of times.
        """
        num_tokens = sum(sequence.num_tokens)
        if sequence.is_packed:
            if t.shape == (len(sequence.grids),):
                return cls(t, None, sequence.clip_of_token[None])
            if t.shape == (num_tokens,):
                return cls._distinct(t[None], sequence.clip_of_token[None])
        elif t.ndim == 1 or t.shape[1] == 1:
            return cls(t.reshape(-1), None, None)
        elif t.shape[1] == num_tokens:
            clips = torch.arange(len(t), device=t.device)
            return cls._distinct(t, clips[:, None].expand_as(t))
        raise ValueError(
            f"times of shape {tuple(t.shape)}: give one for each of the clips, or one for each of "
            f"the {num_tokens} tokens"
        )

    @classmethod
    def _distinct(cls, t: Float[Tensor, "b n"], clip: Int[Tensor, "b n"]) -> Timesteps:
        pairs = torch.stack([clip.reshape(-1).double(), t.detach().reshape(-1).double()], dim=1)
        rows, index = torch.unique(pairs, dim=0, return_inverse=True)
        return cls(rows[:, 1].to(t.dtype), rows[:, 0].long(), index.reshape(t.shape))


@dataclass(frozen=True)
class ConditioningEmbedding:
    """Embedding of time plus pooled condition, one row for each of ``Timesteps``.

    ``embedding`` is the sum and ``activated`` its SiLU, which every modulation projects. ``shared``
    is the modulation that all blocks start from, for blocks that share one.
    """

    time: Float[Tensor, "r d"]
    pooled: Float[Tensor, "r d"] | None
    embedding: Float[Tensor, "r d"]
    row_of_token: Int[Tensor, "b n"] | None
    activated: Float[Tensor, "r d"]
    shared: Float[Tensor, "r p"] | None = None

    def tokens(self, num_clips: int) -> Float[Tensor, "clips m d"]:
        """Return time and pooled condition as tokens of each clip.

        Raises ``ValueError`` if a clip has several times.
        """
        if len(self.time) != num_clips:
            raise ValueError("blocks without adaptive norm take one time for each clip")
        parts = [self.time] if self.pooled is None else [self.time, self.pooled]
        return torch.stack(parts, dim=1)

    def expand_to_tokens(self, rows: Float[Tensor, "r e"]) -> Float[Tensor, "b m e"]:
        """Return the row of each token (m = n), or of each clip, to broadcast (m = 1)."""
        if self.row_of_token is None:
            return rows[:, None]
        return F.embedding(self.row_of_token, rows)


@dataclass(frozen=True)
class BlockContext:
    """Inputs of a block besides the tokens, computed once in a forward pass.

    ``angles`` are rotary positions. ``text`` has a row for each clip; it and its mask are ``None``
    if no block attends to text.
    """

    sequence: PackedSequence
    c: ConditioningEmbedding
    angles: Float[Tensor, "n a"] | None = None
    text: Float[Tensor, "clips l d"] | None = None
    mask: Bool[Tensor, "clips l"] | None = None

    def divided(self, shards: TokenShards) -> BlockContext:
        """Return what the blocks take beside the tokens of this rank."""
        rows, angles = self.c.row_of_token, self.angles
        return replace(
            self,
            sequence=self.sequence.divided(shards),
            c=self.c if rows is None else replace(self.c, row_of_token=rows[:, shards.own]),
            angles=None if angles is None else angles[shards.own],
        )
