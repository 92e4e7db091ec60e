"""Public checkpoints: their names, shapes and conventions converted to those of this package, and
back.
"""

from sora_lightning.interop.pretrained import Pretrained, converted_tokenizer

__all__ = ["Pretrained", "converted_tokenizer"]
