"""A rank that stands still is named with its batch and files, and the training ends everywhere."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from sora_lightning.data.decoding.readers import PyAVReader
from tests.processes import require_none_left, start

MODULE = "tests.systems.test_stalled_rank"  # as another process imports it
TIMEOUT_S = 4.0


class StalledReader(PyAVReader):
    """Hangs at every file of rank 1."""

    def read(self, path: Path, *args: Any) -> Any:
        if os.environ.get("LOCAL_RANK") == "1":
            time.sleep(600)
        return super().read(path, *args)


class StopProcess(Callback):
    """Stops a rank as a machine that hangs does: none of its threads runs any more."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGSTOP)


def _name(part: type) -> str:
    return f"{MODULE}.{part.__name__}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stall", "said"),
    [
        ("reader", "rank 1 waits for the data of batch 0 ("),
        (0, "rank 0, which keeps what the ranks note, does not answer"),
        (1, "rank 1 no longer runs, since batch 3 ("),
    ],
)
def test_a_rank_that_stands_still_is_named_and_nothing_is_left_running(
    stall: str | int,
    said: str,
    clips: dict[str, Path],
    tokenizer_model: dict[str, Any],
    tmp_path: Path,
) -> None:
    reading: dict[str, Any] = {"num_workers": 2, "decode_timeout_s": None}
    callbacks = []
    if stall == "reader":
        reading["reader"] = {"class_path": _name(StalledReader)}
    else:
        callbacks = [{"class_path": _name(StopProcess), "init_args": {"rank": stall}}]
    config = {
        "run_dir": str(tmp_path / "run"),
        "data": {
            "manifest": str(clips["train"]),
            "val_manifest": str(clips["val"]),
            "fps": 8,
            "batching": {"sizes": ["5x16x16"], "pixels_per_batch": 2 * 5 * 16 * 16},
            "reading": reading,
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 2,
            "strategy": "ddp",
            "max_steps": 20,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "callbacks": callbacks,
        },
        "watchdog": {"timeout_s": TIMEOUT_S},
        "model": tokenizer_model,
    }
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(config))
    arguments = ["sora_lightning", "fit", "--config", "experiment.yaml", "--trust", MODULE]
    process = start(arguments, tmp_path)
    assert process.wait(300) != 0
    log = (tmp_path / "log").read_text()
    (sentence,) = (line for line in log.splitlines() if "no progress for watchdog" in line)
    assert said in sentence
    if stall != 0:
        assert str(clips["train"].parent) in sentence
        assert " as 5x16x16" in sentence
    require_none_left(process.pid)
