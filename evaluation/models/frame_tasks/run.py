"""Measurement of every task with a checkpoint: a report, and an image of each task's videos."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evaluation.fingerprint import fingerprint
from evaluation.models.frame_tasks import rates
from evaluation.models.frame_tasks.cases import pairs_to_connect, real_cases
from evaluation.models.frame_tasks.protocol import TaskProtocol
from evaluation.models.frame_tasks.rates import Outcome, Trial
from evaluation.models.frame_tasks.rules import gap_row
from sora_lightning.cli.contact_sheet import contact_sheet
from sora_lightning.denoisers import FeatureCaching
from sora_lightning.files import file_sha256
from sora_lightning.generation import SamplingConfig
from sora_lightning.systems import DiffusionSystem
from sora_lightning.types import height_and_width

TASKS: dict[str, Callable[[Trial], Outcome]] = {
    "animate": rates.animate,
    "extend": rates.extend,
    "extend_backward": rates.extend_backward,
    "connect": rates.connect,
    "loop": rates.loop,
    "inpaint": rates.inpaint,
    "edit": rates.edit,
    "long": rates.long,
    "caching": rates.caching,
}
_SIZES = "sizes"
NAMES = (*TASKS, _SIZES)
_ROWS = 12
_WITHIN = 0.15


@dataclass(frozen=True)
class TaskRequest:
    """A checkpoint trained with ``tasks``, held-out clips, and which of ``NAMES`` to measure: all
    of them if none is named.
    """

    checkpoint: Path
    reference: Path
    output: Path
    protocol: TaskProtocol
    tasks: tuple[str, ...] = ()
    device: str = "cpu"
    root: str | None = None


def measure_tasks(request: TaskRequest) -> dict[str, Any]:
    """Make and evaluate the videos of each task, write the report and an image of each, and return
    it.

    Raises ``ValueError`` for invalid settings before any video is made.
    """
    protocol = request.protocol
    tasks = request.tasks or NAMES
    if unknown := sorted(set(tasks) - set(NAMES)):
        raise ValueError(f"--tasks {unknown[0]}: no such task; known are {', '.join(NAMES)}")
    system = DiffusionSystem.from_checkpoint(request.checkpoint).to(request.device)
    if "caching" in tasks:
        FeatureCaching(2).around(system.denoiser)
    trial = _trial(request, system)
    started = time.monotonic()
    outcomes = _outcomes(trial, tasks)
    request.output.mkdir(parents=True, exist_ok=True)
    for name, outcome in outcomes.items():
        _draw(outcome, system.fps, request.output / f"{name}.png")
    rows = {
        name: rate.row() for outcome in outcomes.values() for name, rate in outcome.rates.items()
    }
    settings = {"protocol": asdict(protocol), "reference_sha256": file_sha256(request.reference)}
    report = {
        "rates": rows | _size_gaps(rows),
        "settings": json.loads(json.dumps(settings)),
        "fingerprint": fingerprint(json.loads(json.dumps(settings))),
        "checkpoint": {
            "path": str(request.checkpoint),
            "sha256": file_sha256(request.checkpoint),
            "trained_with_tasks": bool(system.known_frames.masks),
        },
        "seconds": round(time.monotonic() - started, 1),
    }
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    (request.output / "report.json").write_text(text, encoding="utf-8")
    return report


def as_table(report: dict[str, Any]) -> str:
    """Format one line per rate: value, interval, number, goal."""
    lines = []
    for name, row in report["rates"].items():
        number = ".1%" if row["unit"] == "share" else ".3g"
        value = f"{row['value']:{number}}"
        interval = "" if row["low"] is None else f"{row['low']:{number}} to {row['high']:{number}}"
        goal = "" if row["goal"] is None else f"goal {row['goal']:.0%} "
        met = {None: "", True: "met", False: "MISSED"}[row["met"]]
        lines.append(f"{name:40} {value:>8}  {interval:18} n = {row['n']:3}  {goal}{met}")
    return "\n".join(lines)


def _trial(request: TaskRequest, system: DiffusionSystem) -> Trial:
    """The model and the cases to measure it on."""
    protocol = request.protocol
    video_generator = system.video_generator(SamplingConfig(num_steps=protocol.steps))
    sizes = [height_and_width(size, "--sizes") for size in protocol.sizes]
    short, long = protocol.frames
    listing, number, root = request.reference, protocol.cases, request.root
    cases = real_cases(listing, number, short, system.fps, sizes, root)
    gap = long - 2 * protocol.context
    pairs = pairs_to_connect(protocol.cases, protocol.context, gap, round(system.fps), sizes)
    return Trial(video_generator, cases, pairs, protocol)


def _outcomes(trial: Trial, tasks: tuple[str, ...]) -> dict[str, Outcome]:
    outcomes = {name: run(trial) for name, run in TASKS.items() if name in tasks}
    return outcomes | (rates.sizes(trial) if _SIZES in tasks else {})


def _size_gaps(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Differences of alignment between the training sizes and new sizes, by attribute."""
    meaning = "Alignment at the training sizes minus that at the new size: at most 15 points."
    gaps = {}
    for new in ("new_aspect", "new_length"):
        for attribute in rates.ATTRIBUTES:
            seen, unseen = (rows.get(f"size/{one}/{attribute}") for one in ("trained", new))
            if seen is not None and unseen is not None:
                gaps[f"size/{new}/{attribute}/gap"] = gap_row(seen, unseen, _WITHIN, meaning)
    return gaps


def _draw(outcome: Outcome, fps: float, path: Path) -> None:
    """Write an image of the first videos, whether right or wrong."""
    videos, cases = outcome.videos[:_ROWS], outcome.cases[:_ROWS]
    contact_sheet(list(videos), [case.prompt for case in cases], fps).save(path)
