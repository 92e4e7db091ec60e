"""Skips optimizer steps on a loss, or on gradients, that are not finite."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from sora_lightning.callbacks.checkpoint import NonFiniteError, RunCheckpoint
from sora_lightning.checks import require_at_least
from sora_lightning.data import VideoDataModule
from sora_lightning.systems.parallel import own_share


class SkipNonFinite(Callback):
    """Skips a step whose loss or gradients are not finite on any rank, on all of them alike.

    The gradients are dropped before the optimizer sees them: weights, optimizer, averages and what
    ``Throughput`` counts stay as they were; the learning rate's schedule and the data go on. Each
    skipped step is warned of with its clips, and logged as ``optimizer/skipped_steps``. The
    training ends with ``NonFiniteError`` after too many in a row, and at once where a weight is not
    finite itself. ``RunCheckpoint`` saves no state between a skipped step and the next whole one.

    The host reads one number of the device for it before each optimizer step. Gradients in float16
    are not looked at: their scaler skips them itself.

    Args:
        max_in_a_row: Steps that may be skipped one after the other.
    """

    def __init__(self, max_in_a_row: int = 3) -> None:
        require_at_least(0, where="nonfinite.", max_in_a_row=max_in_a_row)
        self.max_in_a_row = max_in_a_row
        self.num_skipped = 0
        self._in_a_row: list[str] = []
        self._clip_ids: list[str] = []
        self._batches: list[tuple[Tensor, list[str]]] = []  # losses of the step, and their clips

    def state_dict(self) -> dict[str, Any]:
        return {"num_skipped": self.num_skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_skipped = state_dict["num_skipped"]

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._clip_ids = getattr(batch, "clip_ids", [])

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        self._batches.append((loss.detach().mean(), self._clip_ids))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        batches, self._batches = self._batches, []
        is_bad = ~torch.stack([loss for loss, _ in batches]).isfinite().all()
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            is_bad = is_bad | ~_gradient_norm(pl_module).to(is_bad.device).isfinite()
        if not trainer.strategy.reduce(is_bad.float(), reduce_op="sum"):
            self._in_a_row.clear()
            return
        self._in_a_row.append(_problem(trainer, batches))
        self._end_if_hopeless(trainer, pl_module)
        optimizer.zero_grad(set_to_none=True)
        self.num_skipped += 1
        rank_zero_warn(
            f"{self._in_a_row[-1]}: the step is skipped. Skipped in a row: {len(self._in_a_row)} "
            f"(nonfinite.max_in_a_row = {self.max_in_a_row}), in all: {self.num_skipped}"
        )
        for logger in trainer.loggers:
            logger.log_metrics({"optimizer/skipped_steps": self.num_skipped}, trainer.global_step)

    def _end_if_hopeless(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise ``NonFiniteError``, on all ranks alike, after too many steps in a row, and for
        weights that are not finite.
        """
        what = list(self._in_a_row)
        broken = [
            name for name, weight in pl_module.named_parameters() if not _is_finite(trainer, weight)
        ]
        if not broken and len(what) <= self.max_in_a_row:
            return
        if broken:
            what.append(f"{broken[0]} is not finite, so that no step can follow")
        checkpoint = trainer.checkpoint_callback
        remedy = f" {checkpoint.remedy()}" if isinstance(checkpoint, RunCheckpoint) else ""
        raise NonFiniteError(f"{'; '.join(what)}.{remedy}")


def _gradient_norm(module: nn.Module) -> Tensor:
    """Return the norm of this rank's shares of the gradients."""
    return nn.utils.get_total_norm(
        [own_share(p.grad) for p in module.parameters() if p.grad is not None]
    )


def _is_finite(trainer: Trainer, weight: Tensor) -> bool:
    is_bad = ~own_share(weight.detach()).isfinite().all()
    return not trainer.strategy.reduce(is_bad.float(), reduce_op="sum")


def _problem(trainer: Trainer, batches: list[tuple[Tensor, list[str]]]) -> str:
    """Name the losses that are not finite and their clips, of all ranks; without one, the gradients
    and all clips of the step.
    """
    own = [(loss.item(), clip_ids) for loss, clip_ids in batches]
    of_ranks = [own]
    if trainer.world_size > 1:
        of_ranks = [[] for _ in range(trainer.world_size)]
        dist.all_gather_object(of_ranks, own)
    seen = [batch for of_rank in of_ranks for batch in of_rank]
    bad = [batch for batch in seen if not math.isfinite(batch[0])]
    what = f"the loss is {bad[0][0]}" if bad else "the gradients are not finite"
    clip_ids = dict.fromkeys(clip_id for _, clip_ids in bad or seen for clip_id in clip_ids)
    data = trainer.datamodule  # type: ignore[attr-defined]
    names = data.files(clip_ids) if isinstance(data, VideoDataModule) else clip_ids
    clips = f" on the clips {', '.join(map(str, names))}" if clip_ids else ""
    return f"{what} at step {trainer.global_step}{clips}"
