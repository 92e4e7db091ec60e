"""Latte-S/2 on 16 frames, beside the public code with the same weights where ``--latte`` gives a
checkout of Vchitect/Latte; forward, and forward with backward.

The public code attends in two ways that run on a CPU: ``math``, its default, and ``flash``, the
fused kernel, which puts the heads' channels out of order. Outputs are compared with the first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
from einops import rearrange
from torch import Tensor, nn

from sora_lightning.denoisers import SIZES
from sora_lightning.denoisers import latte as our_latte
from sora_lightning.interop import latte as interop
from tests.bench.models import (
    CHANNELS,
    compare_passes,
    condition,
    forward_gmac,
    latents,
)
from tests.bench.report import Report

SIZE, FRAMES, SIDE = "S", 16, 16
SOURCE = Path("models", "latte.py")  # in a checkout
ATTENTION = ("math", "flash")
FIXED = ("pos_embed", "temp_embed")  # tables of positions


def run(report: Report) -> None:
    width = SIZES[SIZE].width
    make = partial(our_latte, CHANNELS, width, SIZE)
    gmac = forward_gmac(make, (FRAMES, SIDE, SIDE), width)
    (x, t), cond = latents(1, FRAMES, SIDE), condition(1, width)
    ours: nn.Module = make()
    models: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {}
    if (checkout := report.checkouts.get("latte")) is None:
        print("  no Vchitect/Latte: give a checkout with --latte")
    else:
        frames, steps = rearrange(x, "b c f h w -> b f c h w"), 1000 * t - 1
        for mode in ATTENTION:
            theirs = _public_latte(checkout, mode)
            models[f"Vchitect/Latte, {mode}"] = (theirs, partial(theirs, frames, steps))
        theirs, call = models[f"Vchitect/Latte, {ATTENTION[0]}"]
        weights, num_heads = theirs.state_dict(), SIZES[SIZE].num_heads
        ours = interop.to_ours(weights, num_heads).build()["denoiser"]
        with torch.no_grad():
            expected = rearrange(call(), "b f c h w -> b c f h w")
            torch.testing.assert_close(ours(x, t, cond), expected, rtol=1e-3, atol=1e-4)
    models["sora_lightning"] = (ours, partial(ours, x, t, cond))
    tokens = FRAMES * SIDE**2 // 4
    case = f"Latte-{SIZE}/2, {FRAMES} frames of {SIDE**2 // 4} tokens, batch 1"
    compare_passes(report, case, models, gmac, items=tokens, unit="tokens")


def _public_latte(checkout: Path, attention_mode: str) -> nn.Module:
    """Return the public class, from its file alone: the package imports much more. Weights that it
    starts at zero are random here, so that outputs depend on all of them.
    """
    place = spec_from_file_location("latte", checkout / SOURCE)
    assert place is not None
    assert place.loader is not None
    module = module_from_spec(place)
    with patch.dict(sys.modules, _layers_of_timm()):
        place.loader.exec_module(module)
    row = SIZES[SIZE]
    model = module.Latte(
        input_size=SIDE,
        hidden_size=row.width,
        depth=row.depth,
        num_heads=row.num_heads,
        num_frames=FRAMES,
        attention_mode=attention_mode,
    )
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name not in FIXED:
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def _layers_of_timm() -> dict[str, ModuleType]:
    """Return modules with the two layers that Latte takes from timm. timm itself imports
    torchvision, whose wheels do not load beside a CPU-only torch.
    """
    layers = ModuleType("timm.models.vision_transformer")
    layers.Mlp, layers.PatchEmbed = _Mlp, _PatchEmbed  # type: ignore[attr-defined]
    names = ("timm", "timm.models")
    return {**{name: ModuleType(name) for name in names}, layers.__name__: layers}


class _Mlp(nn.Module):
    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        act_layer: Callable[[], nn.Module],
        drop: float,
    ) -> None:
        super().__init__()
        assert drop == 0
        self.fc1, self.act = nn.Linear(in_features, hidden_features), act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class _PatchEmbed(nn.Module):
    def __init__(self, side: int, patch: int, channels: int, width: int, bias: bool) -> None:
        super().__init__()
        self.patch_size, self.num_patches = (patch, patch), (side // patch) ** 2
        self.proj = nn.Conv2d(channels, width, patch, stride=patch, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.proj(x), "b d h w -> b (h w) d")
