"""Conditioners: what the denoiser is told."""

from sora_lightning.conditioning.base import Conditioner
from sora_lightning.conditioning.labels import LabelConditioner
from sora_lightning.conditioning.text import TextConditioner, Unconditional

__all__ = ["Conditioner", "LabelConditioner", "TextConditioner", "Unconditional"]
