"""Systems: LightningModules that orchestrate and log; the equations live below them."""

from sora_lightning.systems.captioner import CaptionerSystem, RecaptioningSystem
from sora_lightning.systems.captioner_text import CaptionerText
from sora_lightning.systems.diffusion import DiffusionSystem
from sora_lightning.systems.pretrained import Pipeline, PretrainedSystem
from sora_lightning.systems.tokenizer import TokenizerSystem

__all__ = [
    "CaptionerSystem",
    "CaptionerText",
    "DiffusionSystem",
    "Pipeline",
    "PretrainedSystem",
    "RecaptioningSystem",
    "TokenizerSystem",
]
