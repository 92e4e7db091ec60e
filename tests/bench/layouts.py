"""Joint and factorised attention as a clip grows: 1k, 4k and 16k tokens of 4, 16 and 64 frames, and
one block at 64k tokens.

Where cost grows linearly in frames, tokens a second stay the same from case to case. The exponent
of the time in the tokens is fitted to the three sizes.
"""

from __future__ import annotations

from functools import partial

from sora_lightning.denoisers import SIZES, DiT
from sora_lightning.layers.partitions import Alternating, FactorisedSelfAttention, Joint
from sora_lightning.layers.transformer import TransformerSize
from tests.bench.models import CHANNELS, backward, condition, forward, forward_gmac, latents
from tests.bench.report import Report

LAYOUTS = {
    "joint": Joint(),
    "alternating": Alternating(),
    "factorised": FactorisedSelfAttention(),
}
FRAMES, LONGEST = (4, 16, 64), 256
WIDTH, SIDE = 128, 32  # of the text; of a frame, 256 tokens
# From this many tokens on, a case takes as few rounds as there may be, and the pair alone.
MANY_TOKENS = 16_384
TINY = SIZES["tiny"]


def run(report: Report) -> None:
    times: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    for frames in FRAMES:
        for name, seconds in grow(report, frames).items():
            times[name].append(seconds)
    tokens = [frames * SIDE**2 // 4 for frames in FRAMES]
    for name in ("joint", "factorised"):
        report.exponent(f"DiT-tiny/2, forward and backward, {name}", "tokens", tokens, times[name])
    one_block(report, LONGEST)


def grow(report: Report, frames: int) -> dict[str, float]:
    """Compare the layouts at a number of frames, and return the seconds of forward and backward."""
    tokens, passes, gmac = frames * SIDE**2 // 4, {}, {}
    many = tokens >= MANY_TOKENS
    for name, layout in LAYOUTS.items():
        if many and name == "alternating":
            continue
        make = partial(DiT, CHANNELS, WIDTH, "tiny", layout=layout)
        model, (x, t), cond = make(), latents(1, frames, SIDE), condition(1, WIDTH)
        call = partial(model, x, t, cond)
        passes[name] = (forward(call), backward(model, call))
        gmac[name] = forward_gmac(make, (frames, SIDE, SIDE), WIDTH)
    rows = {}
    for i, (what, times) in enumerate((("forward", 1), ("forward and backward", 3))):
        if many and times == 1:
            continue
        rows = report.compare(
            f"DiT-tiny/2, {tokens} tokens of {frames} frames, {what}",
            {name: both[i] for name, both in passes.items()},
            gmac={name: times * work for name, work in gmac.items()},
            items=tokens,
            unit="tokens",
            rounds=1 if many else None,
        )
    return {name: row.median_s for name, row in rows.items()}


def one_block(report: Report, frames: int) -> None:
    """Compare joint and factorised attention in one block of the same width, forward."""
    size, calls, gmac = TransformerSize(1, TINY.width, TINY.num_heads), {}, {}
    for name in ("joint", "factorised"):
        make = partial(DiT, CHANNELS, WIDTH, size, layout=LAYOUTS[name])
        calls[name] = forward(partial(make(), *latents(1, frames, SIDE), condition(1, WIDTH)))
        gmac[name] = forward_gmac(make, (frames, SIDE, SIDE), WIDTH)
    tokens = frames * SIDE**2 // 4
    report.compare(
        f"one block of DiT-tiny/2, {tokens} tokens of {frames} frames, forward",
        calls,
        gmac=gmac,
        items=tokens,
        unit="tokens",
        rounds=1,
    )
