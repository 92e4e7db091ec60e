"""What every tokenizer keeps to: video in, normalised spacetime latents out, and back."""

import hashlib
import json
from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sora_lightning.tokenizers.posterior import DiagonalGaussian
from sora_lightning.types import Compression, VideoSize


class VideoTokenizer(nn.Module, ABC):
    """Maps pixels in [-1, 1] to latents of mean 0 and standard deviation 1 per channel, and back.

    A child sets the two geometry attributes through ``__init__`` and defines ``posterior`` and
    ``decode_raw``. The latents' mean and deviation are buffers; ``set_latent_statistics`` fills
    them from data, and until then they are 0 and 1. ``specification`` is the ``class_path`` and
    ``init_args`` of a tokenizer that was loaded from a checkpoint; a system that trains on its
    latents keeps it in its own checkpoint, beside the weights.
    """

    latent_mean: Tensor
    latent_std: Tensor
    specification: dict[str, Any] | None = None

    def __init__(self, compression: Compression, latent_channels: int):
        super().__init__()
        self.compression = compression
        self.latent_channels = latent_channels
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))

    @abstractmethod
    def posterior(self, video: Float[Tensor, "b 3 F H W"]) -> DiagonalGaussian:
        """The distribution over unnormalised latents. The first frame must not depend on later
        ones.
        """

    @abstractmethod
    def decode_raw(self, latents: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b 3 F H W"]:
        """Pixels from unnormalised latents, not clamped."""

    def encode(self, video: Float[Tensor, "b 3 F H W"]) -> Float[Tensor, "b c f h w"]:
        """Normalised means of the posterior. ``ValueError`` where the size does not fit the
        compression.
        """
        self.compression.grid(VideoSize(*video.shape[2:]))
        return self.normalise(self.posterior(video).mean)

    def decode(self, latents: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b 3 F H W"]:
        """Pixels in [-1, 1] from normalised latents."""
        return self.decode_raw(self.denormalise(latents)).clamp(-1, 1)

    def normalise(self, latents: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b c f h w"]:
        return (latents - self._per_channel(self.latent_mean)) / self._per_channel(self.latent_std)

    def denormalise(self, latents: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b c f h w"]:
        return latents * self._per_channel(self.latent_std) + self._per_channel(self.latent_mean)

    def set_latent_statistics(self, mean: Float[Tensor, " c"], std: Float[Tensor, " c"]) -> None:
        """Record each channel's mean and deviation over a data set. ``ValueError`` for a channel
        without spread.
        """
        if not bool((std > 0).all()):
            dead = torch.nonzero(std <= 0).flatten().tolist()
            raise ValueError(f"latent channels {dead} have standard deviation 0 over the data")
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def fingerprint(self) -> str:
        """SHA-256 over class, geometry, weights and statistics: equal exactly where the latents are
        equal.
        """
        digest = hashlib.sha256(type(self).__qualname__.encode())
        digest.update(json.dumps([str(self.compression), self.latent_channels]).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            flat = tensor.detach().cpu().flatten().contiguous()
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @staticmethod
    def _per_channel(values: Tensor) -> Tensor:
        return values[:, None, None, None]
