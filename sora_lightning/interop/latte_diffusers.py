"""Latte with text: weights of diffusers' ``LatteTransformer3DModel`` (Latte-1).

Its spatial and temporal blocks are the even and odd blocks of the alternating layout. The spatial
ones attend to the text. All share one modulation, with a table of offsets each (PixArt).
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor

from sora_lightning.denoisers.blocks import AdaLNBlock
from sora_lightning.denoisers.conditions import TextOnly
from sora_lightning.denoisers.dit import DiT
from sora_lightning.denoisers.modulation import AdaLNTable
from sora_lightning.interop import dit, latte
from sora_lightning.interop.dit_diffusers import block_rules
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
from sora_lightning.layers.partitions import Alternating
from sora_lightning.layers.positions.absolute import SinusoidalPlane, SinusoidalTime
from sora_lightning.layers.transformer import TransformerSize

_MARKS = ("caption_projection.linear_1.weight", "temporal_transformer_blocks.0.scale_shift_table")


def to_ours(weights: Weights, num_heads: int | None = None) -> Pretrained:
    """Return a ``DiT`` in the alternating layout. Its text tokens come from T5."""
    require_names(
        weights,
        (
            "caption_projection.linear_1.weight",
            "temporal_transformer_blocks.0.ff.net.2.bias",
        ),
        "LatteTransformer3DModel",
    )
    width, channels, patch, _ = weights["pos_embed.proj.weight"].shape
    denoiser = _denoiser(
        latent_channels=channels,
        condition_width=weights["caption_projection.linear_1.weight"].shape[1],
        size=asdict(
            TransformerSize(
                depth=2 * count(weights, "transformer_blocks.{}.scale_shift_table"),
                width=width,
                num_heads=num_heads or dit.heads(width),
                mlp_ratio=weights["transformer_blocks.0.ff.net.0.proj.bias"].numel() / width,
            )
        ),
        patch=[1, patch, patch],
        learned_sigma=weights["proj_out.bias"].numel() == 2 * channels * patch**2,
    )
    parts = {"denoiser": denoiser}
    return Pretrained(parts, apply_rules(weights, _rules(parts), to_ours=True))


def to_theirs(pretrained: Pretrained) -> dict[str, Tensor]:
    """Return the weights under the reference's names. Raises ``ValueError`` for other networks."""
    init_args = pretrained.init_args("denoiser")
    ours = _denoiser()["init_args"]
    latte.require_arguments(init_args, {name: ours[name] for name in ("layout", "parts")})
    return apply_rules(pretrained.weights, _rules(pretrained.parts), to_ours=False)


def _denoiser(**init_args: Any) -> dict[str, Any]:
    return describe(
        DiT,
        layout=describe(Alternating),
        parts={
            "block": describe(
                AdaLNBlock, modulation=describe(AdaLNTable), text_norm=None, qk_norm=None
            ),
            "condition": describe(TextOnly, text_every=2),
            "positions": [describe(SinusoidalPlane), describe(SinusoidalTime)],
            "rotary": None,
            "time": dit.STEPS_FROM_0,
        },
        **init_args,
    )


def _rules(parts: dict[str, Any]) -> list[Rule]:
    init_args = parts["denoiser"]["init_args"]
    rules = [
        *dit.patch_layer("pos_embed.proj", init_args["patch"][-1]),
        *linear("adaln_single.emb.timestep_embedder.linear_1", "denoiser.time.hidden"),
        *linear("adaln_single.emb.timestep_embedder.linear_2", "denoiser.time.out"),
        *linear("adaln_single.linear", "denoiser.shared"),
        *linear("caption_projection.linear_1", "denoiser.condition.hidden"),
        *linear("caption_projection.linear_2", "denoiser.condition.out"),
        same("scale_shift_table", "denoiser.final.modulation.table"),
        *linear("proj_out", "denoiser.final.out"),
    ]
    for i in range(init_args["size"]["depth"]):
        kind = "temporal_transformer_blocks" if i % 2 else "transformer_blocks"
        theirs, ours = f"{kind}.{i // 2}", f"denoiser.blocks.{i}"
        rules += block_rules(theirs, ours)
        rules.append(same(f"{theirs}.scale_shift_table", f"{ours}.modulation.table"))
        if i % 2 == 0:
            rules += linear(f"{theirs}.attn2.to_q", f"{ours}.text.q")
            rules += joined((f"{theirs}.attn2.to_k", f"{theirs}.attn2.to_v"), f"{ours}.text.kv")
            rules += linear(f"{theirs}.attn2.to_out.0", f"{ours}.text.out")
    return rules
