"""The runs of an ablation: a training and its scores for each arm and seed, in processes of their
own, started through submitit.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import submitit
import torch

from sora_lightning.ablations.execute import execute
from sora_lightning.ablations.plan import PlannedArm
from sora_lightning.ablations.spec import Ablation, report_folder
from sora_lightning.cli.errors import Terminated
from sora_lightning.cli.preflight import lock
from sora_lightning.workflows.stages import (
    Stage,
    StageFailed,
    fit,
    last_checkpoint,
    up_to_date,
)

_YEAR_MINUTES = 365 * 24 * 60  # a training ends by its steps or its own time


@dataclass(frozen=True)
class Run:
    """A training of an arm with a seed, and its scores, as stages."""

    arm: str
    seed: int
    folder: Path
    stages: tuple[Stage, ...]

    @property
    def name(self) -> str:
        return f"{self.arm}/seed-{self.seed}"

    @property
    def is_finished(self) -> bool:
        return up_to_date(self.stages, self.folder)


def plan_runs(ablation: Ablation, arms: Sequence[PlannedArm]) -> list[Run]:
    """Return the runs, all arms of the first seed before those of the second, so that arms can be
    compared early.
    """
    return [
        Run(arm.name, seed, ablation.run_folder(arm.name, seed), _stages(ablation, arm, seed))
        for seed in ablation.seeds
        for arm in arms
    ]


def _stages(ablation: Ablation, arm: PlannedArm, seed: int) -> tuple[Stage, ...]:
    """Return the training and what scores it.

    Only the YAMLs and the command decide whether a training stands, not the sources of this
    package: hours of training would be lost to an edited docstring. The report names the commits.
    """
    run, folder = ablation.run_dir(arm.name, seed), ablation.run_folder(arm.name, seed)
    training = fit("training", run, arm.configs, *arm.fit_arguments(seed), f"--run_dir={run}")
    stages = [replace(training, reads=arm.configs)]
    if ablation.clip_losses:
        stages.append(_clip_losses(folder, run, ablation.clip_overrides))
    for name, arguments in ablation.protocols.items():
        stages.append(_evaluation(name, arguments, report_folder(folder, name), run))
    return tuple(stages)


def _clip_losses(folder: Path, run: Path, overrides: Mapping[str, Any]) -> Stage:
    output = folder / "clip_losses.csv"
    module = "sora_lightning.ablations.clip_losses"
    given = ("--overrides", json.dumps(overrides)) if overrides else ()
    command = ("python", "-m", module, "--run", f"{run}", "--output", f"{output}", *given)
    return Stage("clip_losses", command, makes=(output,), records=(output,))


def _evaluation(name: str, arguments: Sequence[str], report: Path, run: Path) -> Stage:
    command = (
        *("python", "-m", "evaluation", "--checkpoint", f"{last_checkpoint(run)}"),
        *(*arguments, "--output", f"{report}"),
    )
    stage = f"evaluation_{name}" if name else "evaluation"
    return Stage(stage, command, makes=(report,), records=(report / "report.json",))


def run_all(ablation: Ablation, runs: Sequence[Run]) -> None:
    """Run what is not finished.

    Raises:
        StageFailed: Some runs failed, once all others have ended; names them and their logs.
        KeyboardInterrupt: Passed on once the running trainings have saved their states, and
            likewise ``Terminated``.
    """
    waiting = [run for run in runs if not run.is_finished]
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished", flush=True)
    if not waiting:
        return
    logs = ablation.output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    start = _submitted_to_slurm if ablation.schedule.slurm is not None else _started_here
    failed = list(start(ablation, waiting, logs))
    if failed:
        lines = "".join(f"\n  {run.name}: {job.paths.stderr}" for run, job in failed)
        raise StageFailed(f"{len(failed)} of {len(runs)} runs failed; their logs:{lines}")


Failed = Iterator[tuple[Run, Any]]


def _submitted_to_slurm(ablation: Ablation, runs: Sequence[Run], logs: Path) -> Failed:
    """Run as an array of jobs, ``at_once`` at a time."""
    executor = submitit.AutoExecutor(logs, cluster="slurm")
    executor.update_parameters(
        name=ablation.output.name,
        slurm_array_parallelism=ablation.schedule.at_once,
        **(ablation.schedule.slurm or {}),
    )
    jobs = executor.map_array(execute, [run.stages for run in runs], [run.folder for run in runs])
    for run, job in zip(runs, jobs, strict=True):
        print(f"{run.name}: job {job.job_id}", flush=True)
    for run, job in zip(runs, jobs, strict=True):
        if not _ended_well(run, job):
            yield run, job


def _started_here(ablation: Ablation, runs: Sequence[Run], logs: Path) -> Failed:
    """Run on this machine, ``at_once`` at a time."""
    executor = submitit.LocalExecutor(logs)
    held = lock(logs)
    slots: list[tuple[Run, Any] | None] = [None] * ablation.schedule.at_once
    waiting = list(runs)
    try:
        while waiting or any(slots):
            for number, running in enumerate(slots):
                if running is not None and running[1].done():
                    slots[number] = None
                    if not _ended_well(*running):
                        yield running
                if slots[number] is None and waiting:
                    slots[number] = _start(executor, waiting.pop(0), number, len(slots), held)
            time.sleep(0.2)
    except (KeyboardInterrupt, Terminated):
        _stop([running[1] for running in slots if running is not None])
        raise


def _start(
    executor: Any, run: Run, slot: int, num_slots: int, held: IO[str] | None
) -> tuple[Run, Any]:
    """Start a run. The devices are shared out evenly among the runs that train at once."""
    devices = range(torch.cuda.device_count())[slot::num_slots] or range(torch.cuda.device_count())
    executor.update_parameters(
        timeout_min=_YEAR_MINUTES, gpus_per_node=len(devices), visible_gpus=list(devices)
    )
    with _ignoring_interrupts():
        job = executor.submit(execute, run.stages, run.folder, held and Path(held.name))
    print(f"{run.name}: started, {job.paths.stdout}", flush=True)
    return run, job


def _ended_well(run: Run, job: Any) -> bool:
    error = job.exception()
    print(f"{run.name}: {'finished' if error is None else 'FAILED'}", flush=True)
    return error is None


def _stop(jobs: Sequence[Any]) -> None:
    """Let trainings save their states and wait for them to end."""
    for job in jobs:
        os.kill(int(job.job_id), signal.SIGTERM)  # of a local job the process, which passes it on
    for job in jobs:
        job.wait()


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Let processes that are started here ignore Ctrl-C, which reaches every process of a
    terminal: they are stopped by ``_stop``, and then save."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
