"""CPU seconds until commands answer, each in a process of its own; the first imports what every
training stands on.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sora_lightning.data import write_dataset
from tests.bench.report import Report

LIBRARIES = "import torch, jsonargparse, lightning.pytorch"
MODULE = ("-m", "sora_lightning")
COMMANDS: dict[str, Sequence[str]] = {
    LIBRARIES: ("-c", LIBRARIES),
    "import sora_lightning": ("-c", "import sora_lightning"),
    "import sora_lightning.systems": ("-c", "import sora_lightning.systems"),
    "--help": (*MODULE, "--help"),
    "fit --help": (*MODULE, "fit", "--help"),
    "sample --help": (*MODULE, "sample", "--help"),
}
ROUNDS = 2  # of seconds that vary little, since waiting for files does not count
CHECKED = "experiments/demo/tokenizer.yaml"


def run(report: Report) -> None:
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_dataset(Path(folder), num_train=64, num_val=0, num_test=0)["train"]
        check = (*MODULE, "check", "--config", CHECKED, "--manifest", str(manifest))
        commands = {**COMMANDS, "check": check}
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(ROUNDS):
            for name, arguments in commands.items():
                times[name].append(cpu_seconds(arguments))
    report.measured("CPU seconds until a command answers", times)


def cpu_seconds(arguments: Sequence[str]) -> float:
    """Return the user and system seconds of Python with these arguments."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
