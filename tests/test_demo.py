"""A stage is skipped exactly when what decides it and what it wrote are unchanged; an interrupted
one goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from sora_lightning.workflows.demo import demo_stages
from sora_lightning.workflows.stages import Stage, StageFailed, run_stages

# Appends a line to a log, so that a test sees what ran, and writes its result.
_WORK = """
import sys, pathlib
name, result, *rest = sys.argv[1:]
with open("log", "a") as log: log.write(" ".join([name, *rest]) + "\\n")
pathlib.Path(result).parent.mkdir(parents=True, exist_ok=True)
pathlib.Path(result).write_text(name)
"""


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Stage]:
    monkeypatch.chdir(tmp_path)
    Path("work.py").write_text(_WORK)
    for name in ("a", "b", "c"):
        Path(f"{name}.yaml").write_text(f"name: {name}")
    return [_stage(name) for name in ("a", "b", "c")]


def _stage(name: str) -> Stage:
    result = Path("out", name, "result")
    return Stage(
        name,
        ("python", "work.py", name, str(result)),
        makes=(result.parent,),
        records=(result,),
        reads=(Path(f"{name}.yaml"),),
    )


def _ran() -> list[str]:
    log = Path("log")
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


def test_a_second_run_runs_nothing(stages: list[Stage]) -> None:
    run_stages(stages, Path("out"))
    assert _ran() == ["a", "b", "c"]
    run_stages(stages, Path("out"))
    assert _ran() == []


def test_an_edited_yaml_runs_its_stage_and_all_after_it(stages: list[Stage]) -> None:
    run_stages(stages, Path("out"))
    _ran()
    Path("b.yaml").write_text("name: b\nsteps: 2")
    run_stages(stages, Path("out"))
    assert _ran() == ["b", "c"]


def test_another_command_runs_its_stage_and_all_after_it(stages: list[Stage]) -> None:
    run_stages(stages, Path("out"))
    _ran()
    longer = replace(stages[1], command=(*stages[1].command, "--steps=3"))
    run_stages([stages[0], longer, stages[2]], Path("out"))
    assert _ran() == ["b --steps=3", "c"]


def test_another_result_of_a_stage_runs_all_after_it(stages: list[Stage]) -> None:
    run_stages(stages, Path("out"))
    _ran()
    stages[1].records[0].unlink()
    Path("work.py").write_text(_WORK.replace("write_text(name)", "write_text(name * 2)"))
    run_stages(stages, Path("out"))
    assert _ran() == ["b", "c"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stage_whose_command_is_killed_does_not_count_as_done(
    stages: list[Stage], number: int
) -> None:
    killed = f"import os; open('out/b', 'w'); os.kill(os.getpid(), {int(number)})"
    half = replace(stages[1], command=("python", "-c", killed), records=(Path("out/b"),))
    with pytest.raises(StageFailed, match="stage b failed"):
        run_stages([stages[0], half, stages[2]], Path("out"))
    assert "wrote" not in json.loads(Path("out/stages/b.json").read_text())
    assert _ran() == ["a"]


def test_without_a_whole_checkpoint_an_interrupted_training_starts_afresh(
    stages: list[Stage],
) -> None:
    checkpoint = Path("out/a/last.ckpt")
    training = replace(stages[0], checkpoint=checkpoint)
    _interrupt(training, checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:10])
    run_stages([training], Path("out"))
    assert _ran() == ["a"]


@pytest.mark.parametrize("damage", ["removed", "replaced by as many bytes"])
def test_a_damaged_result_is_made_again(stages: list[Stage], damage: str) -> None:
    run_stages(stages, Path("out"))
    _ran()
    result = stages[1].records[0]
    result.unlink()
    if damage != "removed":
        result.write_text("B")
    run_stages(stages, Path("out"))
    assert _ran()[0] == "b"
    assert result.read_text() == "b"


def test_a_source_file_decides_and_a_cache_of_it_does_not(stages: list[Stage]) -> None:
    Path("package/__pycache__").mkdir(parents=True)
    Path("package/code.py").write_text("x = 1")
    one = [replace(stages[0], reads=(Path("package"),))]
    run_stages(one, Path("out"))
    Path("package/__pycache__/code.py").write_text("compiled")
    run_stages(one, Path("out"))
    assert _ran() == ["a"]
    Path("package/code.py").write_text("x = 2")
    run_stages(one, Path("out"))
    assert _ran() == ["a"]


def test_a_failing_stage_stops_the_run_and_is_tried_again(stages: list[Stage]) -> None:
    broken = replace(stages[1], command=("python", "-c", "raise SystemExit(3)"))
    with pytest.raises(StageFailed, match=r"stage b failed \(exit code 3\)"):
        run_stages([stages[0], broken, stages[2]], Path("out"))
    assert _ran() == ["a"]
    run_stages(stages, Path("out"))
    assert _ran() == ["b", "c"]


def test_a_stage_that_writes_nothing_does_not_count_as_done(stages: list[Stage]) -> None:
    with pytest.raises(StageFailed, match="did not write"):
        run_stages([replace(stages[0], command=("python", "-c", ""))], Path("out"))


def _interrupt(stage: Stage, checkpoint: Path) -> None:
    """Leave things as an interrupted call of this stage does: a stamp without results, and a
    checkpoint."""
    Path("work.py").write_text("raise SystemExit(1)")
    with pytest.raises(StageFailed):
        run_stages([stage], Path("out"))
    Path("work.py").write_text(_WORK)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(checkpoint, "w"):  # the container that torch.save writes
        pass


def test_an_interrupted_training_goes_on_from_its_checkpoint(stages: list[Stage]) -> None:
    checkpoint = Path("out/a/last.ckpt")
    training = replace(stages[0], checkpoint=checkpoint)
    _interrupt(training, checkpoint)
    run_stages([training], Path("out"))
    assert _ran() == ["a --ckpt_path last"]
    assert checkpoint.exists()
    run_stages([training], Path("out"))
    assert _ran() == []


def test_an_interrupted_training_of_another_configuration_starts_afresh(
    stages: list[Stage],
) -> None:
    checkpoint = Path("out/a/last.ckpt")
    training = replace(stages[0], checkpoint=checkpoint)
    _interrupt(training, checkpoint)
    Path("a.yaml").write_text("name: a\nwidth: 64")
    run_stages([training], Path("out"))
    assert _ran() == ["a"]
    assert not checkpoint.exists()


def test_a_stamp_cut_short_counts_as_none(stages: list[Stage]) -> None:
    run_stages(stages[:1], Path("out"))
    Path("out/stages/a.json").write_text('{"key": "12')
    run_stages(stages[:1], Path("out"))
    assert _ran() == ["a", "a"]


def test_a_folder_with_files_of_somebody_else_is_refused_and_left_alone(
    stages: list[Stage],
) -> None:
    Path("out/a").mkdir(parents=True)
    Path("out/a/thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="--output out: holds files"):
        run_stages(stages, Path("out"))
    assert Path("out/a/thesis.txt").read_text() == "precious"
    assert _ran() == []


@pytest.mark.parametrize(
    ("number", "whole_group", "code", "said"),
    [
        (signal.SIGINT, True, 130, "interrupted"),
        pytest.param(signal.SIGTERM, False, 143, "stopped by SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_with_a_sentence_and_lets_the_command_save(
    tmp_path: Path, number: int, whole_group: bool, code: int, said: str
) -> None:
    root = Path(__file__).resolve().parents[1]
    child = (
        "import signal, time\n"
        "for number in (signal.SIGINT, signal.SIGTERM):\n"
        "    signal.signal(number, signal.default_int_handler)\n"
        "try: open('up', 'w'); time.sleep(60)\n"
        "except KeyboardInterrupt: open('saved', 'w')"
    )
    script = f"""
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
import sora_lightning.__main__ as program, sora_lightning.workflows.demo as demo
from sora_lightning.workflows.stages import Stage
demo.demo_stages = lambda *settings: [Stage("a", ("python", "-c", {child!r}), (), ())]
sys.exit(program.main(["demo", "--output", "out"]))
"""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300  # a busy machine takes a minute
    while not (tmp_path / "up").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert said in errors
    assert "Traceback" not in errors
    assert (tmp_path / "saved").exists()


def test_the_commands_of_the_demo_name_paths_only_where_the_yamls_do_not() -> None:
    usual = {stage.name: stage.command for stage in demo_stages(Path("runs/demo"))}
    moved = {stage.name: stage.command for stage in demo_stages(Path("runs/other"))}
    assert usual["tokenizer"] == (
        "sora-lightning",
        "fit",
        "--config",
        "experiments/demo/tokenizer.yaml",
    )
    assert "runs/demo" not in json.dumps(moved)
    assert "runs/other/tokenizer" in moved["tokenizer"]
    assert "runs/other/latents" in moved["latents"]
    assert "runs/other/captions/captioned.jsonl" in moved["text_to_video"]


def test_a_seed_reaches_weights_draws_and_order_of_all_trainings_and_nothing_else() -> None:
    keys = ("--seed_everything", "--model.init_args.seed", "--data.batching.seed")
    given = tuple(part for key in keys for part in (key, "2"))
    usual, seeded = (demo_stages(Path("runs/demo"), seed=seed) for seed in (0, 2))
    for before, after in zip(usual, seeded, strict=True):
        added = {"tokenizer": given, "captioner": given, "text_to_video": given}
        added["expansion"] = ("--seed", "2")
        assert after.command == before.command + added.get(before.name, ())
