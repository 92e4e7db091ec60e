"""The scripts that start a training on several GPUs and nodes give arguments that parse."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.test_readme import Parsed, parse

_ROOT = Path(__file__).resolve().parents[1]


def _started(script: str, folder: Path) -> list[str]:
    """Run a script with stand-ins for the launchers, and return what it gives to them."""
    for launcher in ("srun", "torchrun"):
        (folder / launcher).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (folder / launcher).chmod(0o755)
    path = _ROOT / "experiments" / "cluster" / script
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    command = ["bash", "-eu", str(path)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("script", ["slurm.sh", "torchrun.sh"])
def test_a_script_starts_a_training_that_parses(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = _started(script, tmp_path)
    monkeypatch.chdir(_ROOT)
    with pytest.raises(Parsed):
        parse(given[given.index("fit") :])
    if script == "torchrun.sh":
        devices = given[given.index("--trainer.devices") + 1]
        assert given[:5] == ["--nproc-per-node", devices, "-m", "sora_lightning", "fit"]


def test_slurm_starts_a_task_for_each_device_and_resumes_what_it_finds(tmp_path: Path) -> None:
    text = (_ROOT / "experiments" / "cluster" / "slurm.sh").read_text()
    asked = dict(re.findall(r"#SBATCH --([\w-]+)=(\d+)", text))
    first = _started("slurm.sh", tmp_path)
    for key, flag in (("nodes", "num_nodes"), ("ntasks-per-node", "devices")):
        assert first[first.index(f"--trainer.{flag}") + 1] == asked[key]
    assert asked["gpus-per-node"] == asked["ntasks-per-node"]
    assert "--ckpt_path" not in first
    checkpoints = Path(first[first.index("--run_dir") + 1], "checkpoints")
    (tmp_path / checkpoints).mkdir(parents=True)
    (tmp_path / checkpoints / "last.ckpt").write_text("")
    assert _started("slurm.sh", tmp_path) == [*first, "--ckpt_path", "last"]
