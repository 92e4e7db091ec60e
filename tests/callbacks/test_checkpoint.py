"""last.ckpt always holds the latest state: after the last step, after a validation, after an
exception.
"""

from __future__ import annotations

import errno
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sora_lightning.callbacks.checkpoint import NonFiniteError, RunCheckpoint, SaveError


class Measured(BoringModel):
    """Writes the step into a buffer when it validates, as a tokenizer writes its statistics."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.register_buffer("measured_at", torch.tensor(-1))
        self.fail_at = fail_at

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == self.fail_at:
            raise ArithmeticError("diverged")
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self.measured_at.fill_(self.global_step)


def _fit(folder: Path, checkpoint: RunCheckpoint, model: BoringModel, **trainer: Any) -> None:
    Trainer(
        default_root_dir=folder,
        callbacks=[checkpoint],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        limit_val_batches=1,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        **trainer,
    ).fit(model, ckpt_path=checkpoint.last if checkpoint.last.exists() else None)


def _load(folder: Path, name: str = "last.ckpt") -> tuple[int, int]:
    content = torch.load(folder / name, weights_only=True)
    return content["global_step"], content["state_dict"]["measured_at"].item()


@pytest.mark.parametrize(("every", "max_steps"), [(2, 4), (3, 4), (100, 4)])
def test_the_last_step_and_the_validation_after_it_are_saved(
    tmp_path: Path, every: int, max_steps: int
) -> None:
    _fit(
        tmp_path,
        RunCheckpoint(tmp_path, every),
        Measured(),
        max_steps=max_steps,
        val_check_interval=4,
    )
    assert _load(tmp_path) == (4, 4)
    assert {path.name for path in tmp_path.iterdir()} - {"previous.ckpt"} == {"last.ckpt"}


def test_a_state_is_saved_anew_when_a_validation_has_changed_it(tmp_path: Path) -> None:
    seen = []

    class Peeking(Measured):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_step == 2:
                seen.append(_load(tmp_path))

    _fit(tmp_path, RunCheckpoint(tmp_path, 2), Peeking(), max_steps=3, val_check_interval=2)
    assert seen == [(2, 2)]  # what a process killed at this moment leaves


def test_a_second_training_goes_on_and_overwrites_the_same_file(tmp_path: Path) -> None:
    _fit(tmp_path, RunCheckpoint(tmp_path, 2), Measured(), max_steps=2, val_check_interval=2)
    _fit(tmp_path, RunCheckpoint(tmp_path, 2), Measured(), max_steps=4, val_check_interval=2)
    assert _load(tmp_path) == (4, 4)
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "previous.ckpt"}


def test_an_exception_leaves_the_state_before_the_step_that_raised_it(tmp_path: Path) -> None:
    with pytest.raises(ArithmeticError):
        _fit(tmp_path, RunCheckpoint(tmp_path, 100), Measured(fail_at=3), max_steps=9)
    assert _load(tmp_path)[0] == 3


def test_numbered_checkpoints_stay(tmp_path: Path) -> None:
    checkpoint = RunCheckpoint(tmp_path, every_n_steps=3, keep_every_n_steps=2)
    _fit(tmp_path, checkpoint, Measured(), max_steps=5)
    names = sorted(path.name for path in tmp_path.glob("*.ckpt"))
    assert names == ["last.ckpt", "previous.ckpt", "step-00000002.ckpt", "step-00000004.ckpt"]
    assert _load(tmp_path, "step-00000002.ckpt")[0] == 2


def test_accumulated_batches_are_saved_once(tmp_path: Path) -> None:
    saved = []

    class Counted(RunCheckpoint):
        def _save(self, trainer: Trainer, path: Path) -> None:
            saved.append(trainer.global_step)
            super()._save(trainer, path)

    _fit(tmp_path, Counted(tmp_path, 1), Measured(), max_steps=2, accumulate_grad_batches=3)
    assert saved == [1, 2]  # each step once; the last at the end


class Overflowing(Measured):
    """A weight becomes infinite in an optimizer step."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.global_step == 3:
            self.layer.bias.data[0] = math.inf


def test_weights_that_are_not_finite_do_not_replace_the_good_ones(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"layer\.bias is not finite after step 4"):
        _fit(tmp_path, RunCheckpoint(tmp_path, 1), Overflowing(), max_steps=9)
    assert _load(tmp_path)[0] == 3
    assert all(
        w.isfinite().all() for w in torch.load(tmp_path / "last.ckpt")["state_dict"].values()
    )


def test_a_save_that_fails_keeps_the_checkpoint_before_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def full(content: Any, file: Any) -> None:
        save(content, file)
        if content["global_step"] == 4:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SaveError, match=r"last\.ckpt cannot be saved: No space left on device"):
        _fit(tmp_path, RunCheckpoint(tmp_path, 2), Measured(), max_steps=8)
    assert _load(tmp_path)[0] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "previous.ckpt"}


def test_saving_needs_no_temporary_folder_and_sweeps_what_a_killed_process_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".last.ckpt.part").write_bytes(b"half")
    (folder / ".step-00000002.ckpt.part").write_bytes(b"half")
    _fit(folder, RunCheckpoint(folder, 2), Measured(), max_steps=4)
    assert _load(folder)[0] == 4
    assert {path.name for path in folder.iterdir()} == {"last.ckpt", "previous.ckpt"}


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder, model = tmp_path / "file" / "checkpoints", Measured(fail_at=0)
    with pytest.raises(ValueError, match=r"file/checkpoints: cannot be written to: Not a"):
        _fit(tmp_path, RunCheckpoint(folder, 2), model, max_steps=4)


def test_a_signal_during_validation_saves_the_newest_state(tmp_path: Path) -> None:
    class Stopped(Measured):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            raise SIGTERMException

    with pytest.raises(SIGTERMException):
        _fit(tmp_path, RunCheckpoint(tmp_path, 100), Stopped(), max_steps=9, val_check_interval=5)
    assert _load(tmp_path)[0] == 5


def test_an_error_before_the_first_step_of_a_resumed_run_saves_nothing(tmp_path: Path) -> None:
    class Refusing(Measured):
        def on_fit_start(self) -> None:
            raise ArithmeticError("other data")

    _fit(tmp_path, RunCheckpoint(tmp_path, 2), Measured(), max_steps=2)
    before = (tmp_path / "last.ckpt").read_bytes()
    with pytest.raises(ArithmeticError):
        _fit(tmp_path, RunCheckpoint(tmp_path, 2), Refusing(), max_steps=4)
    assert (tmp_path / "last.ckpt").read_bytes() == before


@pytest.mark.parametrize("name", ["every_n_steps", "keep_every_n_steps"])
def test_an_interval_of_nothing_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"checkpoint.{name} = 0: must be at least 1"):
        RunCheckpoint(tmp_path, **{name: 0})
