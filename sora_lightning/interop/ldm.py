"""Latent diffusion's autoencoder: weights of CompVis' ``AutoencoderKL``, by themselves or as the
``first_stage_model`` of a whole Stable Diffusion.

A training's loss (``loss.``) and the rest of Stable Diffusion are ignored; every other weight must
match a rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sora_lightning.interop.pretrained import Pretrained, describe
from sora_lightning.interop.renaming import (
    Rule,
    Weights,
    apply_rules,
    count,
    joined,
    linear,
    require_names,
    same,
)
from sora_lightning.tokenizers.ldm import LDMTokenizer

_FIRST_STAGE = "first_stage_model."
_ASIDE = ("loss.", "model_ema.")
_STATISTICS = ("tokenizer.latent_mean", "tokenizer.latent_axes", "tokenizer.latent_std")


@dataclass(frozen=True)
class Names:
    """A family's names of the parts.

    ``{}`` is a level, then a block of it; ``{side}`` is encoder or decoder. ``up_from_coarse``
    counts the decoder's levels in the order in which they run.
    """

    down: str = "encoder.down.{}.block.{}"
    downsample: str = "encoder.down.{}.downsample.conv"
    up: str = "decoder.up.{}.block.{}"
    upsample: str = "decoder.up.{}.upsample.conv"
    up_from_coarse: bool = False
    middle: tuple[str, str, str] = ("{side}.mid.block_1", "{side}.mid.attn_1", "{side}.mid.block_2")
    attention: tuple[str, str, str, str, str] = ("norm", "q", "k", "v", "proj_out")
    attention_is_convolution: bool = True
    shortcut: str = "nin_shortcut"
    norm_out: str = "{side}.norm_out"


def to_ours(weights: Weights, num_heads: int | None = None) -> Pretrained:
    """Return an ``LDMTokenizer`` that normalises by Stable Diffusion's scaling factor.

    Raises ``ValueError`` for other weights.
    """
    if any(name.startswith(_FIRST_STAGE) for name in weights):
        weights = {
            name.removeprefix(_FIRST_STAGE): tensor
            for name, tensor in weights.items()
            if name.startswith(_FIRST_STAGE)
        }
    weights = {name: w for name, w in weights.items() if not name.startswith(_ASIDE)}
    return read(weights, Names(), "CompVis' AutoencoderKL")


def to_theirs(pretrained: Pretrained) -> dict[str, Tensor]:
    """Return the weights under the names of CompVis' ``AutoencoderKL``."""
    return write(pretrained, Names())


