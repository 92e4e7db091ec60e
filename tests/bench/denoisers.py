"""DiT-S/2 and B/2 at 256 tokens beside diffusers' class of the same architecture, and Latte-S/2 on
16 frames; forward, and forward with backward."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from sora_lightning.denoisers import SIZES, image_dit, latte
from tests.bench.models import CHANNELS, backward, condition, forward, forward_gmac, latents
from tests.bench.report import Report

BATCH = 4
IMAGE_SIZES, LATTE_SIZE = ("S", "B"), "S"


def run(report: Report) -> None:
    for size in IMAGE_SIZES:
        width = SIZES[size].width
        make = partial(image_dit, CHANNELS, width, size)
        gmac = BATCH * forward_gmac(make, (1, 32, 32), width)
        ours, theirs = make(), _diffusers_dit(size)
        (x, t), cond = latents(BATCH, 1, 32), condition(BATCH, width)
        images, steps, labels = x[:, :, 0], (1000 * t).long(), torch.arange(BATCH)

        def call_ours(model=ours, x=x, t=t, cond=cond) -> Tensor:
            return model(x, t, cond)

        def call_theirs(model=theirs, x=images, steps=steps, labels=labels) -> Tensor:
            return model(x, steps, labels).sample

        report.compare(
            f"DiT-{size}/2, 256 tokens, batch {BATCH}, forward",
            {"sora_lightning": forward(call_ours), "diffusers": forward(call_theirs)},
            gmac={"sora_lightning": gmac, "diffusers": gmac},
        )
        report.compare(
            f"DiT-{size}/2, 256 tokens, batch {BATCH}, forward and backward",
            {
                "sora_lightning": backward(ours, call_ours),
                "diffusers": backward(theirs, call_theirs),
            },
            gmac={"sora_lightning": 3 * gmac, "diffusers": 3 * gmac},
        )
    _latte(report)


def _latte(report: Report) -> None:
    width = SIZES[LATTE_SIZE].width
    make = partial(latte, CHANNELS, width, LATTE_SIZE)
    gmac = forward_gmac(make, (16, 16, 16), width)
    model, (x, t), cond = make(), latents(1, 16, 16), condition(1, width)

    def call() -> Tensor:
        return model(x, t, cond)

    case = f"Latte-{LATTE_SIZE}/2, 16 frames of 64 tokens, batch 1"
    for name, measured, times in (
        ("forward", forward(call), 1),
        ("forward and backward", backward(model, call), 3),
    ):
        report.compare(
            f"{case}, {name}",
            {"sora_lightning": measured},
            gmac={"sora_lightning": times * gmac},
            items=1024,
            unit="tokens",
        )


def _diffusers_dit(size: str) -> torch.nn.Module:
    from diffusers import DiTTransformer2DModel

    row = SIZES[size]
    return DiTTransformer2DModel(
        num_attention_heads=row.num_heads,
        attention_head_dim=row.width // row.num_heads,
        num_layers=row.depth,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        sample_size=32,
        attention_bias=True,
    ).eval()
