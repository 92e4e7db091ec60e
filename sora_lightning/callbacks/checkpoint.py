"""Keeps the state of a run under one name that never changes: ``<run>/checkpoints/last.ckpt``.

Lightning's ``ModelCheckpoint`` picks the best by a metric, and can be used beside this one for
that. It does not suit the last state: it renames the file when the folder is not empty
(``last-v1.ckpt``), and does not save the steps after the last multiple of its interval.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from sora_lightning.checkpoint_shards import remove_unused, with_shards
from sora_lightning.checkpoints import start_weights
from sora_lightning.checks import require_at_least
from sora_lightning.files import check_writable
from sora_lightning.systems.optimizers.parameters import has_gradients


class NonFiniteError(RuntimeError):
    """A training's loss or weights are no longer finite."""


class SaveError(OSError):
    """A checkpoint cannot be written."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes each checkpoint beside its target and renames it once it is on the disk.

    Lightning writes to the temporary folder first, and copies where that is another file system.
    """

    def load_checkpoint(self, path: Path | str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return with_shards(super().load_checkpoint(path, *args, **kwargs), Path(path))

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Path | str, storage_options: Any = None
    ) -> None:
        """Raise ``SaveError`` naming ``path`` if it cannot be written; an existing file is kept."""
        path = Path(path)
        part = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except (OSError, RuntimeError) as error:  # torch hides a full disk behind its own error
            raise SaveError(f"{path} cannot be saved: {_reason(error)}") from error
        finally:
            part.unlink(missing_ok=True)
        remove_unused(path.parent)


class RunCheckpoint(Checkpoint):
    """Saves ``last.ckpt`` every so many steps, at the end of the training, and when an exception
    ends it early. ``previous.ckpt`` is the one before.

    Weights that are not finite are never saved: the training ends with ``NonFiniteError``.

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
        counts = {"every_n_steps": every_n_steps, "keep_every_n_steps": keep_every_n_steps}
        require_at_least(1, "checkpoint.", **counts)
        self.dirpath = Path(dirpath)
        self.every_n_steps = every_n_steps
        self.keep_every_n_steps = keep_every_n_steps
        self.start_from = start_from
        self._saved_step: int | None = None  # None until the training begins
        self._seen_step = 0
        self._progress: dict[str, Any] = {}  # of the loops, after the last whole step
        self._stepping = False  # weights, averages and progress are of different steps
        self._is_interrupted = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if stage != "fit":
            return
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            check_writable(self.dirpath)
            for left in self.dirpath.glob(".*.ckpt.part"):  # by a process that was killed
                left.unlink()
            remove_unused(self.dirpath)
        # Before Lightning restores a resumed run, which then overrides this.
        if self.start_from is not None:
            start_weights(pl_module, self.start_from)

    @property
    def last(self) -> Path:
        """Return the path of the latest state."""
        return self.dirpath / "last.ckpt"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = self._seen_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        self._stepping = False
        if step == self._seen_step:  # gradient accumulation: the batch ended no optimizer step
            return
        self._seen_step, self._progress = step, deepcopy(trainer.fit_loop.state_dict())
        if not has_gradients(trainer.optimizers):  # the step was skipped
            return
        if self.keep_every_n_steps and step % self.keep_every_n_steps == 0:
            self._save(trainer, self.dirpath / f"step-{step:08d}.ckpt")
        if step % self.every_n_steps == 0 and step != trainer.max_steps:
            self._save(trainer, self.last)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A validation may set buffers, as the tokenizer's does: a state just saved is saved anew.
        step = trainer.global_step
        if trainer.state.fn == TrainerFn.FITTING and step > 0 and step == self._saved_step:
            self._save(trainer, self.last)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, self.last)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if self._saved_step is None or isinstance(exception, NonFiniteError | SaveError):
            return
        if self._stepping:  # within an optimizer's step: the file before holds a whole one
            return
        # A resume after the last step would not validate again, and a tokenizer's statistics would
        # stay those of older weights: that step is repeated.
        if trainer.global_step == trainer.max_steps:
            return
        self._is_interrupted = True
        # Other ranks may never come here, and saving waits for them.
        if trainer.world_size == 1 and trainer.global_step > self._saved_step:
            self._save(trainer, self.last)

    def on_before_optimizer_step(self, *args: Any) -> None:
        self._stepping = True

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Batches of a step that was not finished are read again: their gradients are lost.
        if self._is_interrupted and self._progress:
            checkpoint["loops"]["fit_loop"] = self._progress

    def _save(self, trainer: Trainer, path: Path) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for name, parameter in trainer.lightning_module.named_parameters():
            if parameter.requires_grad and not parameter.isfinite().all():
                raise NonFiniteError(
                    f"{name} is not finite after step {trainer.global_step}. {self.remedy()}"
                )
        if path == self.last and trainer.is_global_zero and path.exists():
            _keep(path, self.dirpath / "previous.ckpt")
        with _workers_may_die():
            try:
                trainer.save_checkpoint(path, weights_only=False)
            except SaveError:
                raise
            except OSError as error:  # of a rank's own file
                raise SaveError(f"{path} cannot be saved: {_reason(error)}") from error
        self._saved_step = trainer.global_step
        for logger in trainer.loggers:  # what a resumed run does not log again
            logger.save()

    def remedy(self) -> str:
        """Return what to do after ``NonFiniteError``."""
        kept = f"{self.last} is the last finite state" if self.last.exists() else "Nothing is saved"
        return f"{kept}. A lower learning rate or gradient clipping may help"


@contextmanager
def _workers_may_die() -> Iterator[None]:
    """Postpone the error that torch raises anywhere when a loader's worker is killed: a signal to
    the whole process group must not keep this process from saving."""
    if current_thread() is not main_thread():
        yield
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


def _keep(path: Path, kept: Path) -> None:
    """Give a file a second name, so that both exist until the first is replaced."""
    kept.unlink(missing_ok=True)
    try:
        os.link(path, kept)
    except OSError:  # a file system without hard links
        os.replace(path, kept)


def _reason(error: Exception) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return str(error).splitlines()[0]
