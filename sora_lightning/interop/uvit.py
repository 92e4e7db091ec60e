"""U-ViT: weights of github.com/baofff/U-ViT, ``libs/uvit.py`` (label or no condition) and
``libs/uvit_t2i.py`` (77 text tokens).

Its networks for latents count steps 1 to 1000 up with the noise, as ``1000 t`` does here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import isqrt
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from sora_lightning.denoisers.uvit import UVIT_SIZES, LearnedExtent, UViT
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
from sora_lightning.layers.transformer import TransformerSize

_TEXT_TOKENS = 77  # configs/mscoco_uvit_small.py


@dataclass(frozen=True)
class _Shape:
    """Sizes that the rules depend on."""

    half: int
    condition: int
    side: int
    channels: int
    patch: int
    labels: bool
    smooth: bool


def to_ours(weights: Weights, num_heads: int | None = None) -> Pretrained:
    """Return a ``UViT``, and for labels their conditioner.

    ``num_heads`` is needed for a width that the paper does not have.
    """
    shape = _foreign_shape(weights)
    width = weights["pos_embed"].shape[-1]
    text = weights.get("context_embed.weight")
    mlp_ratio = weights["mid_block.mlp.fc1.weight"].shape[0] / width
    size = TransformerSize(
        2 * shape.half + 1,
        width,
        num_heads or published_heads(width, UVIT_SIZES.values()),
        mlp_ratio,
    )
    parts: dict[str, Any] = {
        "denoiser": describe(
            UViT,
            latent_channels=shape.channels,
            condition_width=width if text is None else text.shape[1],
            size=asdict(size),
            patch=[1, shape.patch, shape.patch],
            extent=asdict(
                LearnedExtent(condition=shape.condition, rows=shape.side, columns=shape.side)
            ),
            project_condition=text is not None,
            smooth=shape.smooth,
        )
    }
    if shape.labels:
        parts["conditioner"] = label_table(weights["label_emb.weight"])
    return Pretrained(parts, apply_rules(weights, _rules(shape), to_ours=True))


def to_theirs(pretrained: Pretrained) -> dict[str, Tensor]:
    """Return the weights under the reference's names. Raises ``ValueError`` for other models."""
    init_args = pretrained.init_args("denoiser")
    extent = init_args["extent"]
    frames, *patch = init_args["patch"]
    if frames != 1 or extent["frames"] != 1 or extent["rows"] != extent["columns"]:
        raise ValueError(f"patch {init_args['patch']}, {extent}: U-ViT has square images alone")
    shape = _Shape(
        half=init_args["size"]["depth"] // 2,
        condition=extent["condition"],
        side=extent["rows"],
        channels=init_args["latent_channels"],
        patch=patch[0],
        labels="conditioner" in pretrained.parts,
        smooth=init_args["smooth"],
    )
    return apply_rules(pretrained.weights, _rules(shape), to_ours=False)


def _foreign_shape(weights: Weights) -> _Shape:
    require_names(
        weights, ("pos_embed", "patch_embed.proj.weight", "mid_block.mlp.fc1.weight"), "U-ViT"
    )
    labels, text = "label_emb.weight" in weights, "context_embed.weight" in weights
    condition = _TEXT_TOKENS if text else int(labels)
    patches = weights["pos_embed"].shape[1] - condition - 1
    if patches < 1 or isqrt(patches) ** 2 != patches:
        raise ValueError(
            f"pos_embed has {patches} patches beside time and {condition} condition tokens: the "
            "reference's images are square"
        )
    _, channels, patch, _ = weights["patch_embed.proj.weight"].shape
    return _Shape(
        half=count(weights, "in_blocks.{}.norm1.weight"),
        condition=condition,
        side=isqrt(patches),
        channels=channels,
        patch=patch,
        labels=labels,
        smooth="final_layer.weight" in weights,
    )


def _rules(shape: _Shape) -> list[Rule]:
    patch = {"q": shape.patch, "r": shape.patch}
    rules = [
        Rule(
            ("patch_embed.proj.weight",),
            ("denoiser.x_in.weight",),
            lambda x: (rearrange(x, "d c q r -> d (q r c)"),),
            lambda x: (rearrange(x, "d (q r c) -> d c q r", **patch),),
        ),
        same("patch_embed.proj.bias", "denoiser.x_in.bias"),
        _positions(shape),
        *linear("norm", "denoiser.norm"),
        *linear("decoder_pred", "denoiser.out"),
        *_block("mid_block", "denoiser.middle.0"),
    ]
    for i in range(shape.half):
        rules += _block(f"in_blocks.{i}", f"denoiser.down.{i}")
        rules += _block(f"out_blocks.{i}", f"denoiser.up.{i}")
        rules += linear(f"out_blocks.{i}.skip_linear", f"denoiser.up.{i}.skip")
    if shape.smooth:
        rules += [
            Rule(
                ("final_layer.weight",),
                ("denoiser.smooth.weight",),
                lambda x: (rearrange(x, "o c h w -> o c 1 h w"),),
                lambda x: (rearrange(x, "o c 1 h w -> o c h w"),),
            ),
            same("final_layer.bias", "denoiser.smooth.bias"),
        ]
    if shape.labels:
        rules += label_rules("label_emb.weight")
    elif shape.condition:
        rules += linear("context_embed", "denoiser.condition_in")
    return rules


def _positions(shape: _Shape) -> Rule:
    """Return the rule for the table of positions, which is divided by kind of token.

    The reference has a label before time, and text after it. Here both precede time.
    """
    length, side = shape.condition, shape.side

    def to_ours(table: Tensor) -> tuple[Tensor, ...]:
        table = table[0]
        condition = table[:length] if shape.labels else table[1 : 1 + length]
        time = table[length : length + 1] if shape.labels else table[:1]
        return condition, time, rearrange(table[1 + length :], "(h w) d -> 1 h w d", h=side)

    def to_theirs(condition: Tensor, time: Tensor, patches: Tensor) -> tuple[Tensor, ...]:
        first = (condition, time) if shape.labels else (time, condition)
        return (torch.cat([*first, rearrange(patches, "1 h w d -> (h w) d")])[None],)

    ours = ("condition_position", "time_position", "positions.table")
    return Rule(("pos_embed",), tuple(f"denoiser.{name}" for name in ours), to_ours, to_theirs)


def _block(theirs: str, ours: str) -> list[Rule]:
    return [
        *linear(f"{theirs}.norm1", f"{ours}.norm_1"),
        *linear(f"{theirs}.attn.qkv", f"{ours}.qkv", bias=False),
        *linear(f"{theirs}.attn.proj", f"{ours}.out"),
        *linear(f"{theirs}.norm2", f"{ours}.norm_2"),
        *linear(f"{theirs}.mlp.fc1", f"{ours}.mlp.0"),
        *linear(f"{theirs}.mlp.fc2", f"{ours}.mlp.2"),
    ]
