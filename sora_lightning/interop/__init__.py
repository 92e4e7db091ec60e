"""Public checkpoints: their names, shapes and conventions turned into the house's, and back."""

from sora_lightning.interop.pretrained import Pretrained, converted_tokenizer

__all__ = ["Pretrained", "converted_tokenizer"]
