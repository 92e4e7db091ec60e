"""Results that the runs of an ablation have written so far: scores, their items, and curves."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sora_lightning.ablations.runs import Run
from sora_lightning.ablations.spec import written_reports
from sora_lightning.cli.curves import Curve, read_scalars

_BETTER = {"val/loss": "lower", "val/alignment": "higher", "val/psnr": "higher"}
_ATTRIBUTES = ("colour", "direction", "shape", "nearest_shape")


@dataclass(frozen=True)
class RunScore:
    """A score of one run: the values of the clips or prompts that it averages, or one value.

    ``better`` is ``higher``, ``lower``, or empty for a score without a direction.
    """

    values: list[float]
    better: str

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))


@dataclass(frozen=True)
class RunResult:
    """Scores by name and curves by tag of one run; those of an unfinished run as far as they go.

    ``displacements``, ``sizes`` and ``files`` are those of the validation clips, in the order of
    ``clip_loss``.
    """

    arm: str
    seed: int
    finished: bool
    scores: dict[str, RunScore] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    displacements: list[float] = field(default_factory=list)
    sizes: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    @property
    def step_s(self) -> float | None:
        """Seconds of a training step, without validations; ``None`` where it was not logged."""
        curve = self.curves.get("throughput/step_s")
        return None if curve is None else float(curve.values.mean())


def read_results(runs: Sequence[Run]) -> list[RunResult]:
    """Return the results of the runs that have begun."""
    return [_read(run) for run in runs if run.folder.is_dir()]


def _read(run: Run) -> RunResult:
    training = run.folder / "training"
    curves = read_scalars(training) if training.is_dir() else {}
    scores = {
        tag: RunScore([float(curves[tag].values[-1])], better)
        for tag, better in _BETTER.items()
        if tag in curves
    }
    for protocol, report in written_reports(run.folder).items():
        prefix = f"{protocol}/" if protocol else ""
        scores |= {prefix + name: score for name, score in _evaluated(report)}
    losses, moved, sizes, files = _clip_losses(run.folder / "clip_losses.csv")
    if losses:
        scores["clip_loss"] = RunScore(losses, "lower")
    return RunResult(run.arm, run.seed, run.is_finished, scores, curves, moved, sizes, files)


def _clip_losses(path: Path) -> tuple[list[float], list[float], list[str], list[str]]:
    """Return losses, displacements, sizes and files of the clips, by the clips' names."""
    if not path.is_file():
        return [], [], [], []
    with path.open(newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["clip"])
    moved = [float(row["displacement"]) for row in rows if row["displacement"]]
    sizes = [row["size"] for row in rows if "size" in row]
    losses = [float(row["loss"]) for row in rows]
    files = [row["file"] for row in rows if "file" in row]
    return losses, moved if len(moved) == len(rows) else [], sizes, files


def _evaluated(path: Path) -> Iterator[tuple[str, RunScore]]:
    """Yield the scores of a report, by video where it has them."""
    report = json.loads(path.read_text(encoding="utf-8"))
    for name, score in report["details"].items():
        yield name, RunScore(_items(name, score, report["videos"]), score["better"])


def _items(name: str, score: dict[str, Any], videos: Sequence[dict[str, Any]]) -> list[float]:
    attribute = name.removeprefix("alignment/")
    if attribute in _ATTRIBUTES:  # over prompts of one shape
        videos = [row for row in videos if row.get("num_expected", 1) == 1]
    if attribute in (*_ATTRIBUTES, "cut"):
        name = attribute
    values = [row[name] for row in videos if isinstance(row.get(name), bool | int | float)]
    return list(map(float, values)) if len(values) == score["n"] else [float(score["value"])]
