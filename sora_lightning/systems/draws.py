"""Random numbers of a training step as a function of its place, so that a resumed run draws what it
would have.
"""

import hashlib

import lightning as L
import torch


def generator(device: torch.device, *place: int | str) -> torch.Generator:
    """A generator on ``device`` whose seed is a hash of ``place``."""
    digest = hashlib.sha256(repr(place).encode()).digest()
    seed = int.from_bytes(digest[:8], "little", signed=True)
    return torch.Generator(device).manual_seed(seed)


def step_generator(system: L.LightningModule, seed: int, batch_index: int) -> torch.Generator:
    """The generator of one batch of one rank: seeded by optimiser step, batch within it, and
    rank.
    """
    micro_batch = batch_index % system.trainer.accumulate_grad_batches
    return generator(system.device, seed, system.global_step, micro_batch, system.global_rank)
