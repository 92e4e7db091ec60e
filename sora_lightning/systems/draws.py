"""Random numbers of training steps, as functions of their place: a resumed run draws them again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor

from sora_lightning.data.ranks import data_ranks
from sora_lightning.diffusion import add_offset_noise
from sora_lightning.types import Latents, PackedBatch, VideoBatch, dense_groups, from_groups


def make_rng(device: torch.device, *place: int | str) -> torch.Generator:
    """Return a generator on ``device`` that is seeded by a hash of ``place``."""
    digest = hashlib.sha256(repr(place).encode()).digest()
    seed = int.from_bytes(digest[:8], "little", signed=True)
    return torch.Generator(device).manual_seed(seed)


class GroupDraws:
    """Random numbers of a batch, from one generator for each of its dense groups of clips.

    They are float32 in every precision of the training.
    """

    def __init__(self, rngs: Sequence[torch.Generator], clips_per_group: int):
        self.rngs = rngs
        self.clips_per_group = clips_per_group

    @classmethod
    def of_clips(cls, batch: PackedBatch, seed: int, device: torch.device) -> GroupDraws:
        """Seed by clip and epoch: a clip draws the same on any rank and in any pack."""
        places = zip(batch.clip_ids, batch.repeats, strict=True)
        return cls([make_rng(device, seed, int(name, 16), epoch) for name, epoch in places], 1)

    def uniform(self, *shape: int) -> Float[Tensor, " b *shape"]:
        """Draw from [0, 1)."""
        shape = (self.clips_per_group, *shape)
        draws = [
            torch.rand(shape, generator=g, device=g.device, dtype=torch.float32) for g in self.rngs
        ]
        return torch.cat(draws)

    def normal(self) -> Float[Tensor, " b"]:
        """Draw one standard normal number for each clip."""
        return torch.cat(self._randn([torch.Size([self.clips_per_group])] * len(self.rngs)))

    def noise(self, like: Latents, offset: float = 0.0) -> Latents:
        """Draw standard normal noise, with ``offset`` of ``add_offset_noise`` on whole frames."""
        groups = dense_groups(like)
        noise = self._randn([x.shape for x in groups])
        if offset:
            shifts = self._randn([x[..., :1, :1].shape for x in groups])
            noise = [add_offset_noise(e, s, offset) for e, s in zip(noise, shifts, strict=True)]
        return from_groups(noise, like)

    def _randn(self, shapes: Sequence[torch.Size]) -> list[Tensor]:
        rows = zip(shapes, self.rngs, strict=True)
        return [
            torch.randn(shape, generator=g, device=g.device, dtype=torch.float32)
            for shape, g in rows
        ]


def training_draws(
    system: L.LightningModule, batch: VideoBatch | PackedBatch, batch_index: int, seed: int
) -> GroupDraws:
    """Return the random numbers of a training batch.

    A dense batch draws by optimizer step and its place among the step's batches of all ranks, which
    take turns; a pack draws by clip. Two ranks draw what one draws that accumulates two batches.
    """
    if isinstance(batch, PackedBatch):
        return GroupDraws.of_clips(batch, seed, system.device)
    micro_batch = batch_index % system.trainer.accumulate_grad_batches
    rng = batch_rng(system, seed, system.global_step, micro_batch)
    return GroupDraws([rng], len(batch))


def batch_rng(system: L.LightningModule, *place: int) -> torch.Generator:
    """Return a generator seeded by ``place``, which ends with the index of this rank's batch.

    Ranks take turns in what one rank would read, and its index in that counts.
    """
    rank, num_ranks = data_ranks(system.trainer)
    # The 0 keeps the numbers of trainings on one rank as they have always been.
    return make_rng(system.device, *place[:-1], place[-1] * num_ranks + rank, 0)
