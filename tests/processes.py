"""Commands in processes of their own, and what they leave running."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).resolve().parents[1]


def start(arguments: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own, by which its processes are found."""
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


class Forks:
    """Runs functions in processes that fork from one which has imported torch, so that a start
    takes a tenth of a second."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["sora_lightning.cli.training", "evaluation.evaluate"])

    def start(self, function: Callable[..., Any], folder: Path, *arguments: Any) -> BaseProcess:
        """Call a function in a session of its own; what it returns is the exit code."""
        process = self._context.Process(target=_call, args=(function, folder, *arguments))
        process.start()
        return process


def _call(function: Callable[..., Any], folder: Path, *arguments: Any) -> None:
    os.setsid()
    os.chdir(folder)
    log = os.open(folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    multiprocessing.set_start_method("fork", force=True)  # of loaders' workers
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(function(*arguments))


def of_session(leader: int) -> list[int]:
    """Return the processes of a session that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has ended meanwhile
            continue
        if int(session) == leader and state != "Z":
            found.append(int(stat.parent.name))
    return found


def require_none_left(leader: int, patience_s: float = 15.0) -> None:
    """Fail where processes of a session run on."""
    end = time.monotonic() + patience_s
    while left := of_session(leader):
        assert time.monotonic() < end, left
        time.sleep(0.1)
