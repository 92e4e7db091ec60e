"""Clips of mixed sizes in one packed sequence, and padded to the largest as a batch.

The mixture is one long clip and many short ones; the padded batch computes all it pads, which is
what a network without packing does (its outputs there are thrown away).
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
SIZE, WIDTH = "S", 128  # of the network; of the text


def run(report: Report) -> None:
    clips = [torch.randn(CHANNELS, *extent) for extent in EXTENTS]
    longest = [max(extent) for extent in zip(*EXTENTS, strict=True)]
    padded = torch.zeros(len(clips), CHANNELS, *longest)
    for row, clip in zip(padded, clips, strict=True):
        row[:, : clip.shape[1], : clip.shape[2], : clip.shape[3]] = clip
    waste = 1 - sum(clip.numel() for clip in clips) / padded.numel()
    t, cond, packed = (
        torch.rand(len(clips)),
        condition(len(clips), WIDTH),
        PackedLatents(tuple(clips)),
    )
    for name, layout in (("joint", Joint()), ("factorised", FactorisedSelfAttention())):
        make = partial(DiT, CHANNELS, WIDTH, SIZE, layout=layout)
        model = make()
        gmac = {
            "padded": len(clips) * forward_gmac(make, longest, WIDTH),
            "packed": sum(forward_gmac(make, extent, WIDTH) for extent in EXTENTS),
        }

        def call_packed(model=model) -> Tensor:
            outputs = model(packed, t, cond).clips
            return torch.stack([output.sum() for output in outputs])

        candidates = {"padded": partial(model, padded, t, cond), "packed": call_packed}
        case = f"DiT-{SIZE}/2, {name}, {len(clips)} clips, {waste:.0%} of the padded is padding"
        for what, measure, times in (
            ("forward", forward, 1),
            ("forward and backward", partial(backward, model), 3),
        ):
            report.compare(
                f"{case}, {what}",
                {which: measure(call) for which, call in candidates.items()},
                gmac={which: times * work for which, work in gmac.items()},
                items=sum(clip[0].numel() // 4 for clip in clips),
                unit="tokens",
            )
