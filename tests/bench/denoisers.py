"""DiT-S/2 and B/2 at 256 tokens beside diffusers' class of the same architecture, and Latte-S/2 on
16 frames, beside the public code where ``--latte`` gives a checkout of Vchitect/Latte; forward, and
forward with backward. The latter in bfloat16 and compiled, too."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from sora_lightning.denoisers import SIZES, image_dit, latte
from tests.bench.models import CHANNELS, backward, condition, forward, forward_gmac, latents
from tests.bench.report import Report

BATCH = 4
IMAGE_SIZES, LATTE_SIZE = ("S", "B"), "S"
VARIANTS: tuple[dict[str, Any], ...] = ({"dtype": torch.bfloat16}, {"compiled": True})


def run(report: Report) -> None:
    for size in IMAGE_SIZES:
        images(report, size)
    _latte(report)
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
    _compare(report, f"DiT-{size}/2, 256 tokens, batch {BATCH}", models, gmac)


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
    _compare(report, f"DiT-{size}/2, 256 tokens, batch {BATCH}, {name}", models, None)


def _compare(
    report: Report,
    case: str,
    models: dict[str, tuple[nn.Module, Callable[[], Tensor]]],
    gmac: float | None,
    **items: Any,
) -> None:
    for what, times in (("forward", 1), ("forward and backward", 3)):
        report.compare(
            f"{case}, {what}",
            {
                name: forward(call) if times == 1 else backward(model, call)
                for name, (model, call) in models.items()
            },
            gmac=None if gmac is None else dict.fromkeys(models, times * gmac),
            **items,
        )


def _latte(report: Report) -> None:
    width = SIZES[LATTE_SIZE].width
    make = partial(latte, CHANNELS, width, LATTE_SIZE)
    gmac = forward_gmac(make, (16, 16, 16), width)
    ours, (x, t), cond = make(), latents(1, 16, 16), condition(1, width)
    models: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {}
    if (checkout := report.checkouts.get("latte")) is not None:
        theirs, frames = _public_latte(checkout), rearrange(x, "b c f h w -> b f c h w")
        models["Vchitect/Latte"] = (theirs, partial(theirs, frames, 1000 * t))
    else:
        print("  no Vchitect/Latte: give a checkout with --latte")
    models["sora_lightning"] = (ours, partial(ours, x, t, cond))
    case = f"Latte-{LATTE_SIZE}/2, 16 frames of 64 tokens, batch 1"
    _compare(report, case, models, gmac, items=1024, unit="tokens")


def _public_latte(checkout: Path) -> nn.Module:
    """Return the public class, from its file alone: the package imports much more. Needs timm."""
    place = importlib.util.spec_from_file_location("latte", checkout / "models" / "latte.py")
    assert place is not None
    assert place.loader is not None
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    row = SIZES[LATTE_SIZE]
    return module.Latte(
        input_size=16,
        hidden_size=row.width,
        depth=row.depth,
        num_heads=row.num_heads,
        num_frames=16,
        attention_mode="flash",
    ).eval()


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
