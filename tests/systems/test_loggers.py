"""Lightning's other loggers take TensorBoard's place by ``trainer.logger``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def test_weights_and_biases_records_a_run_offline(
    fit: Any, tokenizer_model: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = ["--trainer.logger", "lightning.pytorch.loggers.WandbLogger"]
    logger += ["--trainer.logger.offline", "true", "--trainer.logger.save_dir", str(tmp_path)]
    sizes = ["--data.batching.sizes", "[5x16x16]", "--trainer.log_every_n_steps", "1"]
    fit({"model": tokenizer_model}, tmp_path / "run", *logger, *sizes, "--trainer.max_steps", "3")
    wandb.finish()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    written = file.read_bytes()
    for name in (b"progress/clips", b"train/pixel", b"val/psnr", b"optimizer/gradient_norm"):
        assert name in written
    assert b"latent_channels" in written  # the configuration
