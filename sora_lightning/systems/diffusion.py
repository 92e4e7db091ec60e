"""Latent video diffusion: trains a denoiser on a tokenizer's latents, and generates videos."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer

from sora_lightning.checkpoints import load_system, plain_hyperparameters
from sora_lightning.checks import require_at_least, require_in
from sora_lightning.conditioning import (
    CachedText,
    Conditioner,
    KnownFrameConditioning,
    LatentSpace,
    TextConditioner,
    TimeZeroConditioning,
)
from sora_lightning.denoisers import Denoiser
from sora_lightning.denoisers.conditions import NoCondition
from sora_lightning.diffusion import (
    LogitNormal,
    Objective,
    SquaredError,
    TrainingTimes,
    with_own_estimate,
)
from sora_lightning.generation import SamplingConfig, VideoGenerator
from sora_lightning.systems.alignment import RepresentationAlignment
from sora_lightning.systems.batches import (
    batch_latents,
    batch_pixels,
    blank_clip,
    data_spec,
    mean_loss,
)
from sora_lightning.systems.data_checks import check_diffusion_data, warn_of_later_frames
from sora_lightning.systems.draws import GroupDraws, batch_rng, training_draws
from sora_lightning.systems.optimizers import MaximalUpdate, OptimizerFactory, adamw, configure
from sora_lightning.systems.parallel import clip_grad_norm, is_sharded, share_out
from sora_lightning.systems.time_bins import LossPerTime, fixed_draws
from sora_lightning.systems.weak_model import load_weak_model
from sora_lightning.tokenizers import VideoTokenizer
from sora_lightning.types import (
    Draws,
    PackedBatch,
    VideoBatch,
    VideoSize,
)


class DiffusionSystem(L.LightningModule):
    """Trains a denoiser of latents, conditioned on text, on a class or on nothing.

    Args:
        tokenizer: Frozen. Its weights and configuration are saved in the system's checkpoint, which
            therefore needs no other file.
        conditioner: ``TextConditioner``, ``LabelConditioner`` or ``Unconditional``.
        denoiser: A factory that is called with the tokenizer's latent channels and the
            conditioner's width; or a denoiser that was built with them.
        time: The distribution of training times.
        objective: The loss.
        known_frames: Which frames are known in training, and how the denoiser sees them; by default
            none are.
        alignment: A loss of the denoiser's inner tokens, which is added to the objective's in
            training.
        drop_condition: The share of clips that train without their caption, for classifier-free
            guidance.
        optimizer: A factory that is called with the parameter groups; ``MaximalUpdate`` scales its
            learning rate with the denoiser's width.
        warmup_steps: Steps in which the learning rate grows.
        fps: Frames per second that the training clips are read at.
        seed: Seed of the random numbers of training and validation.
    """

    def __init__(
        self,
        tokenizer: VideoTokenizer,
        conditioner: Conditioner,
        denoiser: Callable[[int, int], Denoiser],
        time: TrainingTimes | None = None,
        objective: Objective | None = None,
        known_frames: KnownFrameConditioning | None = None,
        alignment: RepresentationAlignment | None = None,
        drop_condition: float = 0.1,
        optimizer: OptimizerFactory | MaximalUpdate = adamw,
        warmup_steps: int = 100,
        fps: float = 8.0,
        seed: int = 0,
    ):
        super().__init__()
        require_in("[0, 1)", drop_condition=drop_condition)
        require_at_least(0, warmup_steps=warmup_steps)
        widths = tokenizer.latent_channels, conditioner.width
        built = denoiser if isinstance(denoiser, Denoiser) else denoiser(*widths)
        if isinstance(denoiser, Denoiser):
            denoiser = denoiser.factory(*widths)
        self.save_hyperparameters()
        self.tokenizer = tokenizer.requires_grad_(False)
        self.conditioner = conditioner
        self.denoiser = built
        known_frames = known_frames or TimeZeroConditioning()
        self.known_frames = known_frames.build(
            tokenizer.latent_channels, conditioner.width, drop_condition
        )
        self.alignment = None if alignment is None else alignment.build(self.denoiser)
        reads = self.denoiser.condition_input
        if reads is not None and self.known_frames.image_encoder is not None:
            reads.require_text()
        if isinstance(reads, NoCondition):
            conditioner.requires_grad_(False)  # it is not read; several ranks need every gradient
        self.time = time or LogitNormal()
        self.objective = objective or SquaredError()
        if self.denoiser.self_conditioning != (self.objective.self_conditioning > 0):
            raise ValueError(
                f"objective.self_conditioning = {self.objective.self_conditioning} and "
                f"denoiser.self_conditioning = {self.denoiser.self_conditioning}: set both, the "
                "share of clips and the network's channels, or neither"
            )
        self.drop_condition = drop_condition
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.fps = fps
        self.seed = seed
        self.loss_per_time = LossPerTime()
        self.training_sizes: tuple[VideoSize, ...] = ()

    @classmethod
    def from_checkpoint(cls, path: Path | str, use_ema: bool = True) -> DiffusionSystem:
        """Load a checkpoint, with averaged weights if ``use_ema``, frozen and in evaluation mode.

        Raises ``ValueError`` for a file that holds no such system.
        """
        return load_system(cls, path, use_ema)

    def setup(self, stage: str) -> None:
        """Check that the data fit the parts. Warn where known frames would see later ones."""
        if stage == "fit":
            plain_hyperparameters(self)  # what cannot be saved is refused before the first step
            warn_of_later_frames(self.known_frames, self.tokenizer)
        if (spec := data_spec(self)) is not None:
            check_diffusion_data(spec, self.tokenizer, self.denoiser, self.known_frames)
            if stage == "fit":
                self.training_sizes = spec.sizes

    def on_fit_start(self) -> None:
        """Check cached latents again: a checkpoint that is resumed brings its own tokenizer."""
        if (spec := data_spec(self)) is not None:
            check_diffusion_data(spec, self.tokenizer, self.denoiser, self.known_frames)

    def configure_model(self) -> None:
        """Shard the parts over the ranks of a ``ModelParallelStrategy``, before training."""
        if self.device_mesh is not None and not is_sharded(self):
            projector = None if self.alignment is None else self.alignment.projector
            encoder = self.known_frames.image_encoder
            trained = (self.conditioner, encoder, self.denoiser, projector)
            share_out(self.denoiser, trained, self.device_mesh)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if gradient_clip_val and is_sharded(self) and gradient_clip_algorithm != "value":
            clip_grad_norm(self.parameters(), float(gradient_clip_val))
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def training_step(self, batch: VideoBatch | PackedBatch, batch_idx: int) -> Float[Tensor, ""]:
        clips = batch
        if not len(batch):
            clips = blank_clip(self.tokenizer.latent_channels, self.denoiser.patch, self.device)
        losses = self.losses(clips, training_draws(self, clips, batch_idx, self.seed))
        return mean_loss(self, batch, losses[: len(batch)])

    def on_after_backward(self) -> None:
        if isinstance(self.conditioner, TextConditioner):  # DDP keeps the first rank's buffers
            self.conditioner.merge_seen()

    def losses(self, batch: VideoBatch | PackedBatch, rng: Draws) -> Float[Tensor, " b"]:
        """Return the loss of each clip at times and noise drawn by ``rng``."""
        uniforms = rng.uniform()
        x_0 = self.latents(batch)
        text = self.conditioner(batch.captions, uniforms < self.drop_condition)
        condition, known = self.known_frames(
            text, x_0, self.source(batch), uniforms, rng, self.latent_space
        )
        t = self.time(rng.normal(), uniforms.new_tensor(self.denoiser.num_tokens(x_0)))
        noise = rng.noise(x_0, self.objective.offset_noise)
        with self._observed_tokens() as tokens:
            losses = self.objective(self.network(rng), x_0, noise, t, condition, known)
        if self.alignment is None:
            return losses
        return losses + self.alignment(tokens[-1], batch_pixels(self.tokenizer, batch, x_0))

    def _observed_tokens(self) -> AbstractContextManager[list[Any]]:
        """Return the context in which the alignment observes the denoiser."""
        return nullcontext([]) if self.alignment is None else self.alignment.observe(self.denoiser)

    def network(self, rng: Draws | None = None) -> Callable[..., Any]:
        """Return the denoiser. With self-conditioning clips see their own estimate: in training the
        share that ``rng`` draws, without ``rng`` all, as in sampling.
        """
        share = self.objective.self_conditioning
        if not share:
            return self.denoiser
        chosen = None if rng is None else rng.uniform() < share
        return with_own_estimate(self.denoiser, self.objective.process, self.denoiser.patch, chosen)

    def validation_step(self, batch: VideoBatch, batch_idx: int) -> None:
        rng = GroupDraws([batch_rng(self, self.seed, batch_idx)], len(batch))
        x_0, text = self.latents(batch), self.conditioner(batch.captions)
        condition = self.known_frames.with_source(text, self.source(batch), self.latent_space)
        t = self.time(rng.normal(), x_0.new_tensor(self.denoiser.num_tokens(x_0)))
        noise = rng.noise(x_0, self.objective.offset_noise)
        log = partial(self.log, batch_size=len(batch), sync_dist=True)
        network = self.network()
        with self._observed_tokens() as tokens:
            losses = self.objective(network, x_0, noise, t, condition)
        log("val/loss", losses.mean(), prog_bar=True)
        if self.alignment is not None:
            alignment = self.alignment(tokens[-1], batch_pixels(self.tokenizer, batch, x_0))
            log("val/alignment", -alignment.mean())
        t, noise = fixed_draws(batch.clip_ids, x_0, self.seed)
        losses = self.objective(network, x_0, noise, t, condition)
        self.loss_per_time.update(t, losses)

    def predict_step(
        self, batch: VideoBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> Float[Tensor, "b c f h w"]:
        """Return normalised latents, for the latent cache. A ``CachedText`` keeps the captions'
        embeddings, too.
        """
        if isinstance(self.conditioner, CachedText):
            self.conditioner.keep(batch.captions)
        return self.tokenizer.encode(batch.pixels)

    def on_validation_epoch_end(self) -> None:
        for name, loss in self.loss_per_time.compute().items():
            self.log(f"val/loss_t/{name}", loss.float(), sync_dist=True)
        self.loss_per_time.reset()

    @property
    def latent_space(self) -> LatentSpace:
        codec = self.tokenizer.decode, self.tokenizer.encode
        return LatentSpace(self.objective.process, self.denoiser.patch, *codec)

    def source(self, batch: VideoBatch | PackedBatch) -> Float[Tensor, "b c f h w"] | None:
        """Return the latents of the source clips of edits; ``None`` if edits are not trained."""
        if not self.known_frames.needs_source:
            return None
        assert isinstance(batch, VideoBatch)
        assert batch.source is not None
        return self.latents(batch.source)

    def latents(self, batch: VideoBatch | PackedBatch) -> Any:
        """Return the latents of a batch or a pack, cached or encoded now."""
        return batch_latents(self.tokenizer, batch, self.denoiser.patch)

    @torch.no_grad()
    def generate(
        self,
        prompts: list[str],
        size: VideoSize | str,
        seeds: list[int],
        sampling: SamplingConfig = SamplingConfig(),
    ) -> Float[Tensor, "b 3 F H W"]:
        """Sample a video in [-1, 1] for each prompt and seed. A size may be text, say
        ``17x32x32``.
        """
        size = VideoSize.parse(size) if isinstance(size, str) else size
        return self.video_generator(sampling).videos(prompts, size, seeds)

    def video_generator(self, sampling: SamplingConfig = SamplingConfig()) -> VideoGenerator:
        """Return a sampler of this model. Loads the weak model of autoguidance."""
        tiling, weak_model = sampling.tiling, sampling.guidance.weak_model
        return VideoGenerator(
            self.tokenizer if tiling is None else tiling(self.tokenizer),
            self.conditioner,
            self.denoiser,
            process=self.objective.process,
            training_shift=self.time.sampling_shift,
            known_frames=self.known_frames,
            weak_model=None if weak_model is None else load_weak_model(self, weak_model),
            sampling=sampling,
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configure(self, self.optimizer, self.warmup_steps)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = tuple(map(VideoSize.parse, checkpoint.get("training_sizes", [])))
        self.training_sizes = self.training_sizes or saved

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["training_sizes"] = [str(size) for size in self.training_sizes]
        checkpoint["hyper_parameters"] = plain_hyperparameters(self)
