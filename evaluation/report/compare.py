"""Comparison of reports by paired differences on the same prompts.

A verdict is given only if the interval of the difference excludes 0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from evaluation.features.weights import read_weights
from evaluation.metrics.alignment import SHARES
from evaluation.metrics.frechet import frechet_distance_of_population, jackknife_difference
from evaluation.metrics.intervals import bootstrap_interval

# Settings that may differ between compared reports: sampling is often what is compared.
_FREE = ("sampling",)
_COMPARED = ("settings", "details", "videos")


@dataclass(frozen=True)
class Difference:
    """Difference of a score between another report and the first one, with its 95 % interval.

    ``verdict`` names the better report: ``first``, ``other``, or ``undecided``.
    """

    score: str
    first: float
    other: float
    difference: float
    low: float
    high: float
    verdict: str


def compare(folders: Sequence[Path]) -> list[list[Difference]]:
    """Return, for each folder after the first, the differences of its scores from the first's.

    Raises ``ValueError`` for fewer than two reports, a folder without one, and reports of different
    protocols, networks, weights, prompts or real videos, naming what differs.
    """
    if len(folders) < 2:
        raise ValueError(f"{len(folders)} reports: a comparison needs at least two")
    first, *others = (read_report(folder, *_COMPARED) for folder in folders)
    for folder, other in zip(folders[1:], others, strict=True):
        _check_same(first, other, folders[0], folder)
    return [
        _differences(first, other, folders[0], folder)
        for folder, other in zip(folders[1:], others, strict=True)
    ]


def as_table(folders: Sequence[Path], differences: Sequence[Sequence[Difference]]) -> str:
    """Format differences for a terminal, and name the sampling settings that differ."""
    lines = []
    reports = [read_report(folder, *_COMPARED) for folder in folders]
    sampling = [report["settings"].get("sampling", {}) for report in reports]
    for folder, of in zip(folders[1:], sampling[1:], strict=True):
        for key in sorted(sampling[0].keys() | of.keys()):
            values = [s.get(key, "unset") for s in (sampling[0], of)]
            if values[0] != values[1]:
                lines.append(f"sampling differs: {key} {values[0]} in {folders[0]}")
                lines.append(f"                  {key} {values[1]} in {folder}")
    for folder, rows in zip(folders[1:], differences, strict=True):
        lines.append(f"{folder} beside {folders[0]}")
        for row in rows:
            named = {"first": f"{folders[0]} is better", "other": f"{folder} is better"}
            lines.append(
                f"  {row.score:34} {row.first:10.4g} {row.other:10.4g} {row.difference:+10.4g} "
                f"({row.low:+.4g} to {row.high:+.4g})  {named.get(row.verdict, row.verdict)}"
            )
    return "\n".join(lines)


def read_report(folder: Path, *keys: str) -> dict[str, Any]:
    """Return the report in a folder. Raises ``ValueError`` if it is missing or lacks a key."""
    path = folder / "report.json"
    if not path.is_file():
        raise ValueError(f"{folder}: holds no report.json; `python -m evaluation` writes one")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: is not JSON ({error})") from error
    for key in keys:
        if key not in report:
            raise ValueError(f"{path}: has no {key!r}; it is not a report of this evaluation")
    return report


def _check_same(
    first: Mapping[str, Any], other: Mapping[str, Any], at_first: Path, at_other: Path
) -> None:
    settings = [{k: v for k, v in r["settings"].items() if k not in _FREE} for r in (first, other)]
    for key in sorted(settings[0].keys() | settings[1].keys()):
        one, two = (s.get(key) for s in settings)
        if one != two:
            raise ValueError(
                f"{at_first} and {at_other} do not compare: {key} is {one!r} in the one and "
                f"{two!r} in the other"
            )
    prompts = [[row["prompt"] for row in report["videos"]] for report in (first, other)]
    if not all(prompts[0]):
        raise ValueError(
            f"{at_first} and {at_other} do not compare: without prompts, videos cannot be paired"
        )
    if prompts[0] != prompts[1]:
        raise ValueError(f"{at_first} and {at_other} do not compare: their prompts differ")


def _differences(
    first: Mapping[str, Any], other: Mapping[str, Any], at_first: Path, at_other: Path
) -> list[Difference]:
    seed = int(first["settings"]["scores"]["seed"])
    better = {name: score["better"] for name, score in first["details"].items()}
    rows = _of_alignment(first["videos"], other["videos"], seed)
    for name, value in first["videos"][0].items():
        if name not in better or not isinstance(value, bool | int | float):
            continue
        a, b = (np.array([float(v[name]) for v in r["videos"]]) for r in (first, other))
        rows.append(_of_means(name, a, b, better[name], seed))
    distance = next((n for n in first["details"] if n == "fvd" or _is_distance(n)), None)
    if distance is not None:
        rows.append(_of_distances(distance, first, at_first, at_other))
    return rows


def _of_alignment(
    first: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], seed: int
) -> list[Difference]:
    """Differences of alignment, separately for prompts with one shape and with several."""
    rows = []
    for kind, several in (("", False), ("two_shapes/", True)):
        pairs = [
            (a, b)
            for a, b in zip(first, other, strict=True)
            if "colour" in a and (a.get("num_expected", 1) > 1) == several
        ]
        # A report of an earlier version lacks the nearest shape.
        for name in (name for name in SHARES if pairs and all(name in row for row in pairs[0])):
            a, b = (
                np.array([float(row[name]) for row in side]) for side in zip(*pairs, strict=True)
            )
            rows.append(_of_means(f"alignment/{kind}{name}", a, b, "higher", seed))
    return rows


def _is_distance(name: str) -> bool:
    return name.startswith("fvd-") and "/" not in name


def _of_means(
    name: str,
    a: Float[np.ndarray, " n"],
    b: Float[np.ndarray, " n"],
    better: str,
    seed: int,
) -> Difference:
    low, high = bootstrap_interval(b - a, seed=seed)
    means = float(a.mean()), float(b.mean())
    return Difference(name, *means, means[1] - means[0], low, high, _verdict(low, high, better))


def _of_distances(
    name: str, first: Mapping[str, Any], at_first: Path, at_other: Path
) -> Difference:
    a, b = (read_weights(folder / "features.pt") for folder in (at_first, at_other))
    spec = first["settings"]["scores"]
    of = None if spec["covariance_ddof"] else frechet_distance_of_population
    values = jackknife_difference(
        a["generated"],
        b["generated"],
        torch.as_tensor(a["reference"]),
        spec["jackknife_groups"],
        spec["seed"],
        of,
    )
    return Difference(name, *values, _verdict(values[3], values[4], "lower"))


def _verdict(low: float, high: float, better: str) -> str:
    if not better:
        return ""
    if low <= 0 <= high:
        return "undecided"
    return "other" if (low > 0) == (better == "higher") else "first"
