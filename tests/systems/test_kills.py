"""Commands that are killed leave no process behind, and finish when they are started again."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.processes import require_none_left, start

pytestmark = pytest.mark.slow

Command = tuple[list[str], Callable[[], Any]]  # arguments, and what the whole result is


@pytest.fixture
def commands(
    fit: Callable[..., Path],
    diffusion_model: dict[str, Any],
    clips: dict[str, Path],
    tmp_path: Path,
) -> dict[str, Command]:
    diffusion = fit({"model": diffusion_model}, tmp_path / "diffusion", "--trainer.max_steps=1")
    (tmp_path / "prompts.txt").write_text("".join(f"a red circle {i}\n" for i in range(24)))
    sample = ["sample", "--checkpoint", str(diffusion), "--prompts", "prompts.txt"]
    sample += ["--size", "16x16", "--num-frames", "5", "--num-steps", "20", "--output", "videos"]
    index = ["index", "--source", str(clips["train"].parent), "--output", "all.jsonl"]
    return {
        "sample": (sample, lambda: sorted(p.name for p in (tmp_path / "videos").glob("*.mp4"))),
        "index": (index, lambda: (tmp_path / "all.jsonl").read_text()),
    }


@pytest.mark.parametrize("name", ["sample", "index"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_command_that_is_killed_leaves_nothing_running_and_finishes_the_next_time(
    name: str, number: signal.Signals, commands: dict[str, Command], tmp_path: Path
) -> None:
    arguments, result = commands[name]
    draw = random.Random(f"{name} {number}")
    for kill in range(3):
        process = start(["sora_lightning", *arguments], tmp_path)
        time.sleep(draw.uniform(4, 12) / (kill + 1))
        process.send_signal(number)
        assert process.wait(30) in (0, -number, 128 + number)
        require_none_left(process.pid)
    process = start(["sora_lightning", *arguments], tmp_path)
    assert process.wait(300) == 0, (tmp_path / "log").read_text()[-3000:]
    killed = result()
    assert killed
    process = start(["sora_lightning", *arguments], tmp_path)  # there is nothing left to do
    assert process.wait(300) == 0
    assert result() == killed
