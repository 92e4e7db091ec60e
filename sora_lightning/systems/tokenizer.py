"""Trains a tokenizer to reconstruct its clips."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer

from sora_lightning.checkpoints import load_system, plain_hyperparameters
from sora_lightning.checks import require_at_least
from sora_lightning.data import VideoDataModule
from sora_lightning.systems.batches import data_spec, mean_loss, no_losses
from sora_lightning.systems.data_checks import check_packable
from sora_lightning.systems.draws import training_draws
from sora_lightning.systems.optimizers import OptimizerFactory, adamw, configure
from sora_lightning.tokenizers import Adversarial, ReconstructionLoss, Tiling, VideoTokenizer
from sora_lightning.tokenizers.adversarial import clip_grad_norm_per_module
from sora_lightning.tokenizers.posterior import DiagonalGaussian
from sora_lightning.types import (
    Draws,
    PackedBatch,
    PackedLatents,
    VideoBatch,
    dense_groups,
    from_groups,
)

# The standard error of a channel's mean over so many clips is 4 % of its standard deviation, if all
# positions of a clip agree.
STATISTICS_CLIPS = 512
# Encoded latents further from mean 0 and standard deviation 1 are warned of.
MAX_SHIFT, MAX_SCALE = 0.5, 1.5

Reconstruction = tuple[Float[Tensor, "b 3 F H W"], Float[Tensor, "b 3 F H W"], DiagonalGaussian]
"""What a group of clips decodes to, the clips, and the posterior of their latents."""


class TokenizerSystem(L.LightningModule):
    """Encode, sample the posterior, decode, compare. With ``adversarial``, a discriminator trains
    beside the tokenizer under the same optimizer.

    Each validation, of which the last step always has one, measures the latents' mean and
    covariance over 512 clips of the training manifest, or all, at the sizes that ``predict``
    encodes (``data.batching.predict_sizes``). Latents are normalised by them, channel by channel,
    or along their principal axes with ``whiten``. ``predict`` warns where they do not fit the clips
    that it encodes. ``tiling`` encodes by tiles, for them and in ``predict``, where frames are too
    large to be encoded whole.

    With ``decoder_noise`` only the decoder of a trained tokenizer, which ``load_tokenizer`` loads,
    trains: from the posterior's mean with noise of up to so many standard deviations of the
    normalised latents, a level for each clip. It then tolerates the errors of a diffusion model
    (noise-augmented decoding, arXiv 2510.11690). The latents do not change.
    """

    def __init__(
        self,
        tokenizer: VideoTokenizer,
        loss: ReconstructionLoss | None = None,
        optimizer: OptimizerFactory = adamw,
        warmup_steps: int = 100,
        whiten: bool = False,
        seed: int = 0,
        tiling: Tiling | None = None,
        adversarial: Adversarial | None = None,
        decoder_noise: float | None = None,
    ):
        super().__init__()
        require_at_least(0, warmup_steps=warmup_steps)
        self.save_hyperparameters()
        self.tokenizer = tokenizer
        if decoder_noise is not None:
            require_at_least(0, decoder_noise=decoder_noise)
            tokenizer.requires_grad_(False)
            for part in tokenizer.decoder_parts():
                part.requires_grad_(True)
        self.decoder_noise = decoder_noise
        self.loss = loss or ReconstructionLoss()
        if adversarial is not None and adversarial.adaptive:
            tokenizer.last_layer()  # where there is none, that is said now
        self.adversarial = adversarial
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.whiten = whiten
        self.seed = seed
        self.tiling = tiling
        if tiling is not None:
            tiling(tokenizer)  # sides that do not fit are refused before any work
        self._encoded: list[Float[Tensor, "3 c"]] = []

    @classmethod
    def from_checkpoint(cls, path: Path | str) -> TokenizerSystem:
        """Return the system with averaged weights, ready to encode. ``ValueError`` for a file that
        holds none.
        """
        return load_system(cls, path)

    def setup(self, stage: str) -> None:
        """Raise ``ValueError`` for a training without latent statistics, without trained parameters
        or of a decoder with an untrained encoder, and for packs that the tokenizer does not take.
        """
        if stage == "fit":
            plain_hyperparameters(self)  # what cannot be saved is refused before the first step
            self._check_trains()
            if self.decoder_noise is None and self.trainer.limit_val_batches == 0:
                raise ValueError(
                    "trainer.limit_val_batches = 0: a tokenizer measures the statistics of its "
                    "latents when it validates, so it must validate"
                )
        spec = data_spec(self)
        if stage != "fit" or spec is None:
            return
        if spec.packing is not None:
            check_packable(self.tokenizer, spec.packing, self.adversarial is not None)
        if not spec.validates:
            raise ValueError(
                "data.val_manifest is not set: a tokenizer measures the statistics of its latents "
                "when it validates; for lack of other clips, name the training clips"
            )
        if self.decoder_noise is None:
            self._statistics_clips()  # sizes that no clip fits are refused now

    def _check_trains(self) -> None:
        loaded = self.tokenizer.specification is not None
        if self.decoder_noise is not None and not loaded:
            raise ValueError(
                f"decoder_noise = {self.decoder_noise} trains the decoder alone: the tokenizer must"
                " be a trained one; its class_path is sora_lightning.checkpoints.load_tokenizer"
            )
        if not any(parameter.requires_grad for parameter in self.tokenizer.parameters()):
            raise ValueError(
                "nothing trains: the tokenizer is loaded and frozen, and decoder_noise, with which "
                "its decoder trains, is not set"
            )

    def on_train_batch_end(self, *_: Any) -> None:
        """Validate after the last step: the statistics must be those of the last weights."""
        trainer = self.trainer
        ends = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        if self.decoder_noise is None and (ends or trainer.global_step == trainer.max_steps):
            trainer.check_val_every_n_epoch = None
            trainer.should_stop = True

    def training_step(self, batch: VideoBatch | PackedBatch, batch_idx: int) -> Float[Tensor, ""]:
        if not len(batch):
            return mean_loss(self, batch, no_losses(self.parameters()))
        clips = self.reconstructions(batch, training_draws(self, batch, batch_idx, self.seed))
        losses, terms = zip(*(self.loss(*group) for group in clips), strict=True)
        loss = mean_loss(self, batch, torch.stack(losses))
        if isinstance(batch, PackedBatch):
            return loss
        ((reconstruction, video, _),), (terms,) = clips, terms
        if self.adversarial is not None:
            more, added = self.adversarial_losses(self.adversarial, loss, reconstruction, video)
            loss, terms = loss + more, terms | added
        self.log_dict({f"train/{name}": t for name, t in terms.items()}, batch_size=len(batch))
        return loss

    def reconstructions(self, batch: VideoBatch | PackedBatch, rng: Draws) -> list[Reconstruction]:
        """Encode, draw latents from the posterior or with ``decoder_noise``, decode: a batch as one
        group, each clip of a pack as one.
        """
        posteriors: list[DiagonalGaussian]
        means: Any
        if isinstance(batch, PackedBatch):
            videos = [video[None] for video in batch.pixels]
            posteriors = self.tokenizer.posterior_packed(batch.pixels)
            means = PackedLatents(tuple(posterior.mean[0] for posterior in posteriors))
        else:
            videos, posteriors = [batch.pixels], [self.tokenizer.posterior(batch.pixels)]
            means = posteriors[0].mean
        noise = dense_groups(rng.noise(means))
        if self.decoder_noise is None:
            drawn = [posterior.sample(e) for posterior, e in zip(posteriors, noise, strict=True)]
        else:
            stds = (self.decoder_noise * rng.uniform()).split([*map(len, noise)])
            rows = zip(dense_groups(means), noise, stds, strict=True)
            drawn = [noisy_latents(self.tokenizer, *row) for row in rows]
        if isinstance(batch, PackedBatch):
            decoded = [v[None] for v in self.tokenizer.decode_packed(from_groups(drawn, means))]
        else:
            decoded = [self.tokenizer.decode_raw(drawn[0])]
        return [*zip(decoded, videos, posteriors, strict=True)]

    def adversarial_losses(
        self,
        adversarial: Adversarial,
        loss: Float[Tensor, ""],
        reconstruction: Float[Tensor, "b 3 F H W"],
        video: Float[Tensor, "b 3 F H W"],
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Return the sum of both sides' losses, and their terms, at this optimizer step."""
        mean = partial(self.trainer.strategy.reduce, reduce_op="mean")
        last = self.tokenizer.last_layer() if adversarial.adaptive else None
        return adversarial(loss, reconstruction, video, last, self.global_step, mean)

    def validation_step(self, batch: VideoBatch, batch_idx: int) -> None:
        video = batch.pixels
        posterior = self.tokenizer.posterior(video)
        reconstruction = self.tokenizer.decode_raw(posterior.mean).clamp(-1, 1)
        loss, _ = self.loss(reconstruction, video, posterior)
        scores = {"val/loss": loss, "val/psnr": psnr(reconstruction, video).mean()}
        self.log_dict(scores, prog_bar=True, batch_size=len(batch), sync_dist=True)

    @property
    def _encoder(self) -> VideoTokenizer:
        return self.tokenizer if self.tiling is None else self.tiling(self.tokenizer)

    def on_validation_epoch_end(self) -> None:
        """Set the tokenizer's latent statistics, unless the latents stay as they are."""
        trainer = self.trainer
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if self.decoder_noise is not None or not fitting:
            return
        size = self.tokenizer.latent_channels + 1
        moments = torch.zeros(size, size, dtype=torch.float64, device=self.device)
        with trainer.precision_plugin.val_step_context():
            for batch in self._statistics_clips():
                batch = trainer.precision_plugin.convert_input(batch)
                pixels = trainer.strategy.batch_to_device(batch, self.device).pixels
                moments += latent_moments(self._encoder.posterior(pixels))
        moments = trainer.strategy.reduce(moments, reduce_op="sum")
        moments = moments / moments[0, 0]
        mean = moments[0, 1:]
        covariance = moments[1:, 1:] - mean[:, None] * mean[None]
        if bool((covariance.diagonal() > 0).all()):  # before training a channel may be silent
            self.tokenizer.set_latent_statistics(mean, covariance, self.whiten)

    def _statistics_clips(self) -> Any:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, VideoDataModule):
            return data.statistics_dataloader(STATISTICS_CLIPS)
        return self.trainer.val_dataloaders

    def predict_step(
        self, batch: VideoBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> Float[Tensor, "b c f h w"]:
        """Return normalised latents, for the latent cache."""
        latents = self._encoder.encode(batch.pixels)
        values = rearrange(latents.double(), "b c f h w -> c (b f h w)")
        count = values.new_full((len(values),), values.shape[1])
        self._encoded.append(torch.stack([count, values.sum(1), values.square().sum(1)]))
        return latents

    def on_predict_epoch_end(self) -> None:
        """Warn if the encoded latents are far from mean 0 and standard deviation 1."""
        if not self._encoded:
            return
        count, total, squares = torch.stack(self._encoded).sum(0)
        self._encoded.clear()
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        if bool((mean.abs() > MAX_SHIFT).any() or ((std.log()).abs() > math.log(MAX_SCALE)).any()):
            rank_zero_warn(
                f"the encoded latents have means from {mean.min():.2f} to {mean.max():.2f} and "
                f"standard deviations from {std.min():.2f} to {std.max():.2f}, not 0 and 1: the "
                "statistics in the checkpoint were measured on other clips or other lengths, or "
                "before the training ended: train the tokenizer with data.batching.predict_sizes = "
                "the sizes that predict encodes"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["hyper_parameters"] = plain_hyperparameters(self)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        if self.adversarial is None:
            return configure(self, self.optimizer, self.warmup_steps)
        apart = [self.adversarial.parameter_group()]
        return configure(self, self.optimizer, self.warmup_steps, self.tokenizer, apart)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of tokenizer and discriminator separately."""
        if gradient_clip_val:
            parts = [p for p in (self.tokenizer, self.adversarial) if p is not None]
            sides = [list(part.parameters()) for part in parts]
            clip_grad_norm_per_module(sides, gradient_clip_val, gradient_clip_algorithm)


def noisy_latents(
    tokenizer: VideoTokenizer,
    mean: Float[Tensor, "b c f h w"],
    noise: Float[Tensor, "b c f h w"],
    stds: Float[Tensor, " b"],
) -> Float[Tensor, "b c f h w"]:
    """Return unnormalised latents with noise of ``stds`` standard deviations of the normalised
    ones.
    """
    amount = rearrange(stds, "b -> b 1 1 1 1")
    return tokenizer.denormalise(tokenizer.normalise(mean) + amount * noise)


def psnr(
    reconstruction: Float[Tensor, "b 3 F H W"], video: Float[Tensor, "b 3 F H W"]
) -> Float[Tensor, " b"]:
    """Return the peak signal-to-noise ratio of each clip in dB, for pixels in [-1, 1]."""
    error = (reconstruction - video).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=1e-12))


def latent_moments(posterior: DiagonalGaussian) -> Float[Tensor, "c+1 c+1"]:
    """Return the sums of the expected products of (1, channels) over all positions, in float64.

    The matrix holds count, sums and second moments, and adds up over batches and ranks. The
    posterior's variance is included: by its mean alone, a channel with almost no information would
    be scaled up to the size of the others.
    """
    x, variance = (
        rearrange(part.double(), "b c f h w -> (b f h w) c")
        for part in (posterior.mean, posterior.log_variance.exp())
    )
    x = torch.cat([torch.ones_like(x[:, :1]), x], dim=1)
    return x.mT @ x + torch.diag(F.pad(variance.sum(0), (1, 0)))
