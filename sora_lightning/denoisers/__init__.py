"""Denoisers: the networks that diffusion trains."""

from sora_lightning.denoisers.base import Denoiser
from sora_lightning.denoisers.dit import DiT
from sora_lightning.denoisers.uvit import UViT

__all__ = ["Denoiser", "DiT", "UViT"]
