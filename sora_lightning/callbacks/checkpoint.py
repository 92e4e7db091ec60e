"""Keeps the state of a run under one name that never changes: ``<run>/checkpoints/last.ckpt``.

Lightning's ``ModelCheckpoint`` picks the best by a metric, and may stand beside this one for that.
For the last state it is the wrong tool: it numbers the file anew when the folder is not empty
(``last-v1.ckpt``), and it does not save the steps that a training takes after the last multiple of
its interval.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from sora_lightning.checkpoints import averaged_state_dict, read_checkpoint
from sora_lightning.denoisers import Denoiser

_INPUT = "denoiser.x_in.weight"


class RunCheckpoint(Checkpoint):
    """Saves ``last.ckpt`` every so many steps, at the end of the training, and when an exception
    ends it early.

    Args:
        dirpath: The folder of the checkpoints.
        every_n_steps: Optimizer steps between two saves.
        keep_every_n_steps: Optimizer steps between saves that stay, as ``step-00001000.ckpt``;
            ``None`` keeps none.
        start_from: The checkpoint of another training, whose weights (averaged, where it kept an
            average) this one starts from instead of random ones. Weights of inputs that only this
            model has start at 0.
    """

    def __init__(
        self,
        dirpath: Path,
        every_n_steps: int = 500,
        keep_every_n_steps: int | None = None,
        start_from: Path | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("every_n_steps", every_n_steps),
            ("keep_every_n_steps", keep_every_n_steps),
        ):
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{name} = {value}: must be at least 1")
        self.dirpath = Path(dirpath)
        self.every_n_steps = every_n_steps
        self.keep_every_n_steps = keep_every_n_steps
        self.start_from = start_from
        self._saved_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Before Lightning restores a run that goes on, which then has the last word.
        if stage == "fit" and self.start_from is not None:
            start_weights(pl_module, self.start_from)

    @property
    def last(self) -> Path:
        """The file of the latest state."""
        return self.dirpath / "last.ckpt"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._saved_step:  # gradient accumulation: the batch ended no optimizer step
            return
        if self.keep_every_n_steps and step % self.keep_every_n_steps == 0:
            self._save(trainer, self.dirpath / f"step-{step:08d}.ckpt")
        if step % self.every_n_steps == 0:
            self._save(trainer, self.last)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A validation may set buffers, as the tokenizer's does: a state just saved is saved anew.
        if trainer.state.fn == TrainerFn.FITTING and trainer.global_step == self._saved_step > 0:
            self._save(trainer, self.last)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, self.last)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        # Other ranks may never come here, and saving waits for them.
        if trainer.training and trainer.world_size == 1 and trainer.global_step > self._saved_step:
            self._save(trainer, self.last)

    def _save(self, trainer: Trainer, path: Path) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        trainer.save_checkpoint(path, weights_only=False)
        self._saved_step = trainer.global_step


@torch.no_grad()
def start_weights(module: LightningModule, checkpoint: Path) -> None:
    """Copy what trains from another training's checkpoint. Channels that only this denoiser takes
    in start at 0 (InstructPix2Pix, arXiv 2211.09800, section 3.2.1).

    Raises ``ValueError`` naming the first weight that is missing or of another shape.
    """
    found = averaged_state_dict(read_checkpoint(checkpoint))
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if name not in found:
            raise ValueError(f"checkpoint.start_from = {str(checkpoint)!r}: holds no {name}")
        weight = found[name]
        if name == _INPUT and parameter.shape[-1] > weight.shape[-1]:
            weight = _more_channels(weight, parameter.shape[-1], module)
        if weight.shape != parameter.shape:
            raise ValueError(
                f"checkpoint.start_from = {str(checkpoint)!r}: {name} is {tuple(weight.shape)}, "
                f"and this model's is {tuple(parameter.shape)}"
            )
        parameter.copy_(weight)


def _more_channels(weight: Tensor, width: int, module: LightningModule) -> Tensor:
    """A patch's values stand channel by channel at each of its positions."""
    assert isinstance(module.denoiser, Denoiser)
    positions = module.denoiser.patch.volume
    apart = rearrange(weight, "d (p c) -> d p c", p=positions)
    more = (width - weight.shape[-1]) // positions
    return rearrange(F.pad(apart, (0, more)), "d p c -> d (p c)")