def read(weights: Weights, names: Names, owner: str) -> Pretrained:
    """Return an ``LDMTokenizer`` from weights under these names; errors name their ``owner``."""
    first, conv = names.down.format(0, 0), "encoder.conv_in.weight"
    require_names(weights, (conv, f"{first}.conv1.weight", "post_quant_conv.weight"), owner)
    channels = weights[conv].shape[0]
    depth = count(weights, names.down.format("{}", 0) + ".conv1.weight")
    widths = [weights[f"{names.down.format(i, 0)}.conv1.weight"].shape[0] for i in range(depth)]
    parts = {
        "tokenizer": describe(
            LDMTokenizer,
            latent_channels=weights["post_quant_conv.weight"].shape[0],
            channels=channels,
            multipliers=[width // channels for width in widths],
            blocks_per_level=count(weights, names.down.format(0, "{}") + ".conv1.weight"),
        )
    }
    return Pretrained(parts, apply_rules(weights, _rules(parts, names), to_ours=True))


def write(pretrained: Pretrained, names: Names) -> dict[str, Tensor]:
    """Return the inverse of ``read``, without the latents' statistics."""
    pretrained.init_args("tokenizer")
    return apply_rules(pretrained.weights, _rules(pretrained.parts, names), to_ours=False)


def _rules(parts: dict[str, Any], names: Names) -> list[Rule]:
    init_args = parts["tokenizer"]["init_args"]
    widths = [init_args["channels"] * m for m in init_args["multipliers"]]
    blocks = init_args["blocks_per_level"]
    rules = [
        *linear("quant_conv", "tokenizer.quant_conv"),
        *linear("post_quant_conv", "tokenizer.post_quant_conv"),
        _statistics(init_args["latent_channels"]),
    ]
    for side, layers in (
        ("encoder", _encoder(names, widths, blocks)),
        ("decoder", _decoder(names, widths, blocks + 1)),
    ):
        for index, (kind, theirs) in enumerate(layers):
            rules += _layer(kind, theirs, f"tokenizer.{side}.{index}", names)
    return rules


Layer = tuple[str, str]  # the kind of a layer of our sequence, and its name there


def _encoder(names: Names, widths: list[int], blocks: int) -> Iterator[Layer]:
    yield "layer", "encoder.conv_in"
    for level, width in enumerate(widths):
        fits = width == widths[max(level - 1, 0)]
        for block in range(blocks):
            kind = "block" if block or fits else "widening block"
            yield kind, names.down.format(level, block)
        if level < len(widths) - 1:
            yield "resampling", names.downsample.format(level)
    yield from _middle(names, "encoder")
    yield from _head(names, "encoder")


def _decoder(names: Names, widths: list[int], blocks: int) -> Iterator[Layer]:
    yield "layer", "decoder.conv_in"
    yield from _middle(names, "decoder")
    last = len(widths) - 1
    for level in range(last, -1, -1):
        fits = widths[level] == widths[min(level + 1, last)]
        number = last - level if names.up_from_coarse else level
        for block in range(blocks):
            kind = "block" if block or fits else "widening block"
            yield kind, names.up.format(number, block)
        if level:
            yield "resampling", names.upsample.format(number)
    yield from _head(names, "decoder")


def _middle(names: Names, side: str) -> Iterator[Layer]:
    before, attention, after = (name.format(side=side) for name in names.middle)
    yield "block", before
    yield "attention", attention
    yield "block", after


def _head(names: Names, side: str) -> Iterator[Layer]:
    yield "layer", names.norm_out.format(side=side)
    yield "activation", ""
    yield "layer", f"{side}.conv_out"


def _layer(kind: str, theirs: str, ours: str, names: Names) -> list[Rule]:
    if kind == "activation":
        return []
    if kind == "layer":
        return linear(theirs, ours)
    if kind == "resampling":
        return linear(theirs, f"{ours}.conv")
    if kind == "attention":
        return _attention(theirs, ours, names)
    rules = []
    for name, index in (("norm1", 0), ("conv1", 2), ("norm2", 3), ("conv2", 5)):
        rules += linear(f"{theirs}.{name}", f"{ours}.layers.{index}")
    if kind == "widening block":
        rules += linear(f"{theirs}.{names.shortcut}", f"{ours}.shortcut")
    return rules


def _attention(theirs: str, ours: str, names: Names) -> list[Rule]:
    norm, q, k, v, out = (f"{theirs}.{name}" for name in names.attention)

    def to_theirs(weight: Tensor) -> Tensor:
        return weight[..., None, None] if names.attention_is_convolution else weight

    return [
        *linear(norm, f"{ours}.norm"),
        Rule(
            tuple(f"{one}.weight" for one in (q, k, v)),
            (f"{ours}.attention.qkv.weight",),
            lambda *parts: (torch.cat([part.flatten(1) for part in parts]),),
            lambda whole: tuple(to_theirs(part) for part in whole.chunk(3)),
        ),
        joined((q, k, v), f"{ours}.attention.qkv")[1],
        Rule(
            (f"{out}.weight",),
            (f"{ours}.attention.out.weight",),
            lambda weight: (weight.flatten(1),),
            lambda weight: (to_theirs(weight),),
        ),
        same(f"{out}.bias", f"{ours}.attention.out.bias"),
    ]


def _statistics(latent_channels: int) -> Rule:
    """Return the published statistics of a new ``LDMTokenizer``, since foreign files hold none."""
    new = LDMTokenizer(latent_channels, channels=32, multipliers=(1,), blocks_per_level=1)
    return Rule(
        (),
        _STATISTICS,
        lambda: (new.latent_mean, new.latent_axes, new.latent_std),
        lambda *_: (),
    )
