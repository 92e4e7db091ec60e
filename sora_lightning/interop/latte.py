"""Latte: weights of github.com/Vchitect/Latte, ``models/latte.py``, with or without labels.

Blocks attend within frames and through time in turn, and temporal positions are added before the
first temporal block. Its 1000 steps count from 0, as DiT's do. Of a training's file the averaged
weights (``ema``) are read.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

from torch import Tensor

from sora_lightning.denoisers.conditions import NoCondition
from sora_lightning.interop import dit
from sora_lightning.interop.labels import label_rules
from sora_lightning.interop.pretrained import Pretrained, describe
from sora_lightning.interop.renaming import Rule, Weights, apply_rules, require_names
from sora_lightning.layers.partitions import Alternating
from sora_lightning.layers.positions.absolute import SinusoidalPlane, SinusoidalTime
from sora_lightning.types import TokenGrid


def to_ours(weights: Weights, num_heads: int | None = None) -> Pretrained:
    """Return a ``DiT`` in the alternating layout, and its labels if it has any."""
    parts = dit.public_parts(weights, num_heads)
    require_names(weights, ("temp_embed",), "Latte")
    init_args = parts["denoiser"]["init_args"]
    init_args |= _video(init_args, labels="conditioner" in parts)
    side = isqrt(weights["pos_embed"].shape[1])
    grid = TokenGrid(weights["temp_embed"].shape[1], side, side)
    return Pretrained(parts, apply_rules(weights, _rules(parts, grid), to_ours=True), grid)


def to_theirs(pretrained: Pretrained) -> dict[str, Tensor]:
    """Return the weights under the reference's names. Raises ``ValueError`` for other networks."""
    init_args = pretrained.init_args("denoiser")
    require_arguments(init_args, _video(init_args, "conditioner" in pretrained.parts))
    rules = _rules(pretrained.parts, pretrained.known_grid())
    return apply_rules(pretrained.weights, rules, to_ours=False)


def require_arguments(init_args: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ``ValueError`` for the first argument of a network that Latte does not have."""
    for name, value in wanted.items():
        if init_args.get(name) != value:
            raise ValueError(f"{name} = {init_args.get(name)}: Latte has no such network")


def _video(init_args: dict[str, Any], labels: bool) -> dict[str, Any]:
    """Return the arguments in which Latte differs from the image DiT."""
    parts = {
        **init_args["parts"],
        "positions": [describe(SinusoidalPlane), describe(SinusoidalTime)],
    }
    if not labels:
        parts["condition"] = describe(NoCondition)
    return {"layout": describe(Alternating), "parts": parts}


def _rules(parts: dict[str, Any], grid: TokenGrid) -> list[Rule]:
    frames, rows = TokenGrid(grid.f, 1, 1), TokenGrid(1, grid.h, grid.w)
    rules = [
        *dit.network_rules(parts["denoiser"]["init_args"]),
        dit.position_table("pos_embed", SinusoidalPlane, rows, parts),
        dit.position_table("temp_embed", SinusoidalTime, frames, parts),
    ]
    if "conditioner" in parts:
        rules += label_rules("y_embedder.embedding_table.weight")
    return rules
