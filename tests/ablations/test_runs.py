"""Runs are processes of their own: finished ones are skipped, failing ones leave the others
running, and interrupted trainings resume.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sora_lightning.__main__ import main
from sora_lightning.ablations.clip_losses import write_clip_losses
from sora_lightning.ablations.runs import Run, plan_runs, run_all
from sora_lightning.ablations.spec import load_ablation
from sora_lightning.workflows.stages import Stage, StageFailed
from tests.ablations.conftest import ablation, write

_ROOT = Path(__file__).resolve().parents[2]
# A training: notes its process, writes a checkpoint, and ends at once, never, or with an error.
_WORK = """
import os, pathlib, sys, time, zipfile
name, behaviour, *rest = sys.argv[1:]
with open("log", "a") as log: log.write(f"{name} {os.getpid()} {' '.join(rest)}\\n")
if behaviour == "fails": sys.exit("it fails")
folder = pathlib.Path("out", *name.split("/"), "training", "checkpoints")
folder.mkdir(parents=True, exist_ok=True)
zipfile.ZipFile(folder / "last.ckpt", "w").writestr("state", name)
if behaviour == "waits" and "--ckpt_path" not in rest: time.sleep(600)
"""


def _run(arm: str, behaviour: str = "ends") -> Run:
    folder = Path("out", arm, "seed-0")
    last = folder / "training" / "checkpoints" / "last.ckpt"
    command = ("python", "work.py", f"{arm}/seed-0", behaviour)
    stage = Stage("training", command, (folder / "training",), (last,), checkpoint=last)
    return Run(arm, 0, folder, (stage,))


def _lines() -> list[str]:
    return Path("log").read_text().splitlines() if Path("log").exists() else []


def _ablation(at_once: int = 1) -> object:
    spec = load_ablation(write("ablation.yaml", ablation(schedule={"at_once": at_once})))
    return dataclasses.replace(spec, output=Path("out"))


@pytest.fixture
def workplace(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(_ROOT))
    Path("work.py").write_text(_WORK)
    return place


def test_a_failing_run_leaves_the_others_running_and_finished_ones_are_skipped(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [_run("one"), _run("two", "fails"), _run("three")]
    with pytest.raises(StageFailed, match=r"1 of 3 runs failed.*\n  two/seed-0: .*\.err"):
        run_all(_ablation(), runs)  # type: ignore[arg-type]
    ran = [line.split() for line in _lines()]
    assert [name for name, *_ in ran] == ["one/seed-0", "two/seed-0", "three/seed-0"]
    assert len({pid for _, pid, *_ in ran}) == 3
    assert str(os.getpid()) not in {pid for _, pid, *_ in ran}
    said = capsys.readouterr().out
    assert "two/seed-0: FAILED" in said
    log = next(line for line in said.splitlines() if line.startswith("two/seed-0: started"))
    assert "it fails" in Path(log.split(", ")[1].replace("log.out", "log.err")).read_text()

    run_all(_ablation(), [_run("one"), _run("two"), _run("three")])  # type: ignore[arg-type]
    assert [line.split()[0] for line in _lines()[3:]] == ["two/seed-0"]
    assert "2 of 3 runs are finished" in capsys.readouterr().out
    run_all(_ablation(), [_run("one"), _run("two"), _run("three")])  # type: ignore[arg-type]
    assert len(_lines()) == 4


_STOPPED = """
import sys; sys.path.insert(0, {root!r})
from sora_lightning.cli.errors import stopped_by_signals
from tests.ablations.test_runs import _ablation, _run
from sora_lightning.ablations.runs import run_all
with stopped_by_signals(saves=False):
    run_all(_ablation(2), [_run("one", "waits"), _run("two", "waits"), _run("three")])
