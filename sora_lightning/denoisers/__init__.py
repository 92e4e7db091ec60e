"""Denoisers: the networks that diffusion trains."""

from sora_lightning.denoisers.base import Denoiser
from sora_lightning.denoisers.dit import DiT, DiTParts
from sora_lightning.denoisers.sizes import SIZES, image_dit, latte, sized_dit

__all__ = ["SIZES", "Denoiser", "DiT", "DiTParts", "image_dit", "latte", "sized_dit"]
