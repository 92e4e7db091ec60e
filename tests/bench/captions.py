"""Captions of 64 tokens, with and without the cache of keys and values."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from sora_lightning.captioner import CoCa, VideoEncoder
from sora_lightning.captioner.bpe import EOS
from sora_lightning.captioner.coca import Prefix
from sora_lightning.captioner.decoding import Greedy
from sora_lightning.layers.transformer import TransformerSize
from tests.bench.report import Report

BATCH, NUM_TOKENS, WIDTH = 16, 64, 256


@dataclass(frozen=True)
class Endless(Prefix):
    """A prefix whose captions do not end, so that every one has as many tokens."""

    def next_logits(self) -> tuple[Tensor, Prefix]:
        logits, state = super().next_logits()
        return logits.index_fill(1, torch.tensor([EOS]), -torch.inf), state


def run(report: Report) -> None:
    torch.manual_seed(0)
    model = CoCa(
        VideoEncoder(TransformerSize(2, 64, 2), (4, 8, 8)),
        TransformerSize(3, WIDTH, 4),
        context=NUM_TOKENS + 1,
    ).eval()

    def decode(cached: bool) -> Int[Tensor, "b l"]:
        start = model.start(torch.zeros(BATCH, 3, 5, 16, 16))
        prefix = Endless(start.model, start.videos, start.ids)
        ids = Greedy()(prefix if cached else replace(prefix, cache=None), [])
        assert ids.shape == (BATCH, NUM_TOKENS)
        return ids

    with torch.no_grad():
        report.compare(
            f"{BATCH} captions of {NUM_TOKENS} tokens, 3 + 3 blocks of width {WIDTH}, greedy",
            {"without a cache": lambda: decode(False), "with a cache": lambda: decode(True)},
            items=BATCH,
            unit="captions",
        )
