"""A long training holds as much memory, and as many files and processes, at its end as after its
warm-up.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from sora_lightning.__main__ import main
from tests.processes import Forks, of_session

pytestmark = pytest.mark.slow

MODULE = "tests.systems.test_soak"  # as another process imports it
STEPS, EVERY = 2000, 20


class Gauge(Callback):
    """Notes memory, open files and processes of this process and its workers."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step % EVERY:
            return
        processes = of_session(os.getsid(0))
        pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in processes]
        files = [len(os.listdir(f"/proc/{pid}/fd")) for pid in processes]
        with Path(self.path).open("a") as file:
            file.write(json.dumps([sum(pages) * 4096, sum(files), len(processes)]) + "\n")


def test_memory_files_and_processes_stay_as_they_are(
    experiment: Callable[..., Path], diffusion_model: dict[str, Any], tmp_path: Path
) -> None:
    batching = {"sizes": ["5x16x16", "5x24x16", "1x16x16", "9x16x24"], "steps_per_epoch": 100}
    config = {
        "model": diffusion_model,
        "data": {"batching": batching, "reading": {"num_workers": 1}},
    }
    path = experiment(config, tmp_path / "run")
    gauge = {"class_path": f"{MODULE}.Gauge", "init_args": {"path": str(tmp_path / "gauge")}}
    flags = [f"--trainer.max_steps={STEPS}", f"--trainer.callbacks+={json.dumps(gauge)}"]
    flags += ["--trainer.logger=true", "--checkpoint.every_n_steps=200", "--trust", MODULE]
    flags += ["--trainer.check_val_every_n_epoch=5"]
    process = Forks().start(main, tmp_path, ["fit", "--config", str(path), *flags])
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "gauge").read_text().splitlines()]
    assert len(rows) == STEPS // EVERY
    # The first two validations, after 500 and 1,000 steps, start workers of their own.
    warm, end = rows[len(rows) // 2 : -len(rows) // 4], rows[-len(rows) // 4 :]
    memory = [max(row[0] for row in part) for part in (warm, end)]
    print(f"{memory[0] / 2**20:.1f} MiB after the warm-up, {memory[1] / 2**20:.1f} at the end")
    assert memory[1] < 1.02 * memory[0]
    # Batches on their way from a worker are open files, so that the number varies.
    for column in (1, 2):
        medians = [statistics.median(row[column] for row in part) for part in (warm, end)]
        assert medians[1] <= medians[0]
