"""Trains a denoiser on a tokenizer's latents under any conditioner, and generates videos with
it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from sora_lightning.checkpoints import load_system, put_specifications
from sora_lightning.conditioning import (
    NUM_DRAWS,
    Concatenation,
    Conditioner,
    FrameTask,
    PictureEncoder,
    Source,
    check_tasks,
    draw_known,
)
from sora_lightning.data.batching.native_sizes import check_geometry
from sora_lightning.denoisers import Denoiser
from sora_lightning.denoisers.conditions import ConditionInput
from sora_lightning.diffusion import (
    Known,
    LogitNormal,
    Objective,
    SquaredError,
    TrainingTimes,
    offset,
)
from sora_lightning.generation import SamplingConfig, VideoGenerator
from sora_lightning.systems.draws import generator, step_generator
from sora_lightning.systems.optimizers.schedule import (
    OptimizerFactory,
    adamw,
    configure,
)
from sora_lightning.systems.packed import ClipDraws, packed_latents, packed_step, with_kept
from sora_lightning.systems.time_bins import LossPerTime, fixed_draws
from sora_lightning.systems.weak_model import load_weak_model
from sora_lightning.tokenizers import CausalTokenizer, VideoTokenizer
from sora_lightning.types import Condition, PackedBatch, VideoBatch, VideoSize


class DiffusionSystem(L.LightningModule):
    """Latents, condition, loss. With ``TextConditioner`` it is text to video, with
    ``Unconditional`` neither.

    ``denoiser`` is a factory: the system calls it with the tokenizer's latent channels and the
    conditioner's width, the only places where these numbers stand. The tokenizer is frozen; its
    weights and configuration travel in this system's checkpoint, which therefore needs no other
    file. ``drop_condition`` is the share of captions that classifier-free guidance trains without.
    ``fps`` is what the training clips were read at. ``tasks`` are the masks of known frames to
    train on, one drawn for each clip by weight; without them nothing is ever known. The denoiser
    sees what is known at time 0, or with ``concatenation`` beside its input; then all of a clip is
    noisy and counts, and ``concatenation`` says what is dropped in place of ``drop_condition``.
    The task ``Source`` learns edits by instruction: its clips are told of their batch's ``source``.
    ``picture``, a factory as ``denoiser`` is, tells of a known first frame by tokens beside the
    text too; they are dropped with the channels.
    """

    def __init__(
        self,
        tokenizer: VideoTokenizer,
        conditioner: Conditioner,
        denoiser: Callable[[int, int], Denoiser],
        time: TrainingTimes | None = None,
        objective: Objective | None = None,
        tasks: list[FrameTask] | None = None,
        concatenation: Concatenation | None = None,
        drop_condition: float = 0.1,
        optimizer: OptimizerFactory = adamw,
        warmup_steps: int = 100,
        fps: float = 8.0,
        seed: int = 0,
        picture: Callable[[int, int], PictureEncoder] | None = None,
    ):
        super().__init__()
        if not 0 <= drop_condition < 1:
            raise ValueError(f"drop_condition = {drop_condition} must lie in [0, 1)")
        check_tasks(tasks or [])
        if concatenation is not None and not tasks:
            raise ValueError("concatenation is set and tasks are not: nothing would ever be known")
        if concatenation is None and any(isinstance(task, Source) for task in tasks or []):
            raise ValueError(
                "tasks has Source and concatenation is not set: a source is told by channels"
            )
        if picture is not None and concatenation is None:
            raise ValueError(
                "picture is set and concatenation is not: it says when a picture is dropped"
            )
        self.save_hyperparameters()
        self.tokenizer = tokenizer.requires_grad_(False)
        self.conditioner = conditioner
        self.denoiser = denoiser(tokenizer.latent_channels, conditioner.width)
        self.picture: PictureEncoder | None = None
        if picture is not None:
            _check_reads_tokens(self.denoiser)
            self.picture = picture(tokenizer.latent_channels, conditioner.width)
        self.time = time or LogitNormal()
        self.objective = objective or SquaredError()
        self.tasks = tasks or []
        self.concatenation = concatenation
        self.drop_condition = drop_condition
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.fps = fps
        self.seed = seed
        self.loss_per_time = LossPerTime()

    @classmethod
    def from_checkpoint(cls, path: Path | str, use_ema: bool = True) -> DiffusionSystem:
        """The system ready to generate, from this file alone. ``ValueError`` for a file that holds
        none.
        """
        return load_system(cls, path, use_ema)

    def setup(self, stage: str) -> None:
        """Refuse cached latents of another tokenizer than this system decodes with, and packs
        counted in other tokens than the denoiser's. Warn where known frames would know later ones.
        """
        if stage == "fit" and self.tasks and not isinstance(self.tokenizer, CausalTokenizer):
            rank_zero_warn(
                f"tasks are set, and a {type(self.tokenizer).__name__} lets a latent frame see "
                "later ones: in training, known frames tell of unknown ones, and in sampling, "
                "where they are encoded by themselves, they do not"
            )
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and self.has_sources and not getattr(data, "sources", False):
            raise ValueError(
                "model.init_args.tasks has Source and data.sources is not set: give data.sources = "
                "true, and manifests whose column source names what each clip is an edit of"
            )
        if (packing := getattr(data, "packing", None)) is not None:
            compression, patch = self.tokenizer.compression, self.denoiser.patch
            check_geometry(packing.compression, packing.patch, compression, patch)
            if self.concatenation is not None:
                raise ValueError(
                    "model.init_args.concatenation and data.packing are set: channels beside the "
                    "latents are for batches of one size: leave one of them out"
                )
            if packing.dropping is not None and not self.denoiser.drops_tokens:
                raise ValueError(
                    f"data.packing.dropping is set: a {type(self.denoiser).__name__} cannot do "
                    "without some of a clip's tokens: leave the key out"
                )
        served = getattr(data, "tokenizer_fingerprint", None)
        if served is not None and served != (own := self.tokenizer.fingerprint()):
            raise ValueError(
                f"data.latents = {getattr(data, 'latents', None)} were made by the tokenizer "
                f"{served[:12]}, and this system's is {own[:12]}: encode the clips again with "
                "`sora-lightning predict`"
            )

    def training_step(self, batch: VideoBatch | PackedBatch, batch_idx: int) -> Float[Tensor, ""]:
        if isinstance(batch, PackedBatch):
            return packed_step(self, batch, self.packed_losses)
        draw = step_generator(self, self.seed, batch_idx)
        numbers = torch.rand(len(batch), generator=draw, device=self.device)
        x_0 = self.latents(batch)
        if self.concatenation is None:
            condition = self.conditioner(batch.captions, numbers < self.drop_condition)
            loss = self.loss(x_0, condition, draw, self.drawn_known(x_0, draw))
        else:
            source = self.source(batch)
            condition = self.told(self.concatenation, batch.captions, numbers, x_0, draw, source)
            loss = self.loss(x_0, condition, draw)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def packed_losses(self, batch: PackedBatch) -> Float[Tensor, " b"]:
        """The loss of each clip, at a time and noise that its seed and turn draw."""
        draws = ClipDraws(batch, self.seed, self.device)
        condition = self.conditioner(batch.captions, draws.uniform() < self.drop_condition)
        normal = draws.normal()
        x_0 = with_kept(packed_latents(self.tokenizer, batch), batch, self.denoiser.patch)
        t = self.time(normal, torch.tensor(self.denoiser.num_tokens(x_0), device=normal.device))
        noise, known = draws.noise(x_0), None
        if strength := self.objective.offset_noise:
            shifts = draws.noise(x_0.map(lambda x: x[:, :, :1, :1])).clips
            noise = noise.map(lambda e, shift: offset(e, shift, strength), shifts)
        if self.tasks:
            numbers = torch.stack([draws.uniform() for _ in range(NUM_DRAWS)], dim=1)
            known = [self.known(x[None], n[None]) for x, n in zip(x_0.clips, numbers, strict=True)]
        return self.objective.packed(self.denoiser, x_0, noise, t, condition, known)

    def validation_step(self, batch: VideoBatch, batch_idx: int) -> None:
        draw = generator(self.device, self.seed, batch_idx, self.global_rank)
        x_0, condition = self.latents(batch), self.conditioner(batch.captions)
        if (source := self.source(batch)) is not None:
            assert self.concatenation is not None
            whole = torch.ones_like(source[:, :1], dtype=torch.bool)
            condition = self.with_known(condition, source, whole, self.concatenation)
        loss = self.loss(x_0, condition, draw)
        self.log("val/loss", loss, prog_bar=True, batch_size=len(batch), sync_dist=True)
        t, noise = fixed_draws(batch.clip_ids, x_0, self.seed)
        losses = self.objective(self.denoiser, x_0, noise, t, condition)
        self.loss_per_time.update(t, losses)

    def on_validation_epoch_end(self) -> None:
        for name, loss in self.loss_per_time.compute().items():
            self.log(f"val/loss_t/{name}", loss.float(), sync_dist=True)
        self.loss_per_time.reset()

    def loss(
        self,
        x_0: Float[Tensor, "b c f h w"],
        condition: Condition,
        draw: torch.Generator,
        known: Known | None = None,
    ) -> Float[Tensor, ""]:
        """The objective at times and noise drawn from a generator, mean over the clips."""
        num_tokens = self.denoiser.patch.grid(*x_0.shape[2:]).num_tokens
        t = self.time(torch.randn(len(x_0), generator=draw, device=x_0.device), num_tokens)
        noise = torch.randn(x_0.shape, generator=draw, device=x_0.device)
        if self.objective.offset_noise:
            shift = torch.randn((*x_0.shape[:3], 1, 1), generator=draw, device=x_0.device)
            noise = offset(noise, shift, self.objective.offset_noise)
        return self.objective(self.denoiser, x_0, noise, t, condition, known).mean()

    def drawn_known(self, x_0: Float[Tensor, "b c f h w"], draw: torch.Generator) -> Known | None:
        """The known tokens of each clip by the task that it draws; ``None`` without tasks."""
        if not self.tasks:
            return None
        numbers = torch.rand(len(x_0), NUM_DRAWS, generator=draw, device=x_0.device)
        return self.known(x_0, numbers)

    def told(
        self,
        concatenation: Concatenation,
        captions: list[str],
        numbers: Float[Tensor, " b"],
        x_0: Float[Tensor, "b c f h w"],
        draw: torch.Generator,
        source: Float[Tensor, "b c f h w"] | None = None,
    ) -> Condition:
        """Captions, and known frames as channels; either is left out by a clip's number. Noise on
        the frames is not that of the loss. A clip of which all is known is told of its ``source``.
        """
        no_text, no_frames = concatenation.drops(numbers)
        known = self.drawn_known(x_0, draw)
        assert known is not None
        if source is not None:
            of_source = rearrange(known.mask.flatten(1).all(1), "b -> b 1 1 1 1")
            x_0 = torch.where(of_source, source, x_0)
        noise = torch.randn(x_0.shape, generator=draw, device=x_0.device)
        seen = self.objective.process.path.perturb(x_0, noise, known.t)
        mask = known.mask & ~rearrange(no_frames, "b -> b 1 1 1 1")
        return self.with_known(self.conditioner(captions, no_text), seen, mask, concatenation)

    def with_known(
        self,
        condition: Condition,
        latents: Float[Tensor, "b c f h w"],
        mask: Bool[Tensor, "b 1 f h w"],
        concatenation: Concatenation,
    ) -> Condition:
        """The condition, and what is known of each clip as channels and tokens."""
        condition = replace(condition, given=concatenation.channels(latents, mask))
        if self.picture is None:
            return condition
        return condition.joined(self.picture.known(latents, mask, self.tokenizer.decode))

    def known(self, x_0: Float[Tensor, "b c f h w"], numbers: Float[Tensor, "b n"]) -> Known:
        """The known tokens that a clip's uniform numbers decide."""
        patch = self.denoiser.patch
        tokens, t = draw_known(self.tasks, patch.grid(*x_0.shape[2:]), numbers)
        mask = repeat(tokens, "b 1 f h w -> b 1 (f p) (h q) (w r)", p=patch.f, q=patch.h, r=patch.w)
        return Known.of(mask, patch, t)

    @property
    def has_sources(self) -> bool:
        """Whether it learns from clips beside what they are edits of."""
        return any(isinstance(task, Source) for task in self.tasks)

    def source(self, batch: VideoBatch) -> Float[Tensor, "b c f h w"] | None:
        """The latents of a batch's sources; ``None`` where no task asks for them."""
        if not self.has_sources:
            return None
        if batch.source is None:
            raise ValueError("tasks has Source, and the batch holds no sources: set data.sources")
        return self.latents(batch.source)

    def latents(self, batch: VideoBatch) -> Float[Tensor, "b c f h w"]:
        """The cached latents of a batch, or its pixels encoded now."""
        if batch.latents is not None:
            return batch.latents.float()
        with torch.no_grad():
            return self.tokenizer.encode(batch.pixels)

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
        """Return this model, ready to sample. Loads the weak model of autoguidance."""
        tiling, weak_model = sampling.tiling, sampling.guidance.weak_model
        return VideoGenerator(
            self.tokenizer if tiling is None else tiling(self.tokenizer),
            self.conditioner,
            self.denoiser,
            process=self.objective.process,
            training_shift=self.time.sampling_shift,
            channels=None if self.concatenation is None else self.concatenation.channels,
            picture=self.picture,
            weak_model=None if weak_model is None else load_weak_model(self, weak_model),
            sampling=sampling,
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configure(self, self.optimizer, self.warmup_steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        put_specifications(checkpoint, tokenizer=self.tokenizer, picture=self.picture)


def _check_reads_tokens(denoiser: Denoiser) -> None:
    condition = getattr(denoiser, "condition", None)
    if isinstance(condition, ConditionInput) and not condition.text_every:
        raise ValueError(
            f"picture is set, and the denoiser's {type(condition).__name__} has no block attend to "
            "tokens: nothing would be seen of the picture's"
        )
