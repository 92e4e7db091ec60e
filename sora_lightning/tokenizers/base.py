"""The interface of tokenizers: video to normalised spacetime latents, and back."""

import json
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sora_lightning.configuration import KeepsArguments
from sora_lightning.layers.fingerprint import fingerprint
from sora_lightning.tokenizers.posterior import DiagonalGaussian
from sora_lightning.types import Compression, PackedLatents, VideoSize


class VideoTokenizer(KeepsArguments, nn.Module, ABC):
    """Maps pixels in [-1, 1] to latents of mean 0 and standard deviation 1 per channel, and back.

    Normalised channels lie along ``latent_axes``: the tokenizer's own channels, or the principal
    axes of its latents, along which they are uncorrelated.

    A subclass passes the two geometry attributes to ``__init__`` and defines ``posterior`` and
    ``decode_raw``. An image is a video of one frame: the first latent frame is one frame, each
    later one as many as are compressed. Mean, axes and standard deviations of the latents are
    buffers that ``set_latent_statistics`` fills; until then they are 0, the channels and 1.
    ``specification`` holds the ``class_path`` and ``init_args`` of a tokenizer that was loaded from
    a file; a system that trains on its latents saves it in its own checkpoint, beside the weights.
    ``supports_packing`` says whether clips of different sizes may share one sequence.

    A subclass whose frames never see later ones is a ``CausalTokenizer``; only those run piece by
    piece.
    """

    latent_mean: Tensor
    latent_axes: Tensor
    latent_std: Tensor
    specification: dict[str, Any] | None = None
    supports_packing: ClassVar[bool] = False

    def __init__(self, compression: Compression, latent_channels: int):
        super().__init__()
        self.compression = compression
        self.latent_channels = latent_channels
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_axes", torch.eye(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))

    @abstractmethod
    def posterior(self, video: Float[Tensor, "b 3 F H W"]) -> DiagonalGaussian:
        """Return the distribution over the unnormalised latents of a whole video."""

    @abstractmethod
    def decode_raw(self, latents: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b 3 F H W"]:
        """Return the pixels of a whole video from unnormalised latents, not clamped."""

    def posterior_packed(
        self, videos: Sequence[Float[Tensor, "3 _F _H _W"]]
    ) -> list[DiagonalGaussian]:
        """Return the posterior of each clip, as a batch of one.

        Clips of one size run together here. A tokenizer that packs clips overrides it.
        """
        posteriors: dict[int, DiagonalGaussian] = {}
        for indices in _by_shape(videos):
            together = self.posterior(torch.stack([videos[i] for i in indices]))
            rows = zip(together.mean.split(1), together.log_variance.split(1), strict=True)
            own = (DiagonalGaussian(mean, log_variance) for mean, log_variance in rows)
            posteriors.update(zip(indices, own, strict=True))
        return [posteriors[i] for i in range(len(videos))]

    def decode_packed(self, latents: PackedLatents) -> list[Float[Tensor, "3 _F _H _W"]]:
        """Return the pixels of each clip from unnormalised latents, not clamped."""
        videos: dict[int, Tensor] = {}
        for indices in _by_shape(latents.clips):
            together = self.decode_raw(torch.stack([latents.clips[i] for i in indices]))
            videos.update(zip(indices, together, strict=True))
        return [videos[i] for i in range(len(latents))]

    def encode(self, video: Float[Tensor, "b 3 F H W"]) -> Float[Tensor, "b c f h w"]:
        """Return the normalised means of the posterior.

        Raises ``ValueError`` if the size does not fit the compression.
        """
        self.compression.grid(VideoSize(*video.shape[2:]))
        return self.normalise(self.posterior(video).mean)

    def decode(self, latents: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b 3 F H W"]:
        """Return pixels in [-1, 1] from normalised latents."""
        return self.decode_raw(self.denormalise(latents)).clamp(-1, 1)

    def encode_packed(self, videos: Sequence[Float[Tensor, "3 _F _H _W"]]) -> PackedLatents:
        """Return the normalised means of each clip's posterior. Raises ``ValueError`` as
        ``encode``.
        """
        for video in videos:
            self.compression.grid(VideoSize(*video.shape[1:]))
        means = [posterior.mean for posterior in self.posterior_packed(videos)]
        return PackedLatents(tuple(self.normalise(mean)[0] for mean in means))

    def normalise(self, latents: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b c f h w"]:
        centred = latents - _per_channel(self.latent_mean)
        along_axes = torch.einsum("cd, b c f h w -> b d f h w", self.latent_axes, centred)
        return along_axes / _per_channel(self.latent_std)

    def denormalise(self, latents: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b c f h w"]:
        along_axes = latents * _per_channel(self.latent_std)
        centred = torch.einsum("cd, b d f h w -> b c f h w", self.latent_axes, along_axes)
        return centred + _per_channel(self.latent_mean)

    def set_latent_statistics(
        self, mean: Float[Tensor, " c"], covariance: Float[Tensor, "c c"], whiten: bool = False
    ) -> None:
        """Set the latents' mean and covariance over a data set.

        Each channel is normalised by its own standard deviation, or with ``whiten`` each principal
        axis. Channels are correlated if, for instance, each shows the background's brightness. The
        rest of the content is then in small differences between them, which diffusion's noise
        hides; whitening gives every axis the same variance. Raises ``ValueError`` for a channel or
        an axis of no variance.
        """
        if whiten:
            variance, axes = torch.linalg.eigh(covariance.double())
        else:
            variance = covariance.double().diagonal()
            axes = torch.eye(self.latent_channels, dtype=torch.float64, device=mean.device)
        dead = torch.nonzero(variance <= 1e-12 * variance.max().clamp(min=1e-30)).flatten()
        if len(dead):
            what = "principal axes" if whiten else "channels"
            raise ValueError(
                f"latent {what} {dead.tolist()} have standard deviation 0 over the data"
            )
        self.latent_mean.copy_(mean)
        self.latent_axes.copy_(axes)
        self.latent_std.copy_(variance.sqrt())

    def last_layer(self) -> Tensor:
        """Return the weight of the decoder's last layer, in which an adversarial loss compares
        gradients.

        Raises ``ValueError`` for a tokenizer that does not define it.
        """
        raise ValueError(
            f"{type(self).__name__} names no last layer: set `adaptive: false` in `adversarial`"
        )

    def decoder_parts(self) -> list[nn.Module]:
        """Return the modules that ``decode_raw`` runs and ``posterior`` does not.

        Raises ``ValueError`` for a tokenizer that does not define them.
        """
        raise ValueError(
            f"{type(self).__name__} names no decoder apart: leave `decoder_noise` out, with which "
            "the decoder trains alone"
        )

    def fingerprint(self) -> str:
        """Return the SHA-256 of class, geometry, weights and statistics: equal exactly if the
        latents are.
        """
        return fingerprint(self, json.dumps([str(self.compression), self.latent_channels]))


class CausalTokenizer(VideoTokenizer):
    """A tokenizer whose frames do not see later ones, and whose first frame sees no other.

    A video of any length passes it piece by piece in constant memory. Its first latent frames are
    those of the video that ends there. A subclass defines ``posterior_step`` and ``decode_step``; a
    whole video is one piece.
    """

    @abstractmethod
    def posterior_step(
        self, video: Float[Tensor, "b 3 F H W"], past: list[Any] | None
    ) -> tuple[DiagonalGaussian, list[Any]]:
        """Return the distribution over the unnormalised latents of one piece, and the state for the
        next.

        ``past`` is ``None`` for the first piece, of 1 + a multiple of the temporal compression
        frames; a later piece has a multiple of it.
        """

    @abstractmethod
    def decode_step(
        self, latents: Float[Tensor, "b c f h w"], past: list[Any] | None
    ) -> tuple[Float[Tensor, "b 3 F H W"], list[Any]]:
        """Return the pixels of one piece from unnormalised latents, not clamped, and the state for
        the next.
        """

    def posterior(self, video: Float[Tensor, "b 3 F H W"]) -> DiagonalGaussian:
        """See ``VideoTokenizer``."""
        return self.posterior_step(video, None)[0]

    def decode_raw(self, latents: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b 3 F H W"]:
        """See ``VideoTokenizer``."""
        return self.decode_step(latents, None)[0]

    def encode_pieces(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield normalised latents ``b c f h w`` of a video ``b 3 F H W`` of any length, piece by
        piece, in constant memory.

        Concatenated, they equal those of the whole video. The first piece has 1 + a multiple of the
        temporal compression frames, each later one a multiple of it; ``ValueError`` otherwise.
        """
        past: list[Any] | None = None
        for video in pieces:
            _, _, frames, height, width = video.shape
            whole = VideoSize(frames if past is None else frames + 1, height, width)
            self.compression.grid(whole)
            posterior, past = self.posterior_step(video, past)
            yield self.normalise(posterior.mean)

    def decode_pieces(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield pixels in [-1, 1] of normalised latents that come in pieces of any number of latent
        frames, in constant memory.

        Concatenated, they equal those of the whole video.
        """
        past: list[Any] | None = None
        for latents in pieces:
            video, past = self.decode_step(self.denormalise(latents), past)
            yield video.clamp(-1, 1)


def _by_shape(clips: Sequence[Tensor]) -> list[list[int]]:
    """Return the indices of the clips of each shape."""
    indices: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, clip in enumerate(clips):
        indices[tuple(clip.shape)].append(index)
    return list(indices.values())


def _per_channel(values: Tensor) -> Tensor:
    return values[:, None, None, None]
