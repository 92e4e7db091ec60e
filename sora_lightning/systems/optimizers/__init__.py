"""Optimizers, their parameter groups and the learning-rate schedule."""

from sora_lightning.systems.optimizers.muon import MuonAdamW
from sora_lightning.systems.optimizers.schedule import (
    OptimizerFactory,
    adamw,
    configure,
    parameter_groups,
)

__all__ = ["MuonAdamW", "OptimizerFactory", "adamw", "configure", "parameter_groups"]
