"""Callbacks that show videos in TensorBoard while a model trains: samples of prompts, and
reconstructions beside their originals.

Both run during validation, with the averaged weights of ``EMA`` in the model.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Float, UInt8
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor, nn

from sora_lightning.checks import naming, require_at_least
from sora_lightning.data.manifest import read_prompts
from sora_lightning.data.manifest.records import NO_TEXT, label_of
from sora_lightning.generation import SamplingConfig
from sora_lightning.systems import DiffusionSystem, TokenizerSystem
from sora_lightning.types import VideoBatch, VideoSize, as_levels

_SHORT_SIDE = 128  # smaller videos are enlarged to about this many pixels


class AfterValidations(Callback, ABC):
    """Samples prompts after every ``every_n_validations`` validations of a ``DiffusionSystem``.

    The number of validations so far is kept in the checkpoint.
    """

    def __init__(
        self,
        prompts: list[str] | Path,
        num_videos: int,
        every_n_validations: int,
        size: str,
        sampling: SamplingConfig,
    ) -> None:
        name = type(self).__name__
        self.prompts = prompts if isinstance(prompts, list) else []
        self.prompts_file = None if isinstance(prompts, list) else prompts
        require_at_least(
            1,
            where=f"{name}: ",
            every_n_validations=every_n_validations,
            num_videos=num_videos,
            prompts=None if self.prompts_file else len(self.prompts),
        )
        for index, prompt in enumerate(self.prompts):
            if not prompt.strip():
                raise ValueError(f"{name}: prompts[{index}] = {prompt!r}: is empty")
            if NO_TEXT.search(prompt):
                raise ValueError(f"{name}: prompts[{index}] = {prompt!r}: holds what is no text")
        self.num_videos = num_videos
        self.every_n_validations = every_n_validations
        self.size = VideoSize.parse(size)
        self.sampling = sampling
        self.num_validations = 0

    def checked(self, module: LightningModule) -> DiffusionSystem:
        """Read the prompts and return the system. Raises ``ValueError`` for another one, and for a
        size, options or prompts that do not fit it.
        """
        name = type(self).__name__
        if self.prompts_file is not None:
            with naming(f"{name}: prompts ="):
                rows = read_prompts(self.prompts_file)
                self.prompts = [row.captions()[0][0] for row in rows]
        self.prompts = self.prompts[: self.num_videos]
        if not isinstance(module, DiffusionSystem):
            raise ValueError(f"{name} needs a DiffusionSystem, not {type(module).__name__}")
        video_generator = module.video_generator(self.sampling)
        with naming(f"{name}: size = {self.size}:"):
            grid = video_generator.tokenizer.compression.grid(self.size)
            video_generator.denoiser.patch.grid(grid.f, grid.h, grid.w)
        return module

    @abstractmethod
    def after_validation(self, trainer: Trainer, system: DiffusionSystem) -> None:
        """Run once, with the weights of the validation."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.num_validations += 1
        if self.num_validations % self.every_n_validations == 0:
            # Its type is checked in setup.
            self.after_validation(trainer, cast(DiffusionSystem, pl_module))

    def state_dict(self) -> dict[str, Any]:
        return {"num_validations": self.num_validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_validations = state_dict["num_validations"]


class SampleVideos(AfterValidations):
    """Samples a video of each prompt after every ``every_n_validations`` validations.

    Args:
        prompts: A list, a text file with a prompt a line, or a manifest whose captions are taken.
        size: Frames x height x width, say 17x32x32.
        num_videos: The first so many prompts are sampled.
        every_n_validations: Validations from one set of samples to the next.
        sampling: How to sample.
        seed: Seed of the first prompt's noise; prompt i always has the noise of ``seed`` + i.
    """

    def __init__(
        self,
        prompts: list[str] | Path,
        size: str,
        num_videos: int = 16,
        every_n_validations: int = 1,
        sampling: SamplingConfig = SamplingConfig(num_steps=25),
        seed: int = 0,
    ) -> None:
        super().__init__(prompts, num_videos, every_n_validations, size, sampling)
        self.seed = seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.checked(pl_module)

    def after_validation(self, trainer: Trainer, system: DiffusionSystem) -> None:
        """Sample and log a video of each prompt."""
        seeds = [self.seed + index for index in range(len(self.prompts))]
        # Every rank samples, since sharded weights need all of them; only the first has a writer.
        with undisturbed(system):
            videos = system.generate(self.prompts, self.size, seeds, self.sampling)
        for prompt, video in zip(self.prompts, videos, strict=True):
            log_video(trainer, f"samples/{label_of(prompt)}", video, system.fps)


class ReconstructVideos(Callback):
    """Shows the first validation clips, each beside the tokenizer's reconstruction.

    Args:
        num_clips: Number of clips; at most a batch.
    """

    def __init__(self, num_clips: int = 4) -> None:
        require_at_least(1, num_clips=num_clips)
        self.num_clips = num_clips

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: VideoBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.sanity_checking or batch_idx or dataloader_idx:
            return
        if not isinstance(pl_module, TokenizerSystem) or batch.video is None:
            raise ValueError("ReconstructVideos needs a TokenizerSystem and batches of pixels")
        original = batch.video[: self.num_clips]
        with undisturbed(pl_module):
            rebuilt = pl_module.tokenizer.decode(pl_module.tokenizer.encode(original))
        pairs = rearrange([original, rebuilt], "two b c F H W -> b c F H (two W)")
        for index, pair in enumerate(pairs):
            log_video(trainer, f"reconstructions/{index}", pair, batch.fps)


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Set evaluation mode without gradients; restore modes and random state afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.random.fork_rng(), torch.no_grad():
            yield
    finally:
        for part, training in modes.items():
            part.training = training


def log_video(trainer: Trainer, tag: str, video: Float[Tensor, "3 F H W"], fps: float) -> None:
    """Log a video of pixels in [-1, 1] to TensorBoard as an animated image.

    Only the first rank logs. A video that is not finite is left out with a warning.
    ``SummaryWriter.add_video`` is not used: beside a newer moviepy it silently stores nothing.
    """
    if not trainer.is_global_zero:
        return
    if not video.isfinite().all():
        rank_zero_warn(f"{tag}: the video is not finite (NaN or infinity) and is not shown")
        return
    frames = rearrange(as_levels(video.cpu()), "c F H W -> F H W c").numpy()
    factor = max(round(_SHORT_SIDE / min(frames.shape[1:3])), 1)
    frames = repeat(frames, "F H W c -> F (H i) (W j) c", i=factor, j=factor)
    image = Summary.Image(
        height=frames.shape[1],
        width=frames.shape[2],
        colorspace=3,
        encoded_image_string=moving_png(frames, fps),
    )
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            summary = Summary(value=[Summary.Value(tag=tag, image=image)])
            logger.experiment._get_file_writer().add_summary(summary, trainer.global_step)


def moving_png(frames: UInt8[np.ndarray, "F H W 3"], fps: float) -> bytes:
    """Encode frames as an animated PNG that repeats endlessly."""
    images = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    images[0].save(
        buffer,
        format="PNG",
        save_all=True,
        append_images=images[1:],
        duration=round(1000 / fps),
        loop=0,
    )
    return buffer.getvalue()
