"""Trains a tokenizer to give back its pixels."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from jaxtyping import Float
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from sora_lightning.systems.loading import load_system
from sora_lightning.systems.optimization import (
    OptimizerFactory,
    adamw,
    configure,
)
from sora_lightning.systems.seeding import step_generator
from sora_lightning.tokenizers import ReconstructionLoss, VideoTokenizer
from sora_lightning.types import VideoBatch


class TokenizerSystem(L.LightningModule):
    """Encode, draw from the posterior, decode, compare.

    Each validation also records the latents' mean and deviation over the validation clips in the
    tokenizer's buffers: those of a run's last checkpoint are the ones that its latents are
    normalised by.
    """

    def __init__(
        self,
        tokenizer: VideoTokenizer,
        loss: ReconstructionLoss | None = None,
        optimizer: OptimizerFactory = adamw,
        warmup_steps: int = 100,
        seed: int = 0,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.tokenizer = tokenizer
        self.loss = loss or ReconstructionLoss()
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.seed = seed
        self._moments: list[Float[Tensor, "3 c"]] = []

    @classmethod
    def from_checkpoint(cls, path: Path | str) -> TokenizerSystem:
        """The system with averaged weights, ready to encode. ``ValueError`` for a file that holds
        none.
        """
        return load_system(cls, path)

    def setup(self, stage: str) -> None:
        """Refuse a training that would end without latent statistics."""
        data = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and getattr(data, "packing", None) is not None:
            raise ValueError(
                "data.packing is set: a tokenizer trains on batches of one size; give data.sizes"
            )
        if stage == "fit" and getattr(data, "val_manifest", True) is None:
            raise ValueError(
                "data.val_manifest is not set: a tokenizer's latents are normalised by their "
                "statistics over the validation clips; for lack of others, name the training clips"
            )

    def training_step(self, batch: VideoBatch, batch_idx: int) -> Float[Tensor, ""]:
        video = batch.pixels
        generator = step_generator(self, self.seed, batch_idx)
        posterior = self.tokenizer.posterior(video)
        noise = torch.randn(posterior.mean.shape, generator=generator, device=self.device)
        reconstruction = self.tokenizer.decode_raw(posterior.sample(noise))
        loss, terms = self.loss(reconstruction, video, posterior)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        self.log_dict({f"train/{name}": t for name, t in terms.items()}, batch_size=len(batch))
        return loss

    def validation_step(self, batch: VideoBatch, batch_idx: int) -> None:
        video = batch.pixels
        posterior = self.tokenizer.posterior(video)
        reconstruction = self.tokenizer.decode_raw(posterior.mean).clamp(-1, 1)
        loss, _ = self.loss(reconstruction, video, posterior)
        scores = {"val/loss": loss, "val/psnr": psnr(reconstruction, video).mean()}
        self.log_dict(scores, prog_bar=True, batch_size=len(batch), sync_dist=True)
        self._moments.append(latent_moments(posterior.mean))

    def on_validation_epoch_end(self) -> None:
        none = torch.zeros(3, self.tokenizer.latent_channels, dtype=torch.float64)
        own = torch.stack([none.to(self.device), *self._moments]).sum(0)
        self._moments.clear()
        count, first, second = self.trainer.strategy.reduce(own, reduce_op="sum")
        mean = first / count
        std = (second / count - mean**2).clamp(min=0).sqrt()
        if bool((std > 0).all()):  # an encoder that has not trained yet may have silent channels
            self.tokenizer.set_latent_statistics(mean.float(), std.float())

    def predict_step(self, batch: VideoBatch, batch_idx: int) -> Float[Tensor, "b c f h w"]:
        """Normalised latents, for the latent cache."""
        return self.tokenizer.encode(batch.pixels)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configure(self, self.optimizer, self.warmup_steps)


def psnr(
    reconstruction: Float[Tensor, "b 3 F H W"], video: Float[Tensor, "b 3 F H W"]
) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio of each clip in dB; the range [-1, 1] makes the peak 2."""
    error = (reconstruction - video).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=1e-12))


def latent_moments(latents: Float[Tensor, "b c f h w"]) -> Float[Tensor, "3 c"]:
    """Count, sum and sum of squares of each channel, in float64: they add up over batches and
    ranks.
    """
    x = latents.double().transpose(0, 1).flatten(1)
    count = torch.full_like(x[:, 0], x.shape[1])
    return torch.stack([count, x.sum(1), x.square().sum(1)])
