"""Optimiser and learning-rate schedule, shared by all systems."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.optim import AdamW, Optimizer

from sora_lightning.layers.tables import HasTables

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]


def adamw(parameters: Iterable[Any]) -> Optimizer:
    """AdamW at 1e-4 without decay, as DiT trains; what a system takes when nothing is chosen."""
    return AdamW(parameters, lr=1e-4, weight_decay=0.0)


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Return what trains in two groups: matrices (``is_matrix``), and gains, biases and tables.

    Only the first is decayed, and only the first may be orthogonalised: a row of a table stands by
    itself. Tables are embeddings, learned positions and what else a module ``HasTables`` names.
    """
    tables: set[int] = set()
    for one in module.modules():
        if isinstance(one, nn.Embedding):
            tables.add(id(one.weight))
        elif isinstance(one, HasTables):
            tables.update(id(getattr(one, name)) for name in one.table_names)
    trainable = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.ndim >= 2 and id(p) not in tables]
    others = [p for p in trainable if p.ndim < 2 or id(p) in tables]
    return [
        {"params": matrices, "is_matrix": True},
        {"params": others, "is_matrix": False, "weight_decay": 0.0},
    ]


def warmup_cosine(step: int, warmup_steps: int, total_steps: int, floor: float = 0.02) -> float:
    """The learning rate's factor: a line from 0 up to 1, then half a cosine down to ``floor`` at
    the end.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def configure(
    system: L.LightningModule,
    optimizer: OptimizerFactory,
    warmup_steps: int,
    trained: nn.Module | None = None,
    apart: Sequence[dict[str, Any]] = (),
) -> OptimizerLRSchedulerConfig:
    """What ``configure_optimizers`` returns: the optimiser over what trains (by default all of the
    system), its rate set anew at each step. Groups ``apart`` have settings of their own.
    """
    built = optimizer([*parameter_groups(system if trained is None else trained), *apart])
    total_steps = int(system.trainer.estimated_stepping_batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        built, partial(warmup_cosine, warmup_steps=warmup_steps, total_steps=total_steps)
    )
    return {"optimizer": built, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
