"""Denoisers: the networks that diffusion trains."""

from sora_lightning.denoisers.base import Denoiser
from sora_lightning.denoisers.caching import CachedDenoiser, FeatureCaching
from sora_lightning.denoisers.dit import DiT, DiTParts
from sora_lightning.denoisers.pretrained import pretrained_denoiser
from sora_lightning.denoisers.published import image_dit, latte
from sora_lightning.denoisers.sizes import SIZES
from sora_lightning.denoisers.uvit import UViT

__all__ = [
    "SIZES",
    "CachedDenoiser",
    "Denoiser",
    "DiT",
    "DiTParts",
    "FeatureCaching",
    "UViT",
    "image_dit",
    "latte",
    "pretrained_denoiser",
]
