"""Retrieval accuracy: recall of the right caption of a clip, and of the right clip of a caption."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

RANKS = (1, 5)
NUM_CANDIDATES = 32


class Retrieval(Metric):
    """Recall at rank 1 and 5 over all clips of all ranks, in both directions (arXiv 2103.00020,
    section 3.1), and how often a clip's caption is ranked first among 32.

    A result is right if its caption equals the query's. The 32 are different captions: the right
    one and the 31 after it in the order of the captions' hashes. Fewer give no score.
    """

    full_state_update = False
    video: list[Tensor] | Tensor
    text: list[Tensor] | Tensor
    captions: list[Tensor] | Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("video", "text", "captions"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(
        self, video: Float[Tensor, "b e"], text: Float[Tensor, "b e"], captions: Sequence[str]
    ) -> None:
        for state, new in (
            (self.video, video.float()),
            (self.text, text.float()),
            (self.captions, caption_hashes(captions).to(video.device)),
        ):
            assert isinstance(state, list)
            state.append(new)

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Return scores by name, shares from 0 to 1."""
        video, text, captions = map(dim_zero_cat, (self.video, self.text, self.captions))
        similarity = video @ text.T
        same = captions[:, None] == captions
        scores = {}
        for name, rows in (("video_to_text", similarity), ("text_to_video", similarity.T)):
            for rank in RANKS:
                scores[f"{name}_at_{rank}"] = _recall(rows, same, rank)
        if (among := _first_among(similarity, captions)) is not None:
            scores[f"first_among_{NUM_CANDIDATES}"] = among
        return scores


def caption_hashes(captions: Sequence[str]) -> Int[Tensor, " b"]:
    """Return 64-bit hashes, which are equal for equal captions, on every rank."""
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in captions)
    return torch.tensor([int.from_bytes(one, "little", signed=True) for one in digests])


def _recall(
    similarity: Float[Tensor, "n n"], same: Bool[Tensor, "n n"], rank: int
) -> Float[Tensor, ""]:
    found = similarity.topk(min(rank, len(similarity)), dim=1).indices
    return same.gather(1, found).any(1).float().mean()


def _first_among(
    similarity: Float[Tensor, "n n"], captions: Int[Tensor, " n"]
) -> Float[Tensor, ""] | None:
    different, which = torch.unique(captions, return_inverse=True)
    if len(different) < NUM_CANDIDATES:
        return None
    columns = torch.stack([torch.nonzero(which == i)[0, 0] for i in range(len(different))])
    offsets = torch.arange(NUM_CANDIDATES, device=captions.device)
    candidates = columns[(which[:, None] + offsets) % len(different)]  # the right one first
    right, *others = similarity.gather(1, candidates).unbind(1)
    return (right > torch.stack(others).amax(0)).float().mean()
