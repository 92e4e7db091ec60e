"""Optimizers, their parameter groups and the learning-rate schedule."""

from sora_lightning.systems.optimizers.maximal_update import MaximalUpdate
from sora_lightning.systems.optimizers.muon import MuonAdamW
from sora_lightning.systems.optimizers.parameters import (
    OptimizerFactory,
    adamw,
    parameter_groups,
)
from sora_lightning.systems.optimizers.schedule import configure, optimizer_of

__all__ = [
    "MaximalUpdate",
    "MuonAdamW",
    "OptimizerFactory",
    "adamw",
    "configure",
    "optimizer_of",
    "parameter_groups",
]
