"""Tokenizers: video to spacetime latents and back."""

from sora_lightning.tokenizers.adversarial import Adversarial
from sora_lightning.tokenizers.base import CausalTokenizer, VideoTokenizer
from sora_lightning.tokenizers.conv import ConvTokenizer
from sora_lightning.tokenizers.discriminator import PatchDiscriminator3d
from sora_lightning.tokenizers.losses import (
    L1,
    L2,
    Charbonnier,
    L1AndL2,
    Perceptual,
    PixelError,
    ReconstructionLoss,
    WithEdges,
)
from sora_lightning.tokenizers.perceptual import PerceptualDistance
from sora_lightning.tokenizers.pretrained import pretrained_tokenizer
from sora_lightning.tokenizers.tiling import Tiling
from sora_lightning.tokenizers.vivit import ViViTTokenizer

__all__ = [
    "L1",
    "L2",
    "Adversarial",
    "CausalTokenizer",
    "Charbonnier",
    "ConvTokenizer",
    "L1AndL2",
    "PatchDiscriminator3d",
    "Perceptual",
    "PerceptualDistance",
    "PixelError",
    "ReconstructionLoss",
    "Tiling",
    "ViViTTokenizer",
    "VideoTokenizer",
    "WithEdges",
    "pretrained_tokenizer",
]
