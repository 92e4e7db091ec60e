"""Denoisers: the networks that diffusion trains."""

from sora_lightning.denoisers.base import Denoiser
from sora_lightning.denoisers.dit import DiT

__all__ = ["Denoiser", "DiT"]
