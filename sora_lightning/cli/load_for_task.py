"""Loads the model of ``sample``. Apart from the command, whose help does not wait for Lightning."""

from __future__ import annotations

from pathlib import Path

from sora_lightning.checks import require_file
from sora_lightning.cli.sample_tasks import TASKS
from sora_lightning.systems import DiffusionSystem


def load_for_task(checkpoint: Path, task: str) -> DiffusionSystem:
    """Load a system for a task. Raises ``ValueError`` where it was not trained for it."""
    require_file("--checkpoint", checkpoint)
    system = DiffusionSystem.from_checkpoint(checkpoint)
    if task == "instruct" and not system.known_frames.needs_source:
        raise ValueError(
            f"--task instruct: {checkpoint} was not trained on edits (its masks have no "
            "VideoEditing)"
        )
    if TASKS[task].knows_frames and not system.known_frames.masks:
        raise ValueError(
            f"--task {task}: {checkpoint} was not trained on known frames (its known_frames has no "
            "masks), and would ignore those that it is given"
        )
    return system
