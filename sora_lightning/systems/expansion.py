"""Trains the model that expands prompts, on pairs of a short caption and a description."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import lightning as L
from jaxtyping import Float
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from sora_lightning.captioner.expansion import ExpansionModel
from sora_lightning.checkpoints import plain_hyperparameters
from sora_lightning.layers.transformer import TransformerSize
from sora_lightning.systems.optimizers import MuonAdamW, configure


class ExpansionSystem(L.LightningModule):
    """Cross-entropy of the description after the short caption."""

    def __init__(
        self,
        size: TransformerSize = TransformerSize(2, 128, 4),  # noqa: B008 (frozen)
        vocab_size: int = 512,
        context: int = 128,
        lr: float = 5e-3,
        warmup_steps: int = 30,
    ):
        super().__init__()
        self.save_hyperparameters(
            {"size": asdict(size), "vocab_size": vocab_size, "context": context, "lr": lr}
        )
        self.model = ExpansionModel(size, vocab_size, context)
        self.lr = lr
        self.warmup_steps = warmup_steps

    def training_step(self, batch: list[tuple[str, str]], batch_idx: int) -> Float[Tensor, ""]:
        loss = self.model.losses(batch).mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configure(self, partial(MuonAdamW, lr=self.lr), self.warmup_steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["hyper_parameters"] = plain_hyperparameters(self)
