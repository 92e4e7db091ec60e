"""DiT: weights of diffusers' ``DiTTransformer2DModel``, which repeats the time and label embeddings
in every block.

diffusers computes the frequencies of time as ``10000 ** -(k / 127)`` instead of ``10000 ** -(k /
128)`` (``downscale_freq_shift`` = 1 in its ``CombinedTimestepLabelEmbeddings``): the same file
gives a slightly different network there. This package computes those of the public code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sora_lightning.interop import dit
from sora_lightning.interop.labels import label_table
from sora_lightning.interop.pretrained import Pretrained
from sora_lightning.interop.renaming import (
    Rule,
    Weights,
    apply_rules,
    count,
    joined,
    linear,
    require_names,
)
from sora_lightning.layers.transformer import TransformerSize

_EMBEDDINGS = "transformer_blocks.{}.norm1.emb"


def to_ours(weights: Weights, num_heads: int | None = None) -> Pretrained:
    """Return a class-conditional ``DiT`` and its labels.

    Raises ``ValueError`` if the embeddings of two blocks differ, which files converted from the
    public weights do not show.
    """
    require_names(
        weights,
        ("pos_embed.proj.weight", "transformer_blocks.0.norm1.linear.weight"),
        "DiTTransformer2DModel",
    )
    width, channels, patch, _ = weights["pos_embed.proj.weight"].shape
    hidden = weights["transformer_blocks.0.ff.net.0.proj.weight"].shape[0]
    denoiser = dit.image_dit(
        latent_channels=channels,
        size=TransformerSize(
            depth=count(weights, "transformer_blocks.{}.norm1.linear.weight"),
            width=width,
            num_heads=num_heads or dit.heads(width),
            mlp_ratio=hidden / width,
        ),
        patch=patch,
        learned_sigma=weights["proj_out_2.bias"].numel() == 2 * channels * patch**2,
    )
    labels = weights[f"{_EMBEDDINGS.format(0)}.class_embedder.embedding_table.weight"]
    parts = {"denoiser": denoiser, "conditioner": label_table(labels)}
    return Pretrained(parts, apply_rules(weights, _rules(parts), to_ours=True))


def to_theirs(pretrained: Pretrained) -> dict[str, Tensor]:
    """Return the weights under the names of ``DiTTransformer2DModel``.

    Raises ``ValueError`` for a network that is not the class-conditional image DiT.
    """
    dit.check_public(pretrained.init_args("denoiser"), dit.STEPS_FROM_0)
    pretrained.init_args("conditioner")
    return apply_rules(pretrained.weights, _rules(pretrained.parts), to_ours=False)


def _rules(parts: dict[str, Any]) -> list[Rule]:
    init_args = parts["denoiser"]["init_args"]
    depth = init_args["size"]["depth"]
    rules = [
        *dit.patch_layer("pos_embed.proj", init_args["patch"][-1]),
        *_in_every_block("timestep_embedder.linear_1", "denoiser.time.hidden", depth),
        *_in_every_block("timestep_embedder.linear_2", "denoiser.time.out", depth),
        *_in_every_block(
            "class_embedder.embedding_table", "conditioner.embedding", depth, bias=False
        ),
        *linear("proj_out_1", "denoiser.final.modulation.linear"),
        *linear("proj_out_2", "denoiser.final.out"),
    ]
    for i in range(depth):
        theirs, ours = f"transformer_blocks.{i}", f"denoiser.blocks.{i}"
        rules += block_rules(theirs, ours)
        rules += linear(f"{theirs}.norm1.linear", f"{ours}.modulation.linear")
    return rules


def block_rules(theirs: str, ours: str) -> list[Rule]:
    """Return the rules for attention and feed-forward of diffusers' ``BasicTransformerBlock``."""
    return [
        *joined(tuple(f"{theirs}.attn1.to_{one}" for one in "qkv"), f"{ours}.attentions.0.qkv"),
        *linear(f"{theirs}.attn1.to_out.0", f"{ours}.attentions.0.out"),
        *linear(f"{theirs}.ff.net.0.proj", f"{ours}.mlp.0"),
        *linear(f"{theirs}.ff.net.2", f"{ours}.mlp.2"),
    ]


def _in_every_block(theirs: str, ours: str, depth: int, bias: bool = True) -> list[Rule]:
    def first(*copies: Tensor) -> tuple[Tensor]:
        if not all(torch.equal(copies[0], copy) for copy in copies[1:]):
            raise ValueError(f"{theirs} is not the same in every block")
        return (copies[0],)

    def copies(one: Tensor) -> tuple[Tensor, ...]:
        return tuple(one.clone() for _ in range(depth))

    names = [_EMBEDDINGS.format(i) for i in range(depth)]
    return [
        Rule(
            tuple(f"{name}.{theirs}.{part}" for name in names),
            (f"{ours}.{part}",),
            first,
            copies,
        )
        for part in ("weight", "bias")[: 1 + bias]
    ]
