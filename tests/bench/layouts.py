"""Joint and factorised attention as a clip grows: 1k, 4k and 16k tokens of 4, 16 and 64 frames."""

from __future__ import annotations

from functools import partial

from sora_lightning.denoisers import sized_dit
from sora_lightning.layers.partitions import Alternating, FactorisedSelfAttention, Joint
from tests.bench.models import CHANNELS, condition, forward, forward_gmac, latents
from tests.bench.report import Report

LAYOUTS = {
    "joint": Joint(),
    "factorised": FactorisedSelfAttention(),
    "alternating": Alternating(),
}
WIDTH, SIDE = 128, 32  # of the text; of a frame, 256 tokens


def run(report: Report) -> None:
    for frames in (4, 16, 64):
        candidates, gmac = {}, {}
        for name, layout in LAYOUTS.items():
            make = partial(sized_dit, CHANNELS, WIDTH, "tiny", layout=layout)
            model, (x, t), told = make(), latents(1, frames, SIDE), condition(1, WIDTH)
            candidates[name] = forward(partial(model, x, t, told))
            gmac[name] = forward_gmac(make, frames, SIDE, WIDTH)
        tokens = frames * 256
        report.compare(
            f"DiT-tiny/2, {tokens} tokens of {frames} frames, forward",
            candidates,
            gmac=gmac,
            items=tokens,
            unit="tokens",
        )
