"""Terminal output of a training: a table of its parts, and a progress bar with the time left."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_summary import get_human_readable_count

from sora_lightning.callbacks.throughput import parameter_counts

_SECONDS_IN_FILE = 10.0


class ParameterSummary(ModelSummary):
    """Prints the parameters of each part when a training begins.

    Lightning's table has FLOPs of 0, since it runs no batch; ``Throughput`` counts them.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        counts = parameter_counts(pl_module)
        width = max(map(len, counts))
        lines = [f"{name:{width}}  {get_human_readable_count(n)}" for name, n in counts.items()]
        rank_zero_info("\n".join(lines))


class Progress(TQDMProgressBar):
    """tqdm over optimizer steps where ``max_steps`` bounds a training, else over batches of an
    epoch; in a file it is written every ten seconds. Values are read every
    ``trainer.log_every_n_steps`` steps: to read one waits for the GPU.

    It is chosen explicitly because Lightning takes rich wherever that is installed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, int | str | float | dict[str, float]] = {}

    def init_train_tqdm(self) -> Tqdm:
        bar = super().init_train_tqdm()
        if not sys.stdout.isatty():
            bar.mininterval = _SECONDS_IN_FILE
        return bar

    def on_train_start(self, *args: Any) -> None:
        super().on_train_start(*args)
        # Here, since a training that is resumed within an epoch does not start that epoch.
        if self.trainer.max_steps < 0:
            super().on_train_epoch_start(self.trainer)
            return
        bar = self.train_progress_bar
        bar.initial = bar.n = self.trainer.global_step  # what an earlier run did is not timed
        bar.total = self.trainer.max_steps
        bar.set_description("steps")

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.max_steps < 0:
            super().on_train_epoch_start(trainer, *args)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        bar = self.train_progress_bar
        done = batch_idx + 1 if trainer.max_steps < 0 else trainer.global_step
        bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
        bar.update(done - bar.n)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not trainer.training or not every or trainer.global_step % every == 0:
            self._shown = super().get_metrics(trainer, pl_module)
            self._shown.pop("v_num", None)
        return self._shown
