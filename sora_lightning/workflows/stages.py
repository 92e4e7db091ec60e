"""Runs commands one after the other, and skips those whose result is up to date.

A stage's key is a hash of all that decides its result: its command, the YAMLs and sources it reads,
and the stamp of the previous stage. Its stamp holds the key and the size and hash of every file it
wrote. A stage is skipped only if both are unchanged, so that neither an edited YAML nor a lost or
replaced file leaves a stale result.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from sora_lightning.cli.errors import Terminated
from sora_lightning.files import PACKAGE, file_sha256, find_config
from sora_lightning.trust import check_evaluation

LIBRARY, EVALUATION = PACKAGE, PACKAGE.parent / "evaluation"  # sources that decide results
_PROGRAMS = {"sora-lightning": ("-m", "sora_lightning"), "python": ()}
_PR_SET_PDEATHSIG, _prctl = 1, getattr(ctypes.CDLL(None), "prctl", None)  # Linux has it
_SOURCES = (".py", ".yaml", ".txt")


@dataclass(frozen=True)
class Stage:
    """One command, as a user would type it, and its outputs.

    Args:
        name: Names the stamp; unique among the stages.
        command: Starts with ``sora-lightning`` or ``python``; both run with this interpreter.
        makes: The files and folders that belong to the stage alone: removed before it starts
            afresh.
        records: The files and folders whose content the stamp holds; others in ``makes`` may change
            later, as TensorBoard's do.
        reads: Files and folders of sources that decide the result beside the command.
        checkpoint: An interrupted training resumes from it, with ``--ckpt_path last``.
        resumes: Whether the command itself resumes after an interrupted call.
    """

    name: str
    command: tuple[str, ...]
    makes: tuple[Path, ...]
    records: tuple[Path, ...]
    reads: tuple[Path, ...] = ()
    checkpoint: Path | None = None
    resumes: bool = False


def synthesize(output: Path, *arguments: str) -> Stage:
    """Render captioned clips to ``output/data``."""
    data = output / "data"
    command = ("sora-lightning", "synthesize", "--root", f"{data}", *arguments)
    return Stage("clips", command, makes=(data,), records=(data,), reads=(LIBRARY / "data",))


def fit(name: str, run: Path, configs: Sequence[Path], *arguments: str) -> Stage:
    """Train by YAMLs of which each overrides the one before; ``run`` is the training's run_dir."""
    given = (part for config in configs for part in ("--config", f"{config}"))
    command = ("sora-lightning", "fit", *given, *arguments)
    last = last_checkpoint(run)
    return Stage(name, command, (run,), (last,), reads=(*configs, LIBRARY), checkpoint=last)


def encode(output: Path, config: Path, *arguments: str) -> Stage:
    """Write the latents of a training's clips to ``output/latents``."""
    latents = output / "latents"
    command = ("sora-lightning", "predict", "--config", f"{config}", "--ckpt_path", "last")
    return Stage("latents", (*command, *arguments), (latents,), (latents,), (config, LIBRARY))


def seeded(seed: int) -> tuple[str, ...]:
    """Return the arguments of ``fit`` that draw initial weights, order of clips, times and noise
    by ``seed``; none for 0, the default of each."""
    keys = ("seed_everything", "model.init_args.seed", "data.batching.seed")
    return tuple(part for key in keys for part in (f"--{key}", f"{seed}")) if seed else ()


def last_checkpoint(run: Path) -> Path:
    """Return the last checkpoint of a training in its run_dir."""
    return run / "checkpoints" / "last.ckpt"


class StageFailed(RuntimeError):
    """A command ended with another exit code than 0."""


def up_to_date(stages: Sequence[Stage], output: Path) -> bool:
    """Return True if ``run_stages`` would run nothing."""
    previous = ""
    for stage in stages:
        previous, stamp = stage_key(stage, previous), output / "stages" / f"{stage.name}.json"
        if not _stands(stage, previous, stamp):
            return False
        previous = hashlib.sha256(stamp.read_bytes()).hexdigest()
    return True


