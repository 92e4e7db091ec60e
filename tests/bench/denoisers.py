"""DiT-S/2 and B/2 at 256 tokens beside diffusers' class of the same architecture; forward, and
forward with backward. The first in bfloat16 and compiled, too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sora_lightning.denoisers import SIZES, image_dit
from tests.bench.models import CHANNELS, compare_passes, condition, forward_gmac, latents
from tests.bench.report import Report

BATCH = 4
IMAGE_SIZES = ("S", "B")
VARIANTS: tuple[dict[str, Any], ...] = ({"dtype": torch.bfloat16}, {"compiled": True})


def run(report: Report) -> None:
    for size in IMAGE_SIZES:
        images(report, size)
    for options in VARIANTS:
        variant(report, IMAGE_SIZES[0], **options)


def images(report: Report, size: str) -> None:
    """Compare an image DiT with diffusers' class."""
    width = SIZES[size].width
    make = partial(image_dit, CHANNELS, width, size)
    gmac = BATCH * forward_gmac(make, (1, 32, 32), width)
    ours, theirs = make(), _diffusers_dit(size)
    (x, t), cond = latents(BATCH, 1, 32), condition(BATCH, width)
    steps, labels = (1000 * t).long(), torch.arange(BATCH)
    models: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
        "diffusers": (theirs, lambda: theirs(x[:, :, 0], steps, labels).sample),
        "sora_lightning": (ours, partial(ours, x, t, cond)),
    }
    compare_passes(report, f"DiT-{size}/2, 256 tokens, batch {BATCH}", models, gmac)


def variant(
    report: Report, size: str, dtype: torch.dtype = torch.float32, compiled: bool = False
) -> None:
    """Compare an image DiT with itself in another precision, or with compiled blocks."""
    if dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported():
        print("  no bfloat16: this CPU has no instructions for it")
        return
    width = SIZES[size].width
    plain, other = (image_dit(CHANNELS, width, size) for _ in range(2))
    (x, t), cond = latents(BATCH, 1, 32), condition(BATCH, width)
    if compiled:
        for block in other.blocks:
            block.compile()

    def call() -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return other(x, t, cond)

    name = "compiled blocks" if compiled else "bfloat16 autocast"
    models = {"float32": (plain, partial(plain, x, t, cond)), name: (other, call)}
    compare_passes(report, f"DiT-{size}/2, 256 tokens, batch {BATCH}, {name}", models, None)


def _diffusers_dit(size: str) -> nn.Module:
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
