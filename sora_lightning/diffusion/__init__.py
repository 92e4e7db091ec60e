"""Diffusion: paths, objectives, samplers and guidance, mathematics only."""

from sora_lightning.diffusion.guidance import ClassifierFreeGuidance
from sora_lightning.diffusion.objectives import packed_rectified_flow_loss, rectified_flow_loss
from sora_lightning.diffusion.paths import LogitNormal
from sora_lightning.diffusion.samplers import Sampler, euler, heun, uniform_times

__all__ = [
    "ClassifierFreeGuidance",
    "LogitNormal",
    "Sampler",
    "euler",
    "heun",
    "packed_rectified_flow_loss",
    "rectified_flow_loss",
    "uniform_times",
]
