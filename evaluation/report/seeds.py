"""Mean and range of each score over reports of trainings that differ in their seed alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.report.compare import read_report


@dataclass(frozen=True)
class Range:
    """The mean of a score over the seeds, its lowest and its highest value."""

    score: str
    mean: float
    low: float
    high: float


def over_seeds(folders: Sequence[Path]) -> list[Range]:
    """Return the mean and range of each score over the reports in ``folders``.

    Raises ``ValueError`` for fewer than two reports, a folder without one, and reports of other
    scores, protocols or prompts than the first, naming the folder.
    """
    if len(folders) < 2:
        raise ValueError(f"{len(folders)} reports: a range needs at least two")
    reports = [read_report(folder, "settings") for folder in folders]
    first = _values(reports[0])
    for folder, report in zip(folders[1:], reports[1:], strict=True):
        if report["settings"].get("protocol") != reports[0]["settings"].get("protocol"):
            raise ValueError(f"{folder}: its protocol is not that of {folders[0]}")
        if _values(report).keys() != first.keys():
            raise ValueError(f"{folder}: its scores are not those of {folders[0]}")
        if _prompts(report) != _prompts(reports[0]):
            raise ValueError(f"{folder}: its prompts are not those of {folders[0]}")
    table = {name: [_values(report)[name] for report in reports] for name in first}
    return [
        Range(name, float(np.mean(values)), min(values), max(values))
        for name, values in table.items()
    ]


def as_table(ranges: Sequence[Range]) -> str:
    """Format ranges for a terminal."""
    width = max(len(row.score) for row in ranges)
    return "\n".join(
        f"{row.score:{width}} {row.mean:10.4g} ({row.low:.4g} to {row.high:.4g})" for row in ranges
    )


def _values(report: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores of a report, or the rates of one of frame tasks."""
    if "rates" in report:
        return {name: rate["value"] for name, rate in report["rates"].items()}
    return dict(report["scores"])


def _prompts(report: Mapping[str, Any]) -> list[str]:
    return [row["prompt"] for row in report.get("videos", [])]
