"""The learning-rate schedule of all systems, and their optimizers over it."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.optim import Optimizer

from sora_lightning.systems.optimizers.maximal_update import MaximalUpdate
from sora_lightning.systems.optimizers.parameters import OptimizerFactory, parameter_groups


def warmup_cosine(step: int, warmup_steps: int, total_steps: int, floor: float = 0.02) -> float:
    """Return the learning rate's factor: linear from 0 to 1, then half a cosine down to ``floor``
    at the end.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def optimizer_of(
    optimizer: OptimizerFactory | MaximalUpdate,
    trained: nn.Module,
    apart: Sequence[dict[str, Any]] = (),
) -> Optimizer:
    """Return the optimizer over what trains. Parameter groups in ``apart`` have settings of their
    own.
    """
    if isinstance(optimizer, MaximalUpdate):
        optimizer = optimizer.for_module(trained)
    return optimizer([*parameter_groups(trained), *apart])


def configure(
    system: L.LightningModule,
    optimizer: OptimizerFactory | MaximalUpdate,
    warmup_steps: int,
    trained: nn.Module | None = None,
    apart: Sequence[dict[str, Any]] = (),
) -> OptimizerLRSchedulerConfig:
    """Return the optimizer over what trains (by default all of the system) and its schedule."""
    built = optimizer_of(optimizer, system if trained is None else trained, apart)
    total_steps = int(system.trainer.estimated_stepping_batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        built, partial(warmup_cosine, warmup_steps=warmup_steps, total_steps=total_steps)
    )
    return {"optimizer": built, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
