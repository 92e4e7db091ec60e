"""A contrastive captioner of videos (CoCa, arXiv 2205.01917)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sora_lightning.captioner.base import Captioner
from sora_lightning.captioner.bpe import BOS, BytePairEncoding
from sora_lightning.captioner.decoding import Decoding
from sora_lightning.captioner.text import (
    Cache,
    CaptionDecoder,
    TextTower,
    VideoContext,
    caption_losses,
)
from sora_lightning.captioner.video_encoder import (
    AttentionPooler,
    ProjectedTokens,
    VideoEncoder,
    Videos,
)
from sora_lightning.layers.fingerprint import fingerprint
from sora_lightning.layers.packed_sequence import PackedSequence
from sora_lightning.layers.transformer import TransformerSize

# CLIP's (arXiv 2103.00020, section 2.4): the initial temperature, and the largest of its inverse.
INITIAL_TEMPERATURE, MAX_INVERSE_TEMPERATURE = 0.07, 100.0


class CaptionerOutput(NamedTuple):
    """Normalised embeddings of clips and captions, and each caption's loss and token accuracy."""

    video: Float[Tensor, "b e"]
    text: Float[Tensor, "b e"]
    losses: Float[Tensor, " b"]
    accuracy: Float[Tensor, " b"]


class CoCa(Captioner):
    """Video encoder, attention poolers, text tower and caption decoder.

    Args:
        encoder: Pixels to tokens.
        text: The size of the text tower, and of the caption decoder: each has ``depth`` blocks.
        num_queries: Vectors to which the decoder attends for each clip; 256 in the paper. ``None``
            lets it attend to all the encoder's tokens: which of two objects has which colour is
            then told apart by where they are.
        vocab_size: Rows of the embedding. The vocabulary is learned from the training's captions.
        context: The largest number of a caption's tokens, begin and end included.
        embedding_width: Width of the embeddings that are compared.
    """

    def __init__(
        self,
        encoder: VideoEncoder,
        text: TransformerSize,
        num_queries: int | None = 32,
        vocab_size: int = 1024,
        context: int = 64,
        embedding_width: int = 128,
    ):
        super().__init__()
        self.bpe = BytePairEncoding(vocab_size)
        self.encoder = encoder
        # Task-specific poolers, one query for the embedding (section 3.2).
        pooled = (text.width, text.num_heads, encoder.width)
        self.caption_context: AttentionPooler | ProjectedTokens = (
            ProjectedTokens(text.width, encoder.width)
            if num_queries is None
            else AttentionPooler(num_queries, *pooled)
        )
        self.embedding_pooler = AttentionPooler(1, *pooled)
        self.tower = TextTower(text, vocab_size, context)
        self.decoder = CaptionDecoder(text, vocab_size)
        self.video_out = nn.Linear(text.width, embedding_width, bias=False)
        self.text_out = nn.Linear(text.width, embedding_width, bias=False)
        self.log_inverse_temperature = nn.Parameter(torch.tensor(-math.log(INITIAL_TEMPERATURE)))

    def forward(
        self,
        videos: Videos,
        captions: Sequence[str],
        kept: Sequence[Int[Tensor, " _n"]] | None = None,
    ) -> CaptionerOutput:
        """Compare clips of pixels in [-1, 1] with their captions, and predict the captions."""
        tokens, sequence = self.encoder(videos, kept)
        ids = self.bpe.encode(captions).to(tokens.device)
        text, cls = self.tower(ids)
        logits, _ = self.decoder(text[:, :-1], self._caption_video(tokens, sequence), [])
        losses, accuracy = caption_losses(logits, targets=ids[:, 1:])
        video = self._embed_tokens(tokens, sequence)
        return CaptionerOutput(video, self._embed_cls(cls), losses, accuracy)

    def embed_videos(self, videos: Videos) -> Float[Tensor, "b e"]:
        """Return normalised embeddings of clips."""
        return self._embed_tokens(*self.encoder(videos))

    def embed_captions(self, captions: Sequence[str]) -> Float[Tensor, "b e"]:
        """Return normalised embeddings of captions."""
        ids = self.bpe.encode(captions).to(self.text_out.weight.device)
        return self._embed_cls(self.tower(ids)[1])

    @property
    def inverse_temperature(self) -> Float[Tensor, ""]:
        return self.log_inverse_temperature.exp().clamp(max=MAX_INVERSE_TEMPERATURE)

    def captions(
        self,
        videos: Videos,
        decoding: Decoding,
        rngs: Sequence[torch.Generator],
        num_captions: int = 1,
    ) -> list[list[str]]:
        """See ``Captioner``. Clips are encoded once."""
        tokens, sequence = self.encoder(videos)
        state = self._start(tokens, sequence)
        num_drawn = num_captions * decoding.num_candidates
        clips = torch.arange(len(state.ids), device=state.ids.device)
        state = state.select(repeat(clips, "b -> (b n)", n=num_drawn))
        ids = decoding(state, [rng for rng in rngs for _ in range(num_drawn)])
        if num_drawn > num_captions:
            ids = self._nearest(ids, self._embed_tokens(tokens, sequence), num_captions)
        texts = self.bpe.decode(ids)
        return [texts[i : i + num_captions] for i in range(0, len(texts), num_captions)]

    def _nearest(
        self, ids: Int[Tensor, "bn l"], videos: Float[Tensor, "b e"], number: int
    ) -> Int[Tensor, "bk l"]:
        """Return of each clip's captions the ``number`` whose embeddings are nearest to the clip's,
        repeated ones last.
        """
        texts = self._embed_cls(self.tower(F.pad(ids, (1, 0), value=BOS))[1])
        texts = rearrange(texts, "(b n) e -> b n e", b=len(videos))
        similarity = einsum(texts, videos, "b n e, b e -> b n")
        captions = rearrange(ids, "(b n) l -> b n l", b=len(videos))
        repeated = (captions[:, :, None] == captions[:, None]).all(-1).tril(-1).any(-1)
        best = similarity.masked_fill(repeated, -2.0).topk(number, dim=1).indices
        clips = torch.arange(len(videos), device=ids.device)
        return rearrange(captions[clips[:, None], best], "b k l -> (b k) l")

    def fingerprint(self) -> str:
        """See ``Captioner``."""
        return fingerprint(self, str(self.encoder.compression))

    def start(self, videos: Videos) -> Prefix:
        """Return the state from which captions of clips are decoded."""
        return self._start(*self.encoder(videos))

    def _start(self, tokens: Tensor, sequence: PackedSequence) -> Prefix:
        context = self._caption_video(tokens, sequence)
        keys, _ = context.blocks[0]
        return Prefix(self, context, torch.full((len(keys), 1), BOS, device=keys.device))

    def _embed_tokens(self, tokens: Tensor, sequence: PackedSequence) -> Float[Tensor, "b e"]:
        pooled = self.embedding_pooler(tokens, sequence)[0][:, 0]
        return F.normalize(self.video_out(pooled), dim=-1)

    def _embed_cls(self, cls: Float[Tensor, "b d"]) -> Float[Tensor, "b e"]:
        return F.normalize(self.text_out(cls), dim=-1)

    def _caption_video(self, tokens: Tensor, sequence: PackedSequence) -> VideoContext:
        return self.decoder.videos(*self.caption_context(tokens, sequence))


