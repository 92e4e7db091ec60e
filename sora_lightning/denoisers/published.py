"""The image DiT and Latte with all choices of their papers."""

from __future__ import annotations

from functools import partial

from sora_lightning.denoisers.blocks import AdaLNBlock, TimeEmbedding
from sora_lightning.denoisers.conditions import NoCondition, PooledOnly
from sora_lightning.denoisers.dit import DiT, DiTParts
from sora_lightning.layers.partitions import Alternating, Joint
from sora_lightning.layers.positions.absolute import SinusoidalPlane, SinusoidalTime


def image_dit(latent_channels: int, condition_width: int, size: str = "XL", patch: int = 2) -> DiT:
    """Return the class-conditional image DiT, with learned sigma, without rotary positions and
    query-key norm.

    The label's embedding is the pooled vector of the condition, of the network's width.
    """
    parts = DiTParts(
        block=partial(AdaLNBlock, qk_norm=None),
        condition=PooledOnly,
        positions=[SinusoidalPlane],
        rotary=None,
        time=partial(TimeEmbedding, offset=-1.0),
    )
    return DiT(
        latent_channels,
        condition_width,
        size=size,
        patch=(1, patch, patch),
        layout=Joint(),
        parts=parts,
        learned_sigma=True,
    )


def latte(latent_channels: int, condition_width: int, size: str = "XL", patch: int = 2) -> DiT:
    """Return the unconditional Latte (arXiv 2401.03048).

    The image DiT's blocks attend within frames and through time in turn. Temporal positions are
    added before the first temporal block.
    """
    parts = DiTParts(
        block=partial(AdaLNBlock, qk_norm=None),
        condition=NoCondition,
        positions=[SinusoidalPlane, SinusoidalTime],
        rotary=None,
        time=partial(TimeEmbedding, offset=-1.0),
    )
    return DiT(
        latent_channels,
        condition_width,
        size=size,
        patch=(1, patch, patch),
        layout=Alternating(),
        parts=parts,
        learned_sigma=True,
    )
