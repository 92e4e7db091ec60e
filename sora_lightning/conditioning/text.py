"""A small text encoder that trains with the denoiser: words by hashing, a few transformer
blocks.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence

import torch
import torch.distributed as dist
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sora_lightning.checks import require_at_least
from sora_lightning.conditioning.base import Conditioner, without_dropped
from sora_lightning.layers.positions.absolute import sinusoidal
from sora_lightning.layers.transformer import TransformerBlock
from sora_lightning.types import Condition

# Scripts without spaces between words: a word is one character and its marks.
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


def split_words(text: str) -> list[str]:
    """Return lower-case words and numbers of a text in NFC; punctuation is dropped.

    A word is a run of letters, digits, underscores and combining marks. Symbols, emoji among them,
    and the characters of scripts without spaces are words by themselves.
    """
    if text.isascii():  # the same, fifteen times as fast
        return re.findall(r"[a-z0-9_]+", text.lower())
    words: list[str] = []
    in_word = follows_base = False
    for character in unicodedata.normalize("NFC", text.lower()):
        kind = unicodedata.category(character)
        is_alone = kind == "So" or unicodedata.name(character, "").startswith(_UNSPACED)
        if kind.startswith("M"):
            if follows_base:
                words[-1] += character
            continue
        if in_word and not is_alone and _is_letter(character):
            words[-1] += character
        elif is_alone or _is_letter(character):
            words.append(character)
        follows_base = is_alone or _is_letter(character)
        in_word = follows_base and not is_alone
    return words


def _is_letter(character: str) -> bool:
    return character.isalnum() or character == "_"


class TextConditioner(Conditioner):
    """Encodes a caption's words.

    There is no vocabulary: a word's vector is the sum of two rows of one table, chosen by two
    hashes of its letters (arXiv 1709.03933), so that words which share one row still differ. Row 0,
    twice, is a token before the words. An empty caption, or a dropped one, is this token alone, so
    the condition of no caption is learned in training.

    The pooled vector is the sum of the tokens over the root of their number, in which a word means
    the same in any caption. With ``depth`` 0 the condition is a bag of words with their positions,
    which learns fastest what combinations of words never seen together mean.

    Captions longer than ``max_words`` are cut, with a warning that gives their share. The buffer
    ``seen_rows`` records the rows that training has used; ``unseen_words`` reads it.
    """

    seen_rows: Tensor

    def __init__(
        self,
        width: int = 128,
        depth: int = 2,
        num_heads: int = 4,
        max_words: int = 64,
        num_rows: int = 4096,
    ):
        super().__init__(width)
        require_at_least(1, max_words=max_words)
        require_at_least(2, num_rows=num_rows)
        self.max_words = max_words
        self.num_rows = num_rows
        self.embedding = nn.Embedding(num_rows, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.register_buffer("seen_rows", torch.zeros(num_rows, dtype=torch.bool))
        self.blocks = nn.ModuleList(TransformerBlock(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def rows(self, caption: str) -> list[tuple[int, int]]:
        """Return the two rows of the embedding table that each of a caption's tokens takes."""
        words = split_words(caption)[: self.max_words]
        return [(0, 0), *map(self._hash, words)]

    def unseen_words(self, captions: Sequence[str]) -> list[str]:
        """Return the captions' words whose rows training never used, each once, in order.

        A new word may share both of its rows with others and pass for seen; that is rare while the
        training's words fill a small part of the table.
        """
        words = dict.fromkeys(word for caption in captions for word in split_words(caption))
        seen = self.seen_rows.tolist()
        return [word for word in words if not all(seen[row] for row in self._hash(word))]

    def merge_seen(self) -> None:
        """Count a row as seen that any rank's training has used. All ranks must call it."""
        if dist.is_available() and dist.is_initialized():
            seen = self.seen_rows.byte()
            dist.all_reduce(seen, dist.ReduceOp.MAX)
            self.seen_rows.copy_(seen)

    def _hash(self, word: str) -> tuple[int, int]:
        digest = hashlib.blake2b(word.encode(), digest_size=16).digest()
        first, second = (int.from_bytes(half, "little") for half in (digest[:8], digest[8:]))
        return 1 + first % (self.num_rows - 1), 1 + second % (self.num_rows - 1)

    def tokenize(self, captions: list[str]) -> tuple[Int[Tensor, "b l 2"], Bool[Tensor, "b l"]]:
        """Return the rows, padded with 0, and the mask that is True on real tokens."""
        rows = [self.rows(caption) for caption in captions]
        length = max(map(len, rows))
        ids = torch.tensor([row + [(0, 0)] * (length - len(row)) for row in rows])
        mask = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows])
        device = self.embedding.weight.device
        return ids.to(device), mask.to(device)

    def forward(self, captions: list[str], drop: Bool[Tensor, " b"] | None = None) -> Condition:
        captions = without_dropped(captions, drop)
        lengths = [len(split_words(caption)) for caption in captions]
        self.warn_of_cut(lengths, self.max_words, f"max_words = {self.max_words} words")
        ids, mask = self.tokenize(captions)
        if self.training:
            self.seen_rows[ids.flatten()] = True
        x = self.embedding(ids).sum(dim=2) + self._positions(ids)  # b l d
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        real = mask[..., None].to(x)
        pooled = (x * real).sum(1) / real.sum(1).sqrt()
        return Condition(tokens=x, mask=mask, pooled=pooled)

    def _positions(self, ids: Int[Tensor, "b l 2"]) -> Float[Tensor, "1 l d"]:
        positions = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)
        # As large as the embedding's values, so that positions do not dominate words.
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
