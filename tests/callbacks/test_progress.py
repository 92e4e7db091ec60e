"""The progress bar reads values of the training at the steps that are logged, and no other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from lightning.pytorch.callbacks import TQDMProgressBar

from sora_lightning.callbacks import Progress


def test_values_are_read_every_so_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def metrics(bar: TQDMProgressBar, trainer: Any, module: Any) -> dict[str, Any]:
        read.append(trainer.global_step)
        return {"v_num": 0, "train/loss": trainer.global_step}

    monkeypatch.setattr(TQDMProgressBar, "get_metrics", metrics)
    bar = Progress()
    for step in range(12):
        trainer: Any = SimpleNamespace(global_step=step, training=True, log_every_n_steps=5)
        assert bar.get_metrics(trainer, cast(Any, None)) == {"train/loss": step // 5 * 5}
    assert read == [0, 5, 10]
    trainer.training = False  # a validation shows its own
    assert bar.get_metrics(trainer, cast(Any, None)) == {"train/loss": 11}
