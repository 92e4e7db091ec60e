"""Record of a run, written when its training begins: configuration, commit and seed."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from sora_lightning.cli.errors import nodes

_PACKAGES = ("sora-lightning", "torch", "lightning", "numpy", "av")
# The columns of TensorBoard's table of hyperparameters: scalars that a training logs.
_METRICS = ("train/loss", "val/loss", "cost/parameters", "cost/flops_per_step", "progress/flops")


class RunRecord(SaveConfigCallback):
    """Writes ``config.yaml`` once the training begins: a resume that is refused leaves the file. It
    lies in the run's folder, whatever folder a logger takes.

    Every logger is given the resolved configuration, the commit of the working directory and the
    version as hyperparameters. TensorBoard also shows the configuration as the text ``config``, and
    the hyperparameters in its table of runs.
    """

    _provenance: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pass

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        text = self._text
        run_dir = Path(trainer.default_root_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / self.config_filename).write_text(text, encoding="utf-8")
        code = {"commit": commit(), "version": version("sora-lightning")}
        values = {**yaml.safe_load(text), **code}
        for logger in trainer.loggers:
            # Lightning itself logs the arguments of the model.
            logger.log_hyperparams({k: v for k, v in values.items() if k != "model"})
            if isinstance(logger, TensorBoardLogger):
                written = "".join(f"# {key}: {value}\n" for key, value in code.items()) + text
                logger.experiment.add_text("config", f"```yaml\n{written}```", trainer.global_step)
                _fill_table(logger, values)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what ``sora-lightning inspect`` prints in the checkpoint."""
        self._provenance = self._provenance or {
            "configuration": yaml.safe_load(self._text),
            "commit": commit(),
            "versions": {"python": python_version(), **{name: version(name) for name in _PACKAGES}},
        }
        checkpoint["provenance"] = self._provenance

    @cached_property
    def _text(self) -> str:
        return self.parser.dump(self.config, skip_unset=False, skip_validation=True)


def commit() -> str | None:
    """Return the commit of the working directory, ``-dirty`` where tracked files differ from it;
    ``None`` outside of a repository.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _fill_table(logger: TensorBoardLogger, values: Mapping[str, Any]) -> None:
    """Enter the run into TensorBoard's table of hyperparameters.

    ``log_hyperparams`` with metrics would log a value of each metric as well.
    """
    plain = {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in nodes(values)
        if not isinstance(value, dict | list)
    }
    for summary in hparams(plain, dict.fromkeys(_METRICS, 0.0)):
        logger.experiment._get_file_writer().add_summary(summary)
