"""Tokenizers: video to spacetime latents and back."""

from sora_lightning.tokenizers.base import CausalTokenizer, VideoTokenizer
from sora_lightning.tokenizers.conv import ConvTokenizer
from sora_lightning.tokenizers.load import load_tokenizer
from sora_lightning.tokenizers.losses import ReconstructionLoss
from sora_lightning.tokenizers.pretrained import pretrained_tokenizer
from sora_lightning.tokenizers.tiling import Tiling
from sora_lightning.tokenizers.vivit import ViViTTokenizer

__all__ = [
    "CausalTokenizer",
    "ConvTokenizer",
    "ReconstructionLoss",
    "Tiling",
    "ViViTTokenizer",
    "VideoTokenizer",
    "load_tokenizer",
    "pretrained_tokenizer",
]
