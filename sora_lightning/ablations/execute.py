"""Entry point of a run's process. It imports little, since every run starts with it."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from threading import Thread

from sora_lightning.cli.errors import stopped_by_signals
from sora_lightning.workflows.stages import Stage, run_stages


def execute(stages: Sequence[Stage], folder: Path, held: Path | None = None) -> None:
    """Run the stages of a run in this process. On SIGTERM the training saves its state first.

    ``held`` is a file that the process of ``ablate`` keeps locked: once that is gone, killed even,
    this one ends as on SIGTERM.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit ignores it
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with stopped_by_signals(saves=False):
        if held is not None:
            Thread(target=_end_once_free, args=(held,), daemon=True).start()
        run_stages(stages, folder)


def _end_once_free(held: Path) -> None:
    with held.open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)  # waits
    os.kill(os.getpid(), signal.SIGTERM)
