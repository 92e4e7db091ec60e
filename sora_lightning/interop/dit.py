"""DiT: weights of github.com/facebookresearch/DiT, ``models.py``.

Its 1000 steps count up with the noise, from 0: step n is t = (n + 1) / 1000.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from math import isqrt
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from sora_lightning.denoisers.blocks import AdaLNBlock, TimeEmbedding
from sora_lightning.denoisers.conditions import PooledOnly
from sora_lightning.denoisers.dit import DiT
from sora_lightning.denoisers.sizes import SIZES
from sora_lightning.interop.labels import label_rules, label_table
from sora_lightning.interop.pretrained import Pretrained, describe
from sora_lightning.interop.renaming import (
    Rule,
    Weights,
    apply_rules,
    count,
    linear,
    published_heads,
    require_names,
    same,
)
from sora_lightning.layers.packed_sequence import PackedSequence
from sora_lightning.layers.positions.absolute import PositionEmbedding, SinusoidalPlane
from sora_lightning.layers.transformer import TransformerSize
from sora_lightning.types import TokenGrid

STEPS_FROM_0 = describe(TimeEmbedding, offset=-1.0)


def to_ours(weights: Weights, num_heads: int | None = None) -> Pretrained:
    """Return a class-conditional ``DiT`` and its labels.

    ``num_heads`` is needed for a width that the paper does not have.
    """
    parts = public_parts(weights, num_heads)
    side = isqrt(weights["pos_embed"].shape[1])
    grid = TokenGrid(1, side, side)
    return Pretrained(parts, apply_rules(weights, _rules(parts, grid), to_ours=True), grid)


def to_theirs(pretrained: Pretrained) -> dict[str, Tensor]:
    """Return the weights under the reference's names.

    Raises ``ValueError`` for a network that is not the class-conditional image DiT.
    """
    check_public(pretrained.init_args("denoiser"), STEPS_FROM_0)
    rules = _rules(pretrained.parts, pretrained.known_grid())
    return apply_rules(pretrained.weights, rules, to_ours=False)


def public_parts(weights: Weights, num_heads: int | None) -> dict[str, Any]:
    """Describe the ``DiT`` and ``LabelConditioner`` that the reference's weights fill."""
    require_names(
        weights, ("x_embedder.proj.weight", "blocks.0.mlp.fc1.weight", "pos_embed"), "DiT"
    )
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    labels = weights.get("y_embedder.embedding_table.weight")
    denoiser = image_dit(
        latent_channels=channels,
        size=TransformerSize(
            depth=count(weights, "blocks.{}.mlp.fc1.weight"),
            width=width,
            num_heads=num_heads or heads(width),
            mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / width,
        ),
        patch=patch,
        learned_sigma=weights["final_layer.linear.bias"].numel() == 2 * channels * patch**2,
    )
    parts = {"denoiser": denoiser}
    if labels is not None:
        parts["conditioner"] = label_table(labels)
    return parts


def heads(width: int) -> int:
    """Return the number of attention heads of the public model of this width."""
    return published_heads(width, [SIZES[name] for name in ("S", "B", "L", "XL")])


def image_dit(
    latent_channels: int, size: TransformerSize, patch: int, learned_sigma: bool
) -> dict[str, Any]:
    """Describe the public DiT: no query-key norm, no rotary positions, no text."""
    return describe(
        DiT,
        latent_channels=latent_channels,
        condition_width=size.width,
        size=asdict(size),
        patch=[1, patch, patch],
        parts={
            "block": describe(AdaLNBlock, qk_norm=None),
            "condition": describe(PooledOnly),
            "positions": [describe(SinusoidalPlane)],
            "rotary": None,
            "time": STEPS_FROM_0,
        },
        learned_sigma=learned_sigma,
    )


def check_public(init_args: dict[str, Any], time: dict[str, Any]) -> None:
    """Raise ``ValueError`` for arguments of a ``DiT`` that the public one, with this embedding of
    time, does not have.
    """
    public = image_dit(
        init_args["latent_channels"],
        TransformerSize(**init_args["size"]),
        init_args["patch"][-1],
        init_args["learned_sigma"],
    )["init_args"]
    public, given = (
        {**args, **{f"parts.{name}": part for name, part in args["parts"].items()}}
        for args in (public, init_args)
    )
    public["parts.time"] = time
    for name in (public.keys() | given.keys()) - {"parts"}:
        if public.get(name) != given.get(name):
            raise ValueError(f"{name} = {given.get(name)}: the public network has none such")


def _rules(parts: dict[str, Any], grid: TokenGrid) -> list[Rule]:
    rules = network_rules(parts["denoiser"]["init_args"])
    rules.append(position_table("pos_embed", SinusoidalPlane, grid, parts))
    if "conditioner" in parts:
        rules += label_rules("y_embedder.embedding_table.weight")
    return rules


def network_rules(init_args: dict[str, Any]) -> list[Rule]:
    """Return the rules for the names that DiT, SiT and Latte share."""
    rules = [
        *patch_layer("x_embedder.proj", init_args["patch"][-1]),
        *linear("t_embedder.mlp.0", "denoiser.time.hidden"),
        *linear("t_embedder.mlp.2", "denoiser.time.out"),
        *linear("final_layer.adaLN_modulation.1", "denoiser.final.modulation.linear"),
        *linear("final_layer.linear", "denoiser.final.out"),
    ]
    for i in range(init_args["size"]["depth"]):
        theirs, ours = f"blocks.{i}", f"denoiser.blocks.{i}"
        rules += [
            *linear(f"{theirs}.attn.qkv", f"{ours}.attentions.0.qkv"),
            *linear(f"{theirs}.attn.proj", f"{ours}.attentions.0.out"),
            *linear(f"{theirs}.mlp.fc1", f"{ours}.mlp.0"),
            *linear(f"{theirs}.mlp.fc2", f"{ours}.mlp.2"),
            *linear(f"{theirs}.adaLN_modulation.1", f"{ours}.modulation.linear"),
        ]
    return rules


def patch_layer(theirs: str, patch: int) -> list[Rule]:
    """Return the rules for a convolution over patches, here a linear layer on their values."""
    return [
        same(f"{theirs}.bias", "denoiser.x_in.bias"),
        Rule(
            (f"{theirs}.weight",),
            ("denoiser.x_in.weight",),
            lambda x: (rearrange(x, "d c q r -> d (q r c)"),),
            lambda x: (rearrange(x, "d (q r c) -> d c q r", q=patch, r=patch),),
        ),
    ]


def position_table(
    theirs: str, embedding: type[PositionEmbedding], grid: TokenGrid, parts: dict[str, Any]
) -> Rule:
    """Return the rule for a fixed table that is computed here: checked when read, made when
    written.
    """
    width = parts["denoiser"]["init_args"]["size"]["width"]
    table = embedding(width)(PackedSequence([grid]))[None]

    def check(found: Tensor) -> tuple[Tensor, ...]:
        atol = max(1e-4, torch.finfo(found.dtype).eps)
        if found.shape != table.shape or not torch.allclose(found.float(), table, atol=atol):
            raise ValueError(f"{theirs} is not the fixed table of sines and cosines")
        return ()

    return Rule((theirs,), (), check, partial(_table, table))


def _table(table: Tensor) -> tuple[Tensor, ...]:
    return (table,)
