"""A batch that takes too long ends the training."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from sora_lightning.callbacks import Watchdog


def test_a_batch_that_takes_too_long_ends_the_process_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2:
                while not codes:
                    time.sleep(0.01)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            time.sleep(0.4)  # validations are not watched

    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", lambda code: codes.append(code) or 1 / 0)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    Trainer(
        default_root_dir=tmp_path,
        callbacks=[Watchdog(0.3)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        limit_val_batches=1,
        val_check_interval=1,
        num_sanity_val_steps=0,
        max_steps=3,
    ).fit(Slow())
    assert codes == [1]
    said = "no progress for watchdog.timeout_s = 0.3 s: rank 0 works on batch 2. The training ends"
    assert said in capsys.readouterr().err


def test_a_timeout_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"watchdog\.timeout_s = 0: must be positive"):
        Watchdog(0)
