"""Runs are the tasks of a SLURM array; skipped, with the reason, where no SLURM answers."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest

from sora_lightning.ablations.runs import run_all
from sora_lightning.ablations.spec import Schedule
from sora_lightning.workflows.stages import StageFailed
from tests.ablations.test_runs import _ablation, _lines, _run, workplace

__all__ = ["workplace"]


def _partition() -> str:
    """Return the default partition. Skips without one that is up."""
    if shutil.which("sinfo") is None:
        pytest.skip("no SLURM here: sinfo is missing")
    found = subprocess.run(["sinfo", "-h", "-o", "%P %a %T"], capture_output=True, text=True)
    for name, available, state in map(str.split, found.stdout.splitlines()):
        if available == "up" and state in ("idle", "mixed", "allocated"):
            return name.rstrip("*")
    pytest.skip(f"no SLURM partition is up: {found.stdout}{found.stderr}")


@pytest.mark.slow
def test_an_array_runs_all_and_a_second_call_the_failed_ones_alone(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm = {"slurm_partition": _partition(), "timeout_min": 5, "slurm_cpus_per_task": 1}
    spec = dataclasses.replace(_ablation(), schedule=Schedule(at_once=2, slurm=slurm))  # type: ignore[type-var]
    with pytest.raises(StageFailed, match=r"1 of 3 runs failed.*\n  two/seed-0: .*\.err"):
        run_all(spec, [_run("one"), _run("two", "fails"), _run("three")])  # type: ignore[arg-type]
    assert sorted(line.split()[0] for line in _lines()) == [
        f"{arm}/seed-0" for arm in ("one", "three", "two")
    ]
    jobs = [line.split() for line in capsys.readouterr().out.splitlines() if ": job " in line]
    assert len(jobs) == 3
    assert len({job[-1].split("_")[0] for job in jobs}) == 1  # of one array

    run_all(spec, [_run("one"), _run("two"), _run("three")])  # type: ignore[arg-type]
    assert [line.split()[0] for line in _lines()[3:]] == ["two/seed-0"]
