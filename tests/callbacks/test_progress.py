"""The progress bar reads values of the training at the steps that are logged, and no other."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.demos.boring_classes import BoringModel

from sora_lightning.callbacks import Progress, RunCheckpoint


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


@pytest.mark.parametrize(("limit", "total"), [({"max_steps": 9}, 9), ({"max_epochs": 2}, 5)])
def test_a_training_resumed_within_an_epoch_knows_its_total(
    limit: dict[str, int], total: int, tmp_path: Path
) -> None:
    def fit(resume: Path | None, bar: Progress, **settings: int) -> None:
        Trainer(
            default_root_dir=tmp_path,
            callbacks=[bar, RunCheckpoint(tmp_path, keep_every_n_steps=3)],
            logger=False,
            enable_model_summary=False,
            accelerator="cpu",
            limit_train_batches=5,
            limit_val_batches=0,
            **settings,
        ).fit(BoringModel(), ckpt_path=resume)

    class Shown(Progress):
        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            super().on_train_batch_end(*args, **kwargs)
            seen.append((self.train_progress_bar.n, self.train_progress_bar.total))

    seen: list[tuple[int, int]] = []
    fit(None, Progress(), max_epochs=1)
    fit(tmp_path / "step-00000003.ckpt", Shown(), **limit)
    assert {shown for _, shown in seen} == {total}
    assert seen[0][0] == 4


def test_a_file_is_not_filled_with_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = Progress()
    trainer = Trainer(
        default_root_dir=tmp_path,
        callbacks=[bar],
        logger=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        accelerator="cpu",
        max_steps=40,
        limit_val_batches=0,
    )
    trainer.fit(BoringModel())
    shown = capsys.readouterr().out
    assert "40/40" in shown
    assert shown.count("steps:") < 6