@dataclass(frozen=True)
class Prefix:
    """The tokens of captions so far, each after ``BOS``, and what the decoder remembers of them.

    With a ``cache`` a step computes the new token alone; ``None`` computes all of them again.
    """

    model: CoCa
    videos: VideoContext
    ids: Int[Tensor, "b l"]
    cache: Cache | None = Cache()  # noqa: RUF009 (frozen)

    @property
    def room(self) -> int:
        """Return the number of tokens that the context still has room for."""
        return self.model.tower.context - self.ids.shape[1]

    def next_logits(self) -> tuple[Float[Tensor, "b v"], Prefix]:
        """Return the logits of the next token, and the prefix with what it remembers now."""
        cache = self.cache or Cache()
        x, tower = self.model.tower.step(self.ids[:, cache.num_tokens :], cache.tower)
        logits, decoder = self.model.decoder(x, self.videos, cache.decoder)
        now = None if self.cache is None else Cache(tower, decoder)
        return logits[:, -1].float(), replace(self, cache=now)

    def append(self, ids: Int[Tensor, " b"]) -> Prefix:
        return replace(self, ids=torch.cat([self.ids, ids[:, None]], dim=1))

    def select(self, rows: Int[Tensor, " r"]) -> Prefix:
        """Return the prefixes of these rows, in this order, repeats included."""
        cache = None if self.cache is None else self.cache.select(rows)
        return replace(self, videos=self.videos.select(rows), ids=self.ids[rows], cache=cache)


def contrastive_losses(
    video: Float[Tensor, "b e"],
    text: Float[Tensor, "b e"],
    same: Bool[Tensor, "b b"],
    inverse_temperature: Float[Tensor, ""],
) -> Float[Tensor, " b"]:
    """Return each clip's contrastive loss: that of finding its caption and that of finding the clip
    of its caption (CoCa, equation 2).

    ``same`` is True where a clip has an equal caption: all of these are right, with equal shares
    (UniCL, arXiv 2204.03610, equation 2). Where every caption differs, this is the paper's loss.
    """
    logits = inverse_temperature * video.float() @ text.float().T
    shares = same / same.sum(1, keepdim=True)
    of_video = F.cross_entropy(logits, shares, reduction="none")
    return of_video + F.cross_entropy(logits.T, shares, reduction="none")
