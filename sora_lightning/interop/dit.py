"""DiT: weights of github.com/facebookresearch/DiT, ``models.py``.

Its 1000 steps count up with the noise, as the house's ``1000 t`` does: step s is t = s / 1000.
"""

from __future__ import annotations

from functools import partial
from math import isqrt
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from sora_lightning.denoisers.blocks import AdaLNBlock
from sora_lightning.denoisers.conditions import PooledOnly
from sora_lightning.denoisers.dit import DiT
from sora_lightning.denoisers.sizes import SIZES
from sora_lightning.interop.labels import label_rules, label_table
from sora_lightning.interop.pretrained import Pretrained, describe
from sora_lightning.interop.renaming import Rule, Weights, apply_rules, count, linear, same
from sora_lightning.layers.packed_sequence import PackedSequence
from sora_lightning.layers.positions.absolute import PositionEmbedding, SinusoidalPlane
from sora_lightning.types import TokenGrid


def to_ours(weights: Weights, num_heads: int | None = None) -> Pretrained:
    """A class-conditional ``DiT`` and its labels. ``num_heads`` is needed for a width that the
    paper does not have.
    """
    parts = public_parts(weights, num_heads)
    side = isqrt(weights["pos_embed"].shape[1])
    grid = TokenGrid(1, side, side)
    return Pretrained(parts, apply_rules(weights, _rules(parts, grid), to_ours=True), grid)


def to_theirs(pretrained: Pretrained) -> dict[str, Tensor]:
    """The reference's names. Raises ``ValueError`` for a network that is not the class-conditional
    image DiT.
    """
    check_public(pretrained.init_args("denoiser"))
    rules = _rules(pretrained.parts, pretrained.known_grid())
    return apply_rules(pretrained.weights, rules, to_ours=False)


def public_parts(weights: Weights, num_heads: int | None) -> dict[str, Any]:
    """``DiT`` and ``LabelConditioner`` of the sizes that the reference's weights show."""
    for name in ("x_embedder.proj.weight", "blocks.0.mlp.fc1.weight", "pos_embed"):
        if name not in weights:
            raise ValueError(f"missing: {name}; these are not DiT's weights")
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    labels = weights.get("y_embedder.embedding_table.weight")
    denoiser = image_dit(
        latent_channels=channels,
        width=width,
        depth=count(weights, "blocks.{}.mlp.fc1.weight"),
        num_heads=num_heads or heads(width),
        mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / width,
        patch=patch,
        learned_sigma=weights["final_layer.linear.bias"].numel() == 2 * channels * patch**2,
    )
    parts = {"denoiser": denoiser}
    if labels is not None:
        parts["conditioner"] = label_table(labels)
    return parts


def heads(width: int) -> int:
    """The attention heads of the public model of this width."""
    for name in ("S", "B", "L", "XL"):
        if SIZES[name].width == width:
            return SIZES[name].num_heads
    raise ValueError(f"width {width} is none of the paper's: say num_heads")


def image_dit(latent_channels: int, width: int, patch: int, **init_args: Any) -> dict[str, Any]:
    """The public DiT as the house describes it: no query-key norm, no rotary positions, no text."""
    return describe(
        DiT,
        latent_channels=latent_channels,
        condition_width=width,
        width=width,
        patch=[1, patch, patch],
        parts={
            "block": describe(AdaLNBlock, qk_norm=None),
            "condition": describe(PooledOnly),
            "positions": [describe(SinusoidalPlane)],
            "rotary": None,
        },
        **init_args,
    )


def check_public(init_args: dict[str, Any], time_scale: float = 1000.0) -> None:
    """``ValueError`` for arguments of a ``DiT`` that the public one has no place for."""
    sizes = ("latent_channels", "width", "depth", "num_heads", "mlp_ratio", "learned_sigma")
    public = image_dit(
        patch=init_args["patch"][-1],
        time_scale=time_scale,
        **{name: init_args[name] for name in sizes if name in init_args},
    )["init_args"]
    given = {"time_scale": 1000.0, **init_args}
    for name in public.keys() | given.keys():
        if public.get(name) != given.get(name):
            raise ValueError(f"{name} = {given.get(name)}: the public network has none such")


def _rules(parts: dict[str, Any], grid: TokenGrid) -> list[Rule]:
    rules = network_rules(parts["denoiser"]["init_args"])
    rules.append(position_table("pos_embed", SinusoidalPlane, grid, parts))
    if "conditioner" in parts:
        rules += label_rules("y_embedder.embedding_table.weight")
    return rules


def network_rules(init_args: dict[str, Any]) -> list[Rule]:
    """What DiT, SiT and Latte name alike."""
    rules = [
        *patch_layer("x_embedder.proj", init_args["patch"][-1]),
        *linear("t_embedder.mlp.0", "denoiser.time.hidden"),
        *linear("t_embedder.mlp.2", "denoiser.time.out"),
        *linear("final_layer.adaLN_modulation.1", "denoiser.final.modulation.linear"),
        *linear("final_layer.linear", "denoiser.final.out"),
    ]
    for i in range(init_args["depth"]):
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
    """A convolution over patches, which the house keeps as a linear layer on their values."""
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
    """A fixed table that the house computes: checked on the way here, made on the way back."""
    width = parts["denoiser"]["init_args"]["width"]
    table = embedding(width)(PackedSequence([grid]))[None]

    def check(found: Tensor) -> tuple[Tensor, ...]:
        if found.shape != table.shape or not torch.allclose(found.float(), table, atol=1e-4):
            raise ValueError(f"{theirs} is not the fixed table of sines and cosines")
        return ()

    return Rule((theirs,), (), check, partial(_table, table))


def _table(table: Tensor) -> tuple[Tensor, ...]:
    return (table,)
