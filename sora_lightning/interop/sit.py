"""SiT: weights of github.com/willisma/SiT, ``models.py``: DiT's network on the straight path.

SiT's time is 0 at noise and 1 at data, and its velocity points from noise to data. Both are
reversed in the weights, so the result is a plain ``DiT`` that predicts this package's velocity at
its time. The reversal is its own inverse.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from sora_lightning.denoisers.blocks import TimeEmbedding
from sora_lightning.interop import dit
from sora_lightning.interop.labels import label_rules
from sora_lightning.interop.pretrained import Pretrained, describe
from sora_lightning.interop.renaming import Rule, Weights, apply_rules
from sora_lightning.layers.positions.absolute import SinusoidalPlane
from sora_lightning.types import TokenGrid

_TIME = describe(TimeEmbedding, scale=1.0)
_UNUSED = "unused"  # the part that keeps what SiT's network gives and its forward throws away


def to_ours(weights: Weights, num_heads: int | None = None) -> Pretrained:
    """Return a class-conditional ``DiT`` of velocities and its labels.

    SiT's last layer has rows for a variance that it does not use. They are kept as the part
    ``unused``.
    """
    parts = dit.public_parts(weights, num_heads)
    init_args = parts["denoiser"]["init_args"]
    if init_args["learned_sigma"]:
        values = init_args["latent_channels"] * init_args["patch"][-1] ** 2
        unused = {"in_features": init_args["size"]["width"], "out_features": values}
        parts[_UNUSED] = describe(nn.Linear, **unused)
    init_args["learned_sigma"] = False
    init_args["parts"]["time"] = _TIME
    side = round(weights["pos_embed"].shape[1] ** 0.5)
    grid = TokenGrid(1, side, side)
    return Pretrained(parts, apply_rules(weights, _rules(parts, grid), to_ours=True), grid)


def to_theirs(pretrained: Pretrained) -> dict[str, Tensor]:
    """Return the weights under the reference's names. Raises ``ValueError`` for other networks."""
    init_args = pretrained.init_args("denoiser")
    dit.check_public(init_args, _TIME)
    if init_args["learned_sigma"]:
        raise ValueError("learned_sigma: SiT predicts a velocity alone")
    rules = _rules(pretrained.parts, pretrained.known_grid())
    return apply_rules(pretrained.weights, rules, to_ours=False)


def _rules(parts: dict[str, Any], grid: TokenGrid) -> list[Rule]:
    turned = {"t_embedder.mlp.0.weight", "final_layer.linear.weight", "final_layer.linear.bias"}
    init_args = parts["denoiser"]["init_args"]
    rules = [rule for rule in dit.network_rules(init_args) if rule.theirs[0] not in turned]
    rules += [
        Rule(
            ("t_embedder.mlp.0.weight",),
            ("denoiser.time.hidden.weight",),
            turn_time,
            turn_time,
        ),
        *(_last_layer(name, init_args, _UNUSED in parts) for name in ("weight", "bias")),
        dit.position_table("pos_embed", SinusoidalPlane, grid, parts),
    ]
    if "conditioner" in parts:
        rules += label_rules("y_embedder.embedding_table.weight")
    return rules


def turn_time(weight: Tensor) -> tuple[Tensor]:
    """Return a layer on the cosines and sines of ``f t`` from one on those of ``f (1 - t)``.

    ``cos f(1-t) = cos f cos ft + sin f sin ft`` and ``sin f(1-t) = sin f cos ft - cos f sin ft``:
    each pair of columns is reflected, exact up to rounding.
    """
    half = weight.shape[1] // 2
    frequency = 10_000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    cosine, sine = weight.double().chunk(2, dim=1)
    cos, sin = frequency.cos(), frequency.sin()
    turned = torch.cat([cosine * cos + sine * sin, cosine * sin - sine * cos], dim=1)
    return (turned.to(weight.dtype),)


def _last_layer(name: str, init_args: dict[str, Any], has_unused: bool) -> Rule:
    """Return the rule for the last layer: the velocity's rows negated, unused ones unchanged."""
    c, patch = init_args["latent_channels"], init_args["patch"][-1]
    rows = "(q r two c) ... -> two (q r c) ..."
    back = "two (q r c) ... -> (q r two c) ..."
    sizes = {"q": patch, "r": patch, "c": c}

    def to_ours(x: Tensor) -> tuple[Tensor, ...]:
        velocity, *unused = rearrange(x, rows, **sizes).unbind()
        return -velocity, *unused

    def to_theirs(velocity: Tensor, *unused: Tensor) -> tuple[Tensor, ...]:
        return (rearrange(torch.stack([-velocity, *unused]), back, **sizes),)

    ours = [f"denoiser.final.out.{name}", *([f"{_UNUSED}.{name}"] if has_unused else [])]
    return Rule((f"final_layer.linear.{name}",), tuple(ours), to_ours, to_theirs)
