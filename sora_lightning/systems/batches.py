"""Latents, pixels and losses of a batch: clips of one size, or packed clips that share one sequence
(Patch n' Pack, arXiv 2307.06304).
"""

from __future__ import annotations

from collections.abc import Iterable

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from sora_lightning.data import VideoDataModule
from sora_lightning.data.spec import DataSpec
from sora_lightning.layers.patch import Patch
from sora_lightning.tokenizers import VideoTokenizer
from sora_lightning.types import Latents, PackedBatch, PackedLatents, VideoBatch, dense_groups


def data_spec(system: L.LightningModule) -> DataSpec | None:
    """Return what the trainer's data module serves; ``None`` where there is no such module."""
    data = system.trainer.datamodule  # type: ignore[attr-defined]
    return data.spec if isinstance(data, VideoDataModule) else None


@torch.no_grad()
def batch_latents(
    tokenizer: VideoTokenizer, batch: VideoBatch | PackedBatch, patch: Patch
) -> Tensor | PackedLatents:
    """Return the cached latents of a batch or a pack, or its pixels encoded. Of a pack, only tokens
    that are kept are shown.
    """
    if isinstance(batch, VideoBatch):
        cached = batch.latents
        return tokenizer.encode(batch.pixels) if cached is None else cached.float()
    if batch.latents is not None:
        latents = PackedLatents(tuple(latents.float() for latents in batch.latents))
    else:
        latents = tokenizer.encode_packed(batch.pixels)
    if batch.kept is None:
        return latents
    shown = []
    for clip, tokens in zip(latents.clips, batch.kept, strict=True):
        grid = patch.grid(*clip.shape[1:])
        mask = torch.zeros(1, grid.num_tokens, patch.volume, device=clip.device)
        mask[:, tokens] = 1
        shown.append(patch.unpatchify(mask, grid)[0, 0] > 0)
    return PackedLatents(latents.clips, tuple(shown))


@torch.no_grad()
def batch_pixels(
    tokenizer: VideoTokenizer, batch: VideoBatch | PackedBatch, x_0: Latents
) -> list[Float[Tensor, "b 3 _F _H _W"]]:
    """Return a batch's pixels in [-1, 1], decoded from ``x_0`` where a cache serves latents alone;
    a pack's as a batch of one for each clip.
    """
    if batch.latents is not None:
        return [tokenizer.decode(latents) for latents in dense_groups(x_0)]
    if isinstance(batch, PackedBatch):
        return [video[None] for video in batch.pixels]
    return [batch.pixels]


def mean_loss(
    system: L.LightningModule, batch: VideoBatch | PackedBatch, losses: Float[Tensor, " b"]
) -> Float[Tensor, ""]:
    """Return and log a batch's loss: the mean over its clips, for packs over those of all ranks."""
    if isinstance(batch, PackedBatch):
        loss = mean_over_ranks(system, losses)
        system.log("data/waste", 1 - batch.fill, on_step=False, on_epoch=True, batch_size=1)
    else:
        loss = losses.mean()
    system.log("train/loss", loss, prog_bar=True, batch_size=max(1, len(batch)))
    return loss


def mean_over_ranks(system: L.LightningModule, losses: Float[Tensor, " b"]) -> Float[Tensor, ""]:
    """Return the sum of this rank's losses over the mean number of clips on a rank.

    Ranks hold different numbers of clips. Their gradients are averaged afterwards, so that each
    clip of the step counts alike, on whichever rank.
    """
    strategy = system.trainer.strategy
    num_clips = strategy.reduce(losses.new_tensor(float(len(losses))), reduce_op="mean")
    return losses.sum() / num_clips.clamp(min=1 / system.trainer.world_size)


def of_all_ranks(x: Shaped[Tensor, "b e"]) -> tuple[Shaped[Tensor, "all e"], slice]:
    """Return the rows of all ranks, and where those of this rank are.

    Every rank must call it, with any number of rows. In the backward pass the gradients of a row
    from all ranks are added, so that their later mean over ranks is that of the mean loss.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return x, slice(0, len(x))
    own = torch.tensor(len(x), device=x.device)
    counts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, own)
    num_rows = [int(count) for count in counts]
    # Tensors that are gathered must have one shape.
    parts = all_gather(F.pad(x, (0, 0, 0, max(num_rows) - len(x))))
    rows = torch.cat([part[:num] for part, num in zip(parts, num_rows, strict=True)])
    first = sum(num_rows[: dist.get_rank()])
    return rows, slice(first, first + len(x))


def blank_clip(channels: int, patch: Patch, device: torch.device) -> PackedBatch:
    """Return a pack of one clip of zeros, of one patch, for a rank without clips: where parameters
    are sharded, every rank takes part in every forward pass.
    """
    latents = torch.zeros(channels, patch.f, patch.h, patch.w, device=device)
    return PackedBatch([""], 1.0, ["0"], [0], fill=0.0, latents=[latents])


def no_losses(parameters: Iterable[Tensor]) -> Float[Tensor, "0"]:
    """Return the losses of no clips. Their sum depends on every parameter, so that a rank without
    clips takes part in the exchange of gradients.
    """
    return torch.cat([p.flatten()[:0] for p in parameters if p.requires_grad])
