"""ViViT: weights of transformers' ``VivitModel`` and ``VivitForVideoClassification`` (model 1).

Names of transformers 5 are read and written; names of earlier files are read.
"""

from __future__ import annotations

from dataclasses import asdict
from math import isqrt
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from sora_lightning.interop.pretrained import Pretrained, describe
from sora_lightning.interop.renaming import (
    Rule,
    Weights,
    apply_rules,
    count,
    joined,
    linear,
    published_heads,
    require_names,
    same,
)
from sora_lightning.layers.transformer import TransformerSize
from sora_lightning.tokenizers.vivit_encoder import VIT_SIZES, Tubelets, ViViT
from sora_lightning.types import TokenGrid

_BEFORE_5 = {
    "encoder.layer.": "layers.",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    ".output.dense": ".mlp.fc2",
}
_HEADS = {"pooler.dense": "pooler", "classifier": "classifier"}


def to_ours(weights: Weights, num_heads: int | None = None) -> Pretrained:
    """Return a ``ViViT`` encoder on square videos of any number of frames, and the linear layers
    after it that the file has: ``pooler`` (followed by a tanh there) and ``classifier``.
    """
    weights = {_new_name(name): tensor for name, tensor in weights.items()}
    require_names(
        weights,
        ("embeddings.patch_embeddings.projection.weight", "layers.0.mlp.fc1.weight"),
        "ViViT",
    )
    width, channels, *patch = weights["embeddings.patch_embeddings.projection.weight"].shape
    depth = count(weights, "layers.{}.layernorm_before.weight")
    hidden = weights["layers.0.mlp.fc1.weight"].shape[0]
    grid = _grid(weights["embeddings.position_embeddings"].shape[1] - 1)
    size = TransformerSize(
        depth, width, num_heads or published_heads(width, VIT_SIZES.values()), hidden / width
    )
    parts: dict[str, Any] = {
        "encoder": describe(
            ViViT,
            channels=channels,
            size=asdict(size),
            tubelets=asdict(Tubelets(patch[0], patch[1], patch[2], grid)),
        )
    }
    for theirs, ours in _HEADS.items():
        if f"{theirs}.weight" in weights:
            rows, columns = weights[f"{theirs}.weight"].shape
            parts[ours] = describe(nn.Linear, in_features=columns, out_features=rows)
    return Pretrained(parts, apply_rules(weights, _rules(parts), to_ours=True))


def to_theirs(pretrained: Pretrained) -> dict[str, Tensor]:
    """Return the weights under the names of ``VivitModel``, or of ``VivitForVideoClassification``
    if there is a classifier.
    """
    init_args = pretrained.init_args("encoder")
    if "layout" in init_args or not init_args.get("class_token", True):
        raise ValueError("the encoder is not model 1: VivitModel has joint attention and a class")
    weights = apply_rules(pretrained.weights, _rules(pretrained.parts), to_ours=False)
    if "classifier" not in pretrained.parts:
        return weights
    return {
        name if name.startswith("classifier.") else f"vivit.{name}": tensor
        for name, tensor in weights.items()
    }


def _new_name(name: str) -> str:
    name = name.removeprefix("vivit.")
    for old, new in _BEFORE_5.items():
        name = name.replace(old, new)
    return name


def _grid(num_tokens: int) -> TokenGrid:
    """Return the grid of this many tokens.

    Frames of the public models are 14 x 14 tokens; otherwise they are the largest squares that
    divide the number.
    """
    for side in (14, *range(isqrt(num_tokens), 0, -1)):
        if num_tokens % side**2 == 0:
            return TokenGrid(num_tokens // side**2, side, side)
    raise AssertionError("1 divides every number")


def _rules(parts: dict[str, Any]) -> list[Rule]:
    init_args = parts["encoder"]["init_args"]
    tubelets = init_args["tubelets"]
    grid = tubelets["grid"]
    p, q, r = tubelets["frames"], tubelets["rows"], tubelets["columns"]
    rules = [
        same("embeddings.patch_embeddings.projection.bias", "encoder.x_in.bias"),
        Rule(
            ("embeddings.patch_embeddings.projection.weight",),
            ("encoder.x_in.weight",),
            lambda x: (rearrange(x, "d c p q r -> d (p q r c)"),),
            lambda x: (rearrange(x, "d (p q r c) -> d c p q r", p=p, q=q, r=r),),
        ),
        Rule(
            ("embeddings.cls_token",),
            ("encoder.class_token.token",),
            lambda x: (x[0],),
            lambda x: (x[None],),
        ),
        Rule(
            ("embeddings.position_embeddings",),
            ("encoder.class_token.position", "encoder.positions.table"),
            lambda x: (
                x[0, :1],
                rearrange(x[0, 1:], "(f h w) d -> f h w d", f=grid["f"], h=grid["h"]),
            ),
            lambda one, table: (torch.cat([one, table.flatten(0, 2)])[None],),
        ),
        *linear("layernorm", "encoder.norm"),
    ]
    for i in range(init_args["size"]["depth"]):
        theirs, ours = f"layers.{i}", f"encoder.blocks.{i}"
        q_k_v = tuple(f"{theirs}.attention.{one}_proj" for one in "qkv")
        rules += [
            *joined(q_k_v, f"{ours}.attentions.0.qkv"),
            *linear(f"{theirs}.attention.o_proj", f"{ours}.attentions.0.out"),
            *linear(f"{theirs}.layernorm_before", f"{ours}.norms.0"),
            *linear(f"{theirs}.layernorm_after", f"{ours}.mlp_norm"),
            *linear(f"{theirs}.mlp.fc1", f"{ours}.mlp.0"),
            *linear(f"{theirs}.mlp.fc2", f"{ours}.mlp.2"),
        ]
    for head, part in _HEADS.items():
        if part in parts:
            rules += linear(head, part)
    return rules
