"""Parameters, FLOPs and attention of a training, by which arms are compared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sora_lightning.cli.training_cost import Training, num_parameters, step_flops, step_sizes
from sora_lightning.denoisers import DiT
from sora_lightning.layers.attention_distance import attended_share, average_attention_distance
from sora_lightning.layers.patch import Patch
from sora_lightning.systems import DiffusionSystem
from sora_lightning.types import TokenGrid, VideoSize


@dataclass(frozen=True)
class Cost:
    """Trained parameters and FLOPs of a training step; for a DiT also its attention.

    FLOPs are those of forward and backward passes over one batch on each device, without frozen
    parts, optimizer and text encoder; of batches of several sizes the mean. Packs are counted as if
    all clips were the largest. ``attention_distance`` and ``attended_share`` are those of
    ``layers.attention_distance`` on the first size.
    """

    parameters: int
    flops: float
    tokens: int
    attention_distance: float | None = None
    attended_share: float | None = None


def cost_of(training: Training) -> Cost:
    """Return parameters, FLOPs and attention of a training. Raises as ``step_flops``."""
    batches, system = step_sizes(training.data), training.system
    grids = [_token_grid(system, size) for size, _ in batches]
    tokens = sum(g.num_tokens * n for g, (_, n) in zip(grids, batches, strict=True))
    cost = Cost(num_parameters(training), step_flops(training), round(tokens / len(batches)))
    if not (isinstance(system, DiffusionSystem) and isinstance(system.denoiser, DiT)):
        return cost
    blocks: Any = system.denoiser.blocks
    schedule = [tuple(one.partition for one in block.attentions) for block in blocks]
    return replace(
        cost,
        attention_distance=average_attention_distance(schedule, grids[0]),
        attended_share=attended_share(schedule, grids[0]),
    )


def _token_grid(system: Any, size: VideoSize) -> TokenGrid:
    grid = system.tokenizer.compression.grid(size)
    patch = system.denoiser.patch if isinstance(system, DiffusionSystem) else Patch()
    return patch.grid(grid.f, grid.h, grid.w)