def run_stages(stages: Sequence[Stage], output: Path) -> None:
    """Run the stages that are not up to date, in order; stamps go to ``output/stages``.

    Raises:
        ValueError: ``output`` holds something that no stage made, which a fresh start might remove;
            or another package is named ``evaluation``, which stages run.
        StageFailed: A command failed; those after it did not run.
        KeyboardInterrupt: Passed on once the running command has saved what it saves.
    """
    check_evaluation()
    stamps = output / "stages"
    if output.is_dir() and any(output.iterdir()) and not stamps.is_dir():
        raise ValueError(f"--output {output}: holds files of something else; choose another folder")
    stamps.mkdir(parents=True, exist_ok=True)
    started, previous = time.monotonic(), ""
    for number, stage in enumerate(stages, 1):
        previous = stage_key(stage, previous)
        stamp = stamps / f"{stage.name}.json"
        print(f"\n[{number}/{len(stages)}] {stage.name}", flush=True)
        if _stands(stage, previous, stamp):
            print("  up to date", flush=True)
        else:
            begun = time.monotonic()
            _run(stage, previous, stamp)
            print(f"  {stage.name}: {_duration(time.monotonic() - begun)}", flush=True)
        previous = hashlib.sha256(stamp.read_bytes()).hexdigest()
    print(f"\nall stages: {_duration(time.monotonic() - started)}", flush=True)


def stage_key(stage: Stage, previous: str) -> str:
    """Return the SHA-256 of all that decides the stage's result; ``previous`` is the hash of the
    stamp
    of the previous stage."""
    digest = hashlib.sha256(json.dumps([previous, stage.command, version("torch")]).encode())
    for path in map(find_config, stage.reads):
        if not path.exists():
            raise ValueError(f"stage {stage.name} reads {path}, which is not here")
        for file in sorted(_files(path)):
            if file.suffix in _SOURCES:
                digest.update(f"{file.relative_to(path.parent)} ".encode() + file.read_bytes())
    return digest.hexdigest()


def _stands(stage: Stage, key: str, stamp: Path) -> bool:
    recorded = _read(stamp)
    return recorded.get("key") == key and recorded.get("wrote") == _written(stage)


def _run(stage: Stage, key: str, stamp: Path) -> None:
    before = _read(stamp)
    interrupted = before.get("key") == key and "wrote" not in before
    command = stage.command
    if interrupted and stage.checkpoint is not None and _whole_checkpoint(stage.checkpoint.parent):
        command = (*command, "--ckpt_path", "last")
    elif not (interrupted and stage.resumes):
        _remove(stage)
    stamp.write_text(json.dumps({"key": key, "command": command}))
    print(f"  $ {shlex.join(command)}", flush=True)
    code = _call([sys.executable, *_PROGRAMS[command[0]], *command[1:]])
    if code:
        raise StageFailed(f"stage {stage.name} failed (exit code {code}): $ {shlex.join(command)}")
    wrote = _written(stage)
    for path in stage.records:
        if not path.exists():
            raise StageFailed(f"stage {stage.name} ended well but did not write {path}")
    stamp.write_text(json.dumps({"key": key, "command": command, "wrote": wrote}, indent=1))


def _whole_checkpoint(folder: Path) -> bool:
    """Return True if one of the checkpoints there is complete."""
    return any(is_zipfile(path) for path in folder.glob("*.ckpt"))


def _call(arguments: list[str]) -> int:
    """Run a process. An interrupt is forwarded to it, and raised once it has saved its state; on
    Linux it is also sent SIGTERM where this process is killed."""
    process = subprocess.Popen(arguments, preexec_fn=_end_with_parent)
    try:
        return process.wait()
    except (KeyboardInterrupt, Terminated) as error:
        if isinstance(error, Terminated):  # Ctrl-C reaches the process by itself
            process.terminate()
        try:
            process.wait(timeout=60)
        except (subprocess.TimeoutExpired, KeyboardInterrupt, Terminated):
            process.kill()
        raise


def _end_with_parent() -> None:
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _remove(stage: Stage) -> None:
    for path in stage.makes:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _written(stage: Stage) -> dict[str, list[Any]]:
    """Return size and hash of every recorded file, by path."""
    return {
        str(file): [file.stat().st_size, file_sha256(file)]
        for path in stage.records
        for file in sorted(_files(path))
    }


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return [p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts]


def _read(stamp: Path) -> dict[str, Any]:
    """Return a stamp's content; an empty dict if it is missing or incomplete."""
    try:
        content = json.loads(stamp.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return content if isinstance(content, dict) else {}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
