"""Joint and factorised attention as a clip grows: 1k, 4k and 16k tokens of 4, 16 and 64 frames.

Where cost grows linearly in frames, tokens a second stay the same from case to case.
"""

from __future__ import annotations

from functools import partial

from sora_lightning.denoisers import DiT
from sora_lightning.layers.partitions import Alternating, FactorisedSelfAttention, Joint
from tests.bench.models import CHANNELS, backward, condition, forward, forward_gmac, latents
from tests.bench.report import Report

LAYOUTS = {
    "joint": Joint(),
    "factorised": FactorisedSelfAttention(),
    "alternating": Alternating(),
}
FRAMES = (4, 16, 64)
WIDTH, SIDE = 128, 32  # of the text; of a frame, 256 tokens


def run(report: Report) -> None:
    for frames in FRAMES:
        passes, gmac = {}, {}
        for name, layout in LAYOUTS.items():
            make = partial(DiT, CHANNELS, WIDTH, "tiny", layout=layout)
            model, (x, t), cond = make(), latents(1, frames, SIDE), condition(1, WIDTH)
            call = partial(model, x, t, cond)
            passes[name] = (forward(call), backward(model, call))
            gmac[name] = forward_gmac(make, (frames, SIDE, SIDE), WIDTH)
        tokens = frames * SIDE**2 // 4
        for i, (what, times) in enumerate((("forward", 1), ("forward and backward", 3))):
            report.compare(
                f"DiT-tiny/2, {tokens} tokens of {frames} frames, {what}",
                {name: both[i] for name, both in passes.items()},
                gmac={name: times * work for name, work in gmac.items()},
                items=tokens,
                unit="tokens",
            )