"""


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGKILL)),
    ],
    ids=str,
)
def test_runs_that_were_stopped_end_and_resume_from_their_checkpoints(
    workplace: Path, number: int
) -> None:
    command = [sys.executable, "-c", _STOPPED.format(root=str(_ROOT))]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    last = [Path("out", arm, "seed-0/training/checkpoints/last.ckpt") for arm in ("one", "two")]
    try:
        _wait(lambda: all(path.exists() for path in last), 300)
        pids = [int(line.split()[1]) for line in _lines()]
        assert len(pids) == 2  # at once
        process.send_signal(number)
        assert process.wait(60) != 0
    finally:
        process.terminate()
    _wait(lambda: not any(Path("/proc", str(pid)).exists() for pid in pids), 10)

    runs = [_run("one", "waits"), _run("two", "waits"), _run("three")]
    run_all(_ablation(2), runs)  # type: ignore[arg-type]
    resumed = sorted(_lines()[2:])
    assert [line.split()[0] for line in resumed] == ["one/seed-0", "three/seed-0", "two/seed-0"]
    assert [line.split()[2:] for line in resumed] == [
        ["--ckpt_path", "last"],
        [],
        ["--ckpt_path", "last"],
    ]
    assert all(run.is_finished for run in runs)


def _wait(condition: object, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.1)


def test_runs_go_through_all_arms_before_the_next_seed_and_give_fit_what_was_planned(
    place: Path,
) -> None:
    from sora_lightning.ablations.plan import make_plan

    changes = {"protocol": ["--protocol", "demo"], "overrides": {"trainer.max_steps": 7}}
    spec = load_ablation(write("ablation.yaml", ablation(**changes)))
    runs = plan_runs(spec, make_plan(spec))
    assert [run.name for run in runs] == [
        "joint/seed-0", "factorised/seed-0", "joint/seed-1", "factorised/seed-1"
    ]  # fmt: skip
    training, losses, evaluation = runs[3].stages
    assert training.command[:2] == ("sora-lightning", "fit")
    given = set(training.command)
    assert {"base.yaml", "factorised.yaml", "--trainer.max_steps=7"} <= given
    seeds = ("seed_everything", "model.init_args.seed", "data.batching.seed")
    assert {f"--{key}=1" for key in seeds} <= given
    assert "--run_dir=out/factorised/seed-1/training" in given
    assert training.checkpoint == Path("out/factorised/seed-1/training/checkpoints/last.ckpt")
    assert str(training.checkpoint) in evaluation.command
    assert losses.records == (Path("out/factorised/seed-1/clip_losses.csv"),)
    assert training.reads == (Path("base.yaml"), Path("factorised.yaml"))


def test_arms_of_different_sizes_are_measured_on_clips_of_the_same(place: Path) -> None:
    from sora_lightning.ablations.plan import make_plan

    size = {"data.batching.sizes": ["9x32x32"], "data.batching.pixels_per_batch": 19000}
    small = {"overrides": {"data.batching.sizes": ["5x24x24"]}}
    packing = {"tokens": 64, "compression": "2x8x8", "patch": [1, 1, 1], "max_frames": 5}
    none = {"data.batching.sizes": None, "data.batching.pixels_per_batch": None}
    packed = {"overrides": {"data.packing": packing | {"max_pixels": 1024}, **none}}
    arms = {"own": {}, "small": small, "packed": packed}
    values = ablation(arms=arms, seeds=[0], clip_overrides={"data.packing": None, **size})
    spec = load_ablation(write("ablation.yaml", values))
    seen = []
    for run in plan_runs(spec, make_plan(spec)):
        training, losses = run.stages
        assert main(training.command[1:]) == 0
        given = json.loads(losses.command[-1])
        write_clip_losses(run.folder / "training", Path("losses.csv"), 1, given)
        with Path("losses.csv").open() as file:
            seen.append([(row["clip"], row["size"]) for row in csv.DictReader(file)])
    assert len(seen[0]) == 6
    assert {size for _, size in seen[0]} == {"9x32x32"}
    assert seen[0] == seen[1] == seen[2]
