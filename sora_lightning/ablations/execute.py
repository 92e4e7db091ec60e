"""What the process of a run does. It imports little, since every run starts with it."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

from sora_lightning.cli.errors import stopped_by_signals
from sora_lightning.workflows.stages import Stage, run_stages


def execute(stages: Sequence[Stage], folder: Path) -> None:
    """Run the stages of a run in this process. On SIGTERM the training saves its state first."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit ignores it
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with stopped_by_signals(saves=False):
        run_stages(stages, folder)
