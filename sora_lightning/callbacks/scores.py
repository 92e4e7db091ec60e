"""Scores of generated videos while a model trains: FVD, CLIP score, or any ``VideoScore``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from sora_lightning.callbacks.samples import AfterValidations, log_video, undisturbed
from sora_lightning.checks import naming, require_at_least
from sora_lightning.data.manifest.records import label_of
from sora_lightning.data.ranks import data_ranks
from sora_lightning.generation import SamplingConfig
from sora_lightning.systems import DiffusionSystem
from sora_lightning.types import as_levels

_NUM_SHOWN = 4


@runtime_checkable
class VideoScore(Protocol):
    """Scores a set of generated videos; those of ``evaluation.training_scores`` are some.

    Annotations are plain types: the command line takes a class only if its methods are annotated
    exactly as these.
    """

    def prepare(
        self, prompts: list[str], num_frames: int, height: int, width: int, fps: float
    ) -> list[str]:
        """Read what the score needs and return the names of its values. Called once, before the
        first step; raises ``ValueError`` for what cannot be scored.
        """
        ...

    def update(self, videos: Tensor, ids: Sequence[int]) -> None:
        """Add uint8 videos ``b 3 F H W`` of the prompts at ``ids``."""
        ...

    def compute(self) -> dict[str, float]:
        """Return the values over all ranks; ``name/low`` and ``name/high`` bound ``name``."""
        ...

    def reset(self) -> None:
        """Forget the videos added so far."""
        ...

    def to(self, device: torch.device) -> Any:
        """Compute on this device."""
        ...


class ScoreVideos(AfterValidations):
    """After every so many validations, samples a video of each prompt and scores them.

    Prompt i always starts from the noise of ``seed`` + i, whichever rank samples it. Ranks share
    the prompts and the scores gather, so that a value does not depend on the number of ranks. The
    weights at the end of a validation are scored: the averaged ones under ``EMA``. Values are
    logged below ``scores/``, in TensorBoard with intervals. Random state and module modes are
    restored afterwards, and nothing of a score enters a checkpoint.

    Args:
        scores: Each is given the same videos.
        prompts: A list, a text file with a prompt a line, or a manifest whose captions are taken.
        size: Frames x height x width, say 17x32x32.
        num_videos: The first so many prompts are sampled.
        every_n_validations: Validations from one scoring to the next.
        sampling: How to sample.
        batch_size: Videos sampled at a time on each rank.
    """

    def __init__(
        self,
        scores: list[VideoScore],
        prompts: list[str] | Path,
        size: str,
        num_videos: int = 64,
        every_n_validations: int = 1,
        sampling: SamplingConfig = SamplingConfig(num_steps=25),
        seed: int = 0,
        batch_size: int = 16,
    ) -> None:
        require_at_least(1, where="ScoreVideos: ", batch_size=batch_size, scores=len(scores))
        super().__init__(prompts, num_videos, every_n_validations, size, sampling)
        self.scores = scores
        self.seed = seed
        self.batch_size = batch_size

    @property
    def state_key(self) -> str:
        return self._generate_state_key(size=str(self.size), every=self.every_n_validations)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check size and prompts and read the reference, on the first rank before the others."""
        fps = self.checked(pl_module).fps
        with naming("ScoreVideos:"):
            if not trainer.is_global_zero:
                trainer.strategy.barrier("the first rank reads the reference")
            names = self._prepare(trainer.strategy.root_device, fps)
        if trainer.is_global_zero:
            trainer.strategy.barrier("the first rank reads the reference")
        _lay_out_intervals(trainer, names)

    def _prepare(self, device: torch.device, fps: float) -> list[str]:
        """Return the names of all values."""
        names = []
        for score in self.scores:
            score.to(device)
            size = self.size
            names += score.prepare(self.prompts, size.num_frames, size.height, size.width, fps)
        return names

    def after_validation(self, trainer: Trainer, system: DiffusionSystem) -> None:
        """Sample the videos, score them and log the scores."""
        with undisturbed(system):
            for score in self.scores:
                score.reset()
            self._sample(trainer, system)
            for score in self.scores:
                for name, value in score.compute().items():
                    system.log(f"scores/{name}", value, rank_zero_only=False)
                score.reset()

    def _sample(self, trainer: Trainer, system: DiffusionSystem) -> None:
        """Sample this rank's share of the prompts and add the videos to the scores."""
        rank, num_ranks = data_ranks(trainer)  # those that share a layer sample the same prompts
        mine = list(range(rank, len(self.prompts), num_ranks))
        # All ranks sample the same number of batches, since sharded weights need all of them.
        share = -(-len(self.prompts) // num_ranks)
        for start in range(0, share, self.batch_size):
            ids = mine[start : start + self.batch_size] or [len(self.prompts) - 1]
            prompts = [self.prompts[i] for i in ids]
            seeds = [self.seed + i for i in ids]
            videos = system.generate(prompts, self.size, seeds, self.sampling)
            for score in self.scores:
                score.update(as_levels(videos), ids)
            for index, prompt, video in zip(ids, prompts, videos, strict=True):
                if index < _NUM_SHOWN:
                    log_video(trainer, f"scores/{label_of(prompt)}", video, system.fps)


def _lay_out_intervals(trainer: Trainer, names: Sequence[str]) -> None:
    """Have TensorBoard's custom scalars draw each value within its interval."""
    charts = {
        name: ["Margin", [f"scores/{name}", f"scores/{name}/low", f"scores/{name}/high"]]
        for name in names
        if {f"{name}/low", f"{name}/high"} <= set(names)
    }
    for logger in trainer.loggers if trainer.is_global_zero and charts else []:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_custom_scalars({"scores": charts})
