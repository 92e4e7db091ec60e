"""The two halves of CoCa's text decoder (arXiv 2205.01917, section 3.2): a text tower that sees the
caption alone, and a decoder that sees the video as well. Both are causal.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sora_lightning.captioner.attention import KeysValues, TextBlock
from sora_lightning.captioner.bpe import PAD
from sora_lightning.layers.transformer import LayerNorm, TransformerSize


def select_rows(blocks: list[KeysValues], rows: Int[Tensor, " r"]) -> list[KeysValues]:
    """Return the keys and values of these rows of the batch in each block."""
    return [(k[rows], v[rows]) for k, v in blocks]


@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far, of each block of the tower and of the decoder."""

    tower: list[KeysValues] = field(default_factory=list)
    decoder: list[KeysValues] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return self.tower[0][0].shape[2] if self.tower else 0

    def select(self, rows: Int[Tensor, " r"]) -> Cache:
        """Return the cache of these rows of the batch, in this order, repeats included."""
        return Cache(select_rows(self.tower, rows), select_rows(self.decoder, rows))


@dataclass(frozen=True)
class VideoContext:
    """Keys and values of clips in each block of the decoder.

    ``mask`` is True where a clip has a token; ``None`` where all have equally many.
    """

    blocks: list[KeysValues]
    mask: Bool[Tensor, "b l"] | None

    def select(self, rows: Int[Tensor, " r"]) -> VideoContext:
        """Return the context of these rows of the batch, in this order, repeats included."""
        mask = None if self.mask is None else self.mask[rows]
        return VideoContext(select_rows(self.blocks, rows), mask)


def causal_mask(num_past: int, num_new: int, device: torch.device) -> Bool[Tensor, "m l"]:
    """Return True where a new token sees one of the past or a new one up to itself."""
    ones = torch.ones(num_new, num_past + num_new, dtype=torch.bool, device=device)
    return ones.tril(num_past)


class TextTower(nn.Module):
    """Causal blocks over a caption, and a CLS token after it that sees all of it.

    ``context`` is the largest number of a caption's tokens, begin and end included.
    """

    def __init__(self, size: TransformerSize, vocab_size: int, context: int):
        super().__init__()
        if context < 3:
            raise ValueError(f"context = {context}: must be at least 3, begin, a token and end")
        self.context, self.width = context, size.width
        self.embedding = nn.Embedding(vocab_size, size.width)
        self.positions = nn.Parameter(torch.empty(context, size.width))
        self.cls = nn.Parameter(torch.empty(size.width))
        for table in (self.embedding.weight, self.positions, self.cls):
            nn.init.trunc_normal_(table, std=0.02)
        self.blocks = nn.ModuleList(TextBlock(size, sees_video=False) for _ in range(size.depth))
        self.norm = LayerNorm(size.width, affine=True)

    def forward(
        self, ids: Int[Tensor, "b l"]
    ) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b d"]]:
        """Return the tokens for the decoder, and the normalised output of CLS.

        Padding follows a caption; CLS does not see it, and no token before it does.
        """
        b, length = ids.shape
        x = self._embedded(ids, 0)
        x = torch.cat([x, repeat(self.cls, "d -> b 1 d", b=b).to(x)], dim=1)
        mask = repeat(causal_mask(0, length + 1, ids.device), "m l -> b 1 m l", b=b).clone()
        mask[:, :, -1, :-1] = (ids != PAD)[:, None]
        for block in self.blocks:
            x, _ = block(x, mask)
        return x[:, :-1], self.norm(x[:, -1])

    def step(
        self, ids: Int[Tensor, "b m"], past: list[KeysValues]
    ) -> tuple[Float[Tensor, "b m d"], list[KeysValues]]:
        """Return the tokens that follow those of ``past``, and the keys and values of all."""
        num_past = past[0][0].shape[2] if past else 0
        x, mask = self._embedded(ids, num_past), causal_mask(num_past, ids.shape[1], ids.device)
        now = []
        for index, block in enumerate(self.blocks):
            x, keys_values = block(x, mask, past=past[index] if past else None)
            now.append(keys_values)
        return x, now

    def _embedded(self, ids: Int[Tensor, "b m"], num_past: int) -> Float[Tensor, "b m d"]:
        if num_past + ids.shape[1] > self.context:
            raise ValueError(
                f"{num_past + ids.shape[1]} tokens: context = {self.context} is the largest number "
                "of a caption, begin and end included"
            )
        return self.embedding(ids) + self.positions[num_past : num_past + ids.shape[1]]


class CaptionDecoder(nn.Module):
    """Causal blocks that attend to a clip's tokens, over the tower's tokens, to logits."""

    def __init__(self, size: TransformerSize, vocab_size: int):
        super().__init__()
        self.blocks = nn.ModuleList(TextBlock(size, sees_video=True) for _ in range(size.depth))
        self.norm = LayerNorm(size.width, affine=True)
        self.logits_out = nn.Linear(size.width, vocab_size, bias=False)

    def videos(
        self, context: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"] | None
    ) -> VideoContext:
        """Return the clips' keys and values in each block, once for all tokens of the captions."""
        return VideoContext([block.video_keys_values(context) for block in self.blocks], mask)  # type: ignore[operator]

    def forward(
        self, x: Float[Tensor, "b m d"], videos: VideoContext, past: list[KeysValues]
    ) -> tuple[Float[Tensor, "b m v"], list[KeysValues]]:
        """Return the next token's logits after each token, and the keys and values of all tokens,
        ``past`` ones included.
        """
        num_past = past[0][0].shape[2] if past else 0
        mask, video_mask, now = causal_mask(num_past, x.shape[1], x.device), None, []
        if videos.mask is not None:
            video_mask = repeat(videos.mask, "b l -> b 1 m l", m=x.shape[1])
        for index, (block, video) in enumerate(zip(self.blocks, videos.blocks, strict=True)):
            x, keys_values = block(x, mask, video, video_mask, past[index] if past else None)
            now.append(keys_values)
        return self.logits_out(self.norm(x)), now


def caption_losses(
    logits: Float[Tensor, "b l v"], targets: Int[Tensor, "b l"]
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Return each caption's mean cross-entropy over its tokens (CoCa, equation 3), and the share of
    its tokens that the largest logit names. ``PAD`` does not count.
    """
    real = targets != PAD
    losses = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
    right = (logits.argmax(-1) == targets) & real
    num_tokens = real.sum(1)
    return (losses * real).sum(1) / num_tokens, right.sum(1) / num_tokens
