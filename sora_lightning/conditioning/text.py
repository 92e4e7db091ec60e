"""A small text encoder that trains with the denoiser: words by hashing, a few transformer
blocks.
"""

import hashlib
import re

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sora_lightning.conditioning.base import Conditioner
from sora_lightning.layers.positions.absolute import sinusoidal
from sora_lightning.layers.transformer import TransformerBlock
from sora_lightning.types import Condition


def split_words(text: str) -> list[str]:
    """Lower-case words and numbers; punctuation is dropped."""
    return re.findall(r"\w+", text.lower())


class TextConditioner(Conditioner):
    """Encodes a caption's words.

    There is no vocabulary to keep: a word's vector is the sum of two rows of one table, chosen by
    two hashes of its letters (arXiv 1709.03933), so that words which share one row still differ.
    Row 0, twice, is the token that stands before the words. An empty caption, or a dropped one, is
    this token alone, so the condition of no caption is learned in training. The pooled vector is
    the tokens' sum over the root of their number: a word means there what it means in any caption,
    and of ``depth`` 0 the whole condition is a bag of words with their places, which learns fastest
    what combinations of words never seen together mean. Captions longer than ``max_words`` are cut.
    """

    def __init__(
        self,
        width: int = 128,
        depth: int = 2,
        num_heads: int = 4,
        max_words: int = 64,
        num_rows: int = 4096,
    ):
        super().__init__(width)
        if max_words < 1 or num_rows < 2:
            raise ValueError(f"max_words = {max_words} must be >= 1, num_rows = {num_rows} >= 2")
        self.max_words = max_words
        self.num_rows = num_rows
        self.embedding = nn.Embedding(num_rows, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(TransformerBlock(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def rows(self, caption: str) -> list[tuple[int, int]]:
        """The two rows of the embedding table that each of a caption's tokens takes."""
        words = split_words(caption)[: self.max_words]
        return [(0, 0), *map(self._hash, words)]

    def _hash(self, word: str) -> tuple[int, int]:
        digest = hashlib.blake2b(word.encode(), digest_size=16).digest()
        first, second = (int.from_bytes(half, "little") for half in (digest[:8], digest[8:]))
        return 1 + first % (self.num_rows - 1), 1 + second % (self.num_rows - 1)

    def tokenize(self, captions: list[str]) -> tuple[Int[Tensor, "b l 2"], Bool[Tensor, "b l"]]:
        """Rows, padded with 0, and the mask that is True on real tokens."""
        rows = [self.rows(caption) for caption in captions]
        length = max(map(len, rows))
        ids = torch.tensor([row + [(0, 0)] * (length - len(row)) for row in rows])
        mask = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows])
        device = self.embedding.weight.device
        return ids.to(device), mask.to(device)

    def forward(self, captions: list[str], drop: Bool[Tensor, " b"] | None = None) -> Condition:
        if drop is not None:
            captions = [
                "" if gone else text for text, gone in zip(captions, drop.tolist(), strict=True)
            ]
        ids, mask = self.tokenize(captions)
        x = self.embedding(ids).sum(dim=2) + self._positions(ids)  # b l d
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        real = mask[..., None].to(x)
        pooled = (x * real).sum(1) / real.sum(1).sqrt()
        return Condition(tokens=x, mask=mask, pooled=pooled)

    def _positions(self, ids: Int[Tensor, "b l 2"]) -> Float[Tensor, "1 l d"]:
        positions = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)
        # Of the embedding's own size, so that place does not drown the word.
        waves = 0.02 * repeat(sinusoidal(positions, self.width), "l d -> 1 l d")
        return waves.to(self.embedding.weight.dtype)


class Unconditional(Conditioner):
    """Ignores captions: one learned vector, for unconditional models."""

    def __init__(self, width: int = 128):
        super().__init__(width)
        self.vector = nn.Parameter(torch.zeros(width))

    def forward(self, captions: list[str], drop: Bool[Tensor, " b"] | None = None) -> Condition:
        b = len(captions)
        mask = torch.ones(b, 1, dtype=torch.bool, device=self.vector.device)
        return Condition(
            tokens=repeat(self.vector, "d -> b 1 d", b=b),
            mask=mask,
            pooled=repeat(self.vector, "d -> b d", b=b),
        )
