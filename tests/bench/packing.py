"""Clips of mixed sizes in one packed sequence, and padded to the largest as a batch; and clips of
one size, packed and as a batch, as buckets hold them.

The mixture is one long clip and many short ones; the padded batch computes all it pads, which is
what a network without packing does (its outputs there are thrown away). ``at equal work`` is the
share of what the padding allows.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from sora_lightning.denoisers import DiT
from sora_lightning.layers.partitions import FactorisedSelfAttention, Joint
from sora_lightning.types import PackedLatents
from tests.bench.models import CHANNELS, backward, condition, forward, forward_gmac
from tests.bench.report import Report

EXTENTS = [(8, 16, 16), (1, 16, 16), (4, 16, 8), (2, 8, 16), (1, 8, 8), (5, 12, 12)]
EQUAL, NUM_EQUAL = (4, 16, 16), 4
SIZE, WIDTH = "S", 128  # of the network; of the text
LAYOUTS = {"joint": Joint(), "factorised": FactorisedSelfAttention()}


def run(report: Report) -> None:
    for layout in LAYOUTS:
        mixed(report, layout)
        equal(report, layout)


def mixed(report: Report, layout: str) -> None:
    """Compare a packed sequence of clips of several sizes with a padded batch."""
    longest = [max(extent) for extent in zip(*EXTENTS, strict=True)]
    clips = [torch.randn(CHANNELS, *extent) for extent in EXTENTS]
    padded = torch.zeros(len(clips), CHANNELS, *longest)
    for row, clip in zip(padded, clips, strict=True):
        row[:, : clip.shape[1], : clip.shape[2], : clip.shape[3]] = clip
    waste = 1 - sum(clip.numel() for clip in clips) / padded.numel()
    case = f"{len(clips)} clips, {waste:.0%} of the padded is padding"
    _compare(report, layout, case, "padded", clips, padded)


def equal(report: Report, layout: str) -> None:
    """Compare a packed sequence of clips of one size with a batch of them."""
    batch = torch.randn(NUM_EQUAL, CHANNELS, *EQUAL)
    _compare(report, layout, f"{NUM_EQUAL} clips of one size", "batch", list(batch), batch)


def _compare(
    report: Report, layout: str, case: str, name: str, clips: list[Tensor], batch: Tensor
) -> None:
    make = partial(DiT, CHANNELS, WIDTH, SIZE, layout=LAYOUTS[layout])
    model = make()
    t, cond = torch.rand(len(clips)), condition(len(clips), WIDTH)
    packed = PackedLatents(tuple(clips))
    gmac = {
        name: len(clips) * forward_gmac(make, batch.shape[2:], WIDTH),
        "packed": sum(forward_gmac(make, clip.shape[1:], WIDTH) for clip in clips),
    }

    def call_packed() -> Tensor:
        return torch.stack([output.sum() for output in model(packed, t, cond).clips])

    candidates = {name: partial(model, batch, t, cond), "packed": call_packed}
    for what, measure, times in (
        ("forward", forward, 1),
        ("forward and backward", partial(backward, model), 3),
    ):
        report.compare(
            f"DiT-{SIZE}/2, {layout}, {case}, {what}",
            {which: measure(call) for which, call in candidates.items()},
            gmac={which: times * work for which, work in gmac.items()},
            items=sum(clip[0].numel() // 4 for clip in clips),
            unit="tokens",
        )
