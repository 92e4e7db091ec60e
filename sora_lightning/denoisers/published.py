"""The image DiT and Latte with all choices of their papers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from sora_lightning.denoisers.blocks import AdaLNBlock, TimeEmbedding
from sora_lightning.denoisers.conditions import ConditionInput, NoCondition, PooledOnly
from sora_lightning.denoisers.dit import DiT, DiTParts
from sora_lightning.layers.partitions import Alternating, Joint
from sora_lightning.layers.positions.absolute import (
    PositionEmbedding,
    SinusoidalPlane,
    SinusoidalTime,
)


def image_dit(latent_channels: int, condition_width: int, size: str = "XL", patch: int = 2) -> DiT:
    """Return the class-conditional image DiT, with learned sigma, without rotary positions and
    query-key norm.

    The label's embedding is the pooled vector of the condition, of the network's width.
    """
    parts = _parts(PooledOnly, [SinusoidalPlane])
    patches = (1, patch, patch)
    return DiT(latent_channels, condition_width, size, patches, Joint(), parts, learned_sigma=True)


def latte(latent_channels: int, condition_width: int, size: str = "XL", patch: int = 2) -> DiT:
    """Return the unconditional Latte (arXiv 2401.03048).

    The image DiT's blocks attend within frames and through time in turn. Temporal positions are
    added before the first temporal block.
    """
    parts = _parts(NoCondition, [SinusoidalPlane, SinusoidalTime])
    patches = (1, patch, patch)
    return DiT(
        latent_channels, condition_width, size, patches, Alternating(), parts, learned_sigma=True
    )


def _parts(
    condition: Callable[[int, int], ConditionInput],
    positions: Sequence[Callable[[int], PositionEmbedding]],
) -> DiTParts:
    return DiTParts(
        block=partial(AdaLNBlock, qk_norm=None),
        condition=condition,
        positions=positions,
        rotary=None,
        time=partial(TimeEmbedding, offset=-1.0),
    )
