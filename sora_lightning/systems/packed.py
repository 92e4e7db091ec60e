"""A training step on clips of different sizes that share one sequence (Patch n' Pack, arXiv
2307.06304).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import lightning as L
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from sora_lightning.data.batching.native_sizes import Packing
from sora_lightning.layers.patch import Patch
from sora_lightning.systems.draws import generator
from sora_lightning.tokenizers import VideoTokenizer
from sora_lightning.tokenizers.posterior import DiagonalGaussian
from sora_lightning.types import PackedBatch, PackedLatents


class ClipDraws:
    """Random numbers of each clip by (seed, clip, turn) alone: the same on whichever rank, in
    whichever pack the clip stands.
    """

    def __init__(self, batch: PackedBatch, seed: int, device: torch.device) -> None:
        places = zip(batch.clip_ids, batch.turns, strict=True)
        self._generators = [generator(device, seed, int(name, 16), turn) for name, turn in places]
        self.device = device

    def uniform(self) -> Float[Tensor, " b"]:
        """One draw from [0, 1) for each clip."""
        drawn = [torch.rand(1, generator=g, device=self.device) for g in self._generators]
        return torch.cat(drawn)

    def normal(self) -> Float[Tensor, " b"]:
        """One standard normal draw for each clip."""
        drawn = [torch.randn(1, generator=g, device=self.device) for g in self._generators]
        return torch.cat(drawn)

    def noise(self, latents: PackedLatents) -> PackedLatents:
        """Standard normal noise of the latents' shapes."""
        return latents.map(
            lambda x, g: torch.randn(x.shape, generator=g, device=self.device), self._generators
        )


@torch.no_grad()
def packed_latents(tokenizer: VideoTokenizer, batch: PackedBatch) -> PackedLatents:
    """The cached latents of a pack, or its pixels encoded now."""
    if batch.latents is not None:
        return PackedLatents(tuple(latents.float() for latents in batch.latents))
    assert batch.videos is not None
    return tokenizer.encode_packed(batch.videos)


def check_packable(tokenizer: VideoTokenizer, packing: Packing) -> None:
    """Raise ``ValueError`` unless the tokenizer trains on packs of this kind."""
    if not tokenizer.supports_packing:
        raise ValueError(
            f"data.packing is set: a {type(tokenizer).__name__} trains on batches of one size; "
            "give data.sizes, or take a ViViTTokenizer"
        )
    if packing.dropping is not None:
        raise ValueError(
            "data.packing.dropping is set: a tokenizer gives back every token of a clip: leave the "
            "key out"
        )


def packed_reconstructions(
    tokenizer: VideoTokenizer,
    batch: PackedBatch,
    draws: ClipDraws,
    decoder_noise: float | None = None,
) -> list[tuple[Float[Tensor, "1 3 F H W"], Float[Tensor, "1 3 F H W"], DiagonalGaussian]]:
    """Each clip of a pack as a batch of one: what its latents decode to, drawn from the posterior
    or with noise as ``noisy_latents`` puts on them, the clip itself, and the posterior.
    """
    if batch.videos is None:
        raise ValueError("data.latents serves latents, and pixels are needed: leave it out")
    posteriors = tokenizer.posterior_packed(batch.videos)
    means = PackedLatents(tuple(posterior.mean[0] for posterior in posteriors))
    noise = draws.noise(means).clips
    clips = list(zip(posteriors, noise, strict=True))
    if decoder_noise is None:
        drawn = [posterior.sample(e[None])[0] for posterior, e in clips]
    else:
        shares = decoder_noise * draws.uniform()
        drawn = [
            noisy_latents(tokenizer, posterior.mean, e[None], share[None])[0]
            for (posterior, e), share in zip(clips, shares, strict=True)
        ]
    decoded = tokenizer.decode_packed(PackedLatents(tuple(drawn)))
    return [
        (reconstruction[None], video[None], posterior)
        for reconstruction, video, posterior in zip(decoded, batch.videos, posteriors, strict=True)
    ]


def noisy_latents(
    tokenizer: VideoTokenizer,
    mean: Float[Tensor, "b c f h w"],
    noise: Float[Tensor, "b c f h w"],
    shares: Float[Tensor, " b"],
) -> Float[Tensor, "b c f h w"]:
    """Unnormalised latents with noise of so many standard deviations of the normalised ones."""
    amount = rearrange(shares, "b -> b 1 1 1 1")
    return tokenizer.denormalise(tokenizer.normalise(mean) + amount * noise)


def packed_step(
    system: L.LightningModule,
    batch: PackedBatch,
    clip_losses: Callable[[PackedBatch], Float[Tensor, " b"]],
) -> Float[Tensor, ""]:
    """The loss of a pack: a pack without clips costs nothing, and every clip of all ranks weighs
    the same.
    """
    losses = clip_losses(batch) if len(batch) else no_losses(system.parameters())
    loss = mean_over_ranks(system, losses)
    system.log("train/loss", loss, prog_bar=True, batch_size=max(1, len(batch)))
    system.log("data/waste", 1 - batch.fill, on_step=False, on_epoch=True, batch_size=1)
    return loss


def with_kept(latents: PackedLatents, batch: PackedBatch, patch: Patch) -> PackedLatents:
    """Latents of which those of the batch's kept tokens alone are shown."""
    if batch.kept is None:
        return latents
    shown = []
    for clip, tokens in zip(latents.clips, batch.kept, strict=True):
        grid = patch.grid(*clip.shape[1:])
        mask = torch.zeros(1, grid.num_tokens, patch.volume, device=clip.device)
        mask[:, tokens] = 1
        shown.append(patch.unpatchify(mask, grid)[0, 0] > 0)
    return PackedLatents(latents.clips, tuple(shown))


def mean_over_ranks(system: L.LightningModule, losses: Float[Tensor, " b"]) -> Float[Tensor, ""]:
    """The sum of this rank's losses over the mean number of clips on a rank.

    Ranks hold different numbers of clips. Their gradients are averaged afterwards, so that each
    clip of the step counts alike, on whichever rank.
    """
    strategy = system.trainer.strategy
    num_clips = strategy.reduce(losses.new_tensor(float(len(losses))), reduce_op="mean")
    return losses.sum() / num_clips.clamp(min=1 / system.trainer.world_size)


def no_losses(parameters: Iterable[Tensor]) -> Float[Tensor, "0"]:
    """The losses of no clips, whose sum still depends on every parameter: a rank without clips
    takes part in the exchange of gradients.
    """
    return torch.cat([p.flatten()[:0] for p in parameters if p.requires_grad])
