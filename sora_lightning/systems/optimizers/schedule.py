"""Parameter groups and the learning-rate schedule of all systems."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import AdamW, Optimizer

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]


def adamw(parameters: Iterable[Any]) -> Optimizer:
    """AdamW at 1e-4 without decay, as DiT trains; the default of systems."""
    return AdamW(parameters, lr=1e-4, weight_decay=0.0)


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Return the trainable parameters in two groups: weights of linear and convolutional layers
    (``is_matrix``), and all others.

    Only the first is decayed, and only the first may be orthogonalised. The others are gains,
    biases and tables, whose rows are vectors by themselves: embeddings, learned positions and
    tokens, relative biases, adaLN tables.
    """
    layers = (m for m in module.modules() if isinstance(m, nn.Linear | _ConvNd))
    weights = {id(layer.weight) for layer in layers}
    trainable = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trainable if id(p) in weights]
    others = [p for p in trainable if id(p) not in weights]
    return [
        {"params": matrices, "is_matrix": True},
        {"params": others, "is_matrix": False, "weight_decay": 0.0},
    ]


def warmup_cosine(step: int, warmup_steps: int, total_steps: int, floor: float = 0.02) -> float:
    """Return the learning rate's factor: linear from 0 to 1, then half a cosine down to ``floor``
    at the end.
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
    """Return the optimizer over what trains (by default all of the system) and its schedule.

    Parameter groups in ``apart`` have settings of their own.
    """
    built = optimizer([*parameter_groups(system if trained is None else trained), *apart])
    total_steps = int(system.trainer.estimated_stepping_batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        built, partial(warmup_cosine, warmup_steps=warmup_steps, total_steps=total_steps)
    )
    return {"optimizer": built, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
