"""The sizes that denoisers come in, and the DiT and Latte of their papers whole."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from sora_lightning.denoisers.blocks import AdaLNBlock
from sora_lightning.denoisers.conditions import NoCondition, PooledOnly
from sora_lightning.denoisers.dit import DiT, DiTParts
from sora_lightning.layers.partitions import Alternating, AttentionLayout, Joint
from sora_lightning.layers.positions.absolute import SinusoidalPlane, SinusoidalTime
from sora_lightning.layers.transformer import TransformerSize

SIZES = {
    "tiny": TransformerSize(4, 128, 4),  # the demo's
    "S": TransformerSize(12, 384, 6),  # S to XL: DiT, arXiv 2212.09748, table 1
    "B": TransformerSize(12, 768, 12),
    "L": TransformerSize(24, 1024, 16),
    "XL": TransformerSize(28, 1152, 16),
    # 12 d^2 L = 3.31 B, as W.A.L.T's largest, arXiv 2312.06662
    "3B": TransformerSize(52, 2304, 18),
}


def named_size(name: str) -> TransformerSize:
    """The row of this name. ``ValueError`` names the rows there are."""
    if name not in SIZES:
        raise ValueError(f"size = {name!r}: the sizes are {', '.join(SIZES)}")
    return SIZES[name]


def sized_dit(
    latent_channels: int,
    condition_width: int,
    size: str = "S",
    patch: Sequence[int] = (1, 2, 2),
    layout: AttentionLayout | None = None,
    parts: DiTParts | None = None,
    learned_sigma: bool = False,
    self_conditioning: bool = False,
    activation_checkpointing: bool = False,
) -> DiT:
    """A ``DiT`` whose depth, width and heads are those of a row of ``SIZES``."""
    row = named_size(size)
    return DiT(
        latent_channels,
        condition_width,
        width=row.width,
        depth=row.depth,
        num_heads=row.num_heads,
        patch=patch,
        layout=layout,
        parts=parts,
        learned_sigma=learned_sigma,
        self_conditioning=self_conditioning,
        activation_checkpointing=activation_checkpointing,
    )


def image_dit(latent_channels: int, condition_width: int, size: str = "XL", patch: int = 2) -> DiT:
    """The class-conditional image DiT as published: no rotary positions, no query-key norm, learned
    sigma; the label's embedding is the pooled vector of the condition, of the network's width.
    """
    parts = DiTParts(
        block=partial(AdaLNBlock, qk_norm=None),
        condition=PooledOnly,
        positions=[SinusoidalPlane],
        rotary=None,
    )
    return sized_dit(
        latent_channels,
        condition_width,
        size=size,
        patch=(1, patch, patch),
        layout=Joint(),
        parts=parts,
        learned_sigma=True,
    )


def latte(latent_channels: int, condition_width: int, size: str = "XL", patch: int = 2) -> DiT:
    """The unconditional Latte as published (arXiv 2401.03048): the image DiT's blocks alternate
    between frames and time, with the temporal positions added before the first temporal block.
    """
    parts = DiTParts(
        block=partial(AdaLNBlock, qk_norm=None),
        condition=NoCondition,
        positions=[SinusoidalPlane, SinusoidalTime],
        rotary=None,
    )
    return sized_dit(
        latent_channels,
        condition_width,
        size=size,
        patch=(1, patch, patch),
        layout=Alternating(),
        parts=parts,
        learned_sigma=True,
    )
