"""Scores of generated videos while a model trains: any ``torchmetrics`` metrics, given by
``class_path``, so that the library knows no judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torchmetrics import Metric

from sora_lightning.callbacks.samples import log_video, undisturbed
from sora_lightning.systems import DiffusionSystem
from sora_lightning.types import VideoBatch, VideoSize, as_levels


class ScoreVideos(Callback):
    """After every so many validations, samples a video of each prompt and scores them all.

    Prompt i always starts from the noise of ``seed`` + i, whichever rank draws it; ranks take turns
    over the prompts, and the metric gathers, so that a score does not depend on how many ranks
    there are. The weights that stand in the model at the end of a validation are scored: the
    averaged ones under ``EMA``. Random state and modes are as before afterwards, and the metric
    enters no checkpoint.

    Args:
        name: Of the score in the logs, below ``scores/``: name it after its network.
        metric: Gathers over ranks by ids, as those of ``evaluation.metrics`` do.
        prompts: One video each.
        size: Frames x height x width, say 17x32x32.
        against: What the metric is given beside videos and ids. ``prompts``: their texts; ``real``:
            clips of the validation, as many as there are prompts, an equal share from each rank's
            first batches (the same clips on any number of ranks only where a batch is one clip);
            ``nothing``.
        every_n_validations: Validations from one score to the next.
        batch_size: Videos made at a time.
        num_shown: Videos that TensorBoard shows.
    """

    def __init__(
        self,
        name: str,
        metric: Metric,
        prompts: list[str],
        size: str,
        against: Literal["prompts", "real", "nothing"],
        every_n_validations: int = 1,
        num_steps: int = 25,
        guidance_scale: float = 2.0,
        seed: int = 0,
        batch_size: int = 8,
        num_shown: int = 4,
    ) -> None:
        for key, value in (
            ("every_n_validations", every_n_validations),
            ("batch_size", batch_size),
            ("prompts", len(prompts)),
        ):
            if value < 1:
                raise ValueError(f"ScoreVideos {name}: {key} = {value}: must be at least 1")
        for index, prompt in enumerate(prompts):
            if not prompt.strip():
                raise ValueError(f"ScoreVideos {name}: prompts[{index}] = {prompt!r}: is empty")
        self.name = name
        self.metric = metric
        self.prompts = prompts
        self.size = VideoSize.parse(size)
        self.against = against
        self.every_n_validations = every_n_validations
        self.num_steps = num_steps
        self.guidance_scale = guidance_scale
        self.seed = seed
        self.batch_size = batch_size
        self.num_shown = num_shown
        self.num_validations = 0
        self.num_real = 0

    @property
    def state_key(self) -> str:
        return f"scores/{self.name}"

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.metric.to(pl_module.device)
        self.metric.reset()
        self.num_real = 0

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: VideoBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.against != "real" or dataloader_idx or not self._due(trainer):
            return
        # Each rank contributes its share; ids are apart, whatever the shares.
        share = range(trainer.global_rank, len(self.prompts), trainer.world_size)
        left = len(share) - self.num_real
        if left <= 0:
            return
        if batch.video is None:
            raise ValueError(
                f"ScoreVideos {self.name}: against = real needs batches of pixels, and "
                "data.latents gives none"
            )
        videos = as_levels(batch.video[:left])
        ids = [
            (self.num_real + i) * trainer.world_size + trainer.global_rank
            for i in range(len(videos))
        ]
        with undisturbed(pl_module):
            self.metric.update(videos, ids, real=True)
        self.num_real += len(videos)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        due = self._due(trainer)
        self.num_validations += 1
        if not due:
            return
        if not hasattr(pl_module, "generate"):
            raise ValueError(f"ScoreVideos needs a DiffusionSystem, not {type(pl_module).__name__}")
        with undisturbed(pl_module):
            mine = list(range(trainer.global_rank, len(self.prompts), trainer.world_size))
            # All ranks sample the same number of batches, since sharded weights need all of them.
            share = -(-len(self.prompts) // trainer.world_size)
            for start in range(0, share, self.batch_size):
                ids = mine[start : start + self.batch_size]
                self._sample(trainer, pl_module, ids or [len(self.prompts) - 1])
            value = self.metric.compute()
        # Nothing of it stays: its rows would be memory, and its next turn begins anew.
        self.metric.reset()
        scores = value if isinstance(value, dict) else {self.name: value}
        for name, score in scores.items():
            pl_module.log(f"scores/{name}", torch.as_tensor(score).float(), rank_zero_only=False)

    def _due(self, trainer: Trainer) -> bool:
        """Whether the validation that is under way is one to score."""
        following = (self.num_validations + 1) % self.every_n_validations == 0
        return following and not trainer.sanity_checking

    def _sample(self, trainer: Trainer, pl_module: LightningModule, ids: Sequence[int]) -> None:
        prompts = [self.prompts[i] for i in ids]
        system = cast(DiffusionSystem, pl_module)
        videos = system.generate(
            prompts,
            self.size,
            [self.seed + i for i in ids],
            num_steps=self.num_steps,
            guidance_scale=self.guidance_scale,
        )
        levels = as_levels(videos)
        if self.against == "prompts":
            self.metric.update(levels, prompts, ids)
        elif self.against == "real":
            self.metric.update(levels, ids, real=False)
        else:
            self.metric.update(levels, ids)
        for index, prompt, video in zip(ids, prompts, videos, strict=True):
            if index < self.num_shown:
                log_video(trainer, f"{self.state_key}/{prompt}", video, system.fps)

    def state_dict(self) -> dict[str, Any]:
        return {"num_validations": self.num_validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_validations = state_dict["num_validations"]
