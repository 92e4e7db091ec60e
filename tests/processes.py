"""Commands in processes of their own, and what they leave running."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

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
