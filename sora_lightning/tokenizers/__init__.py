"""Tokenizers: video to spacetime latents and back."""

from sora_lightning.tokenizers.base import VideoTokenizer
from sora_lightning.tokenizers.conv import ConvTokenizer
from sora_lightning.tokenizers.load import load_tokenizer
from sora_lightning.tokenizers.losses import ReconstructionLoss

__all__ = ["ConvTokenizer", "ReconstructionLoss", "VideoTokenizer", "load_tokenizer"]
