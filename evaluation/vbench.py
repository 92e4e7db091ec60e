"""VBench scores, computed by its own package in its mode for custom videos (Huang et al., 2024).

The package (github.com/Vchitect/VBench) is imported only if a protocol asks for it. It reads whole
files at their own size and frame rate, not the clips of the other scores.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.inputs import VideoEntry
from evaluation.protocol import ScoreSpec
from evaluation.scores import Score, mean_score

_SUFFIXES = (".mp4", ".gif")
_RUN = "evaluated"


@dataclass(frozen=True)
class Dimension:
    """VBench's score of one dimension, and its values for each video, possibly on another scale."""

    value: float
    videos: list[float]


def vbench_version() -> str:
    """Return the installed version; raise ``ValueError`` if the package is not installed."""
    try:
        import_module("vbench")
    except ImportError as error:
        raise ValueError(
            f"scores.vbench needs the package vbench ({error}): pip install vbench"
        ) from error
    try:
        return version("vbench")
    except PackageNotFoundError:
        return "unknown"


def check_entries(entries: Sequence[VideoEntry]) -> None:
    """Raise ``ValueError`` naming a video with a suffix that VBench ignores."""
    for entry in entries:
        if entry.path.suffix.lower() not in _SUFFIXES:
            raise ValueError(f"{entry.path}: scores.vbench supports only {' and '.join(_SUFFIXES)}")


def measure(
    entries: Sequence[VideoEntry], dimensions: Sequence[str], folder: Path, device: str
) -> dict[str, Dimension]:
    """Return the result of each dimension. ``folder`` is emptied first and then holds VBench's
    files.
    """
    package: Any = import_module("vbench")
    shutil.rmtree(folder, ignore_errors=True)
    videos = folder / "videos"
    videos.mkdir(parents=True)
    # VBench scores all files of a folder and identifies them by name.
    prompts = {}
    for place, entry in enumerate(entries):
        name = f"{place:06d}{entry.path.suffix.lower()}"
        (videos / name).symlink_to(entry.path.resolve())
        prompts[name] = entry.prompt
    described = Path(package.__file__).parent / "VBench_full_info.json"
    package.VBench(device, str(described), str(folder)).evaluate(
        videos_path=str(videos),
        name=_RUN,
        prompt_list=prompts if all(prompts.values()) else [],
        dimension_list=list(dimensions),
        mode="custom_input",
    )
    path = folder / f"{_RUN}_eval_results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    return {name: _read(results, name, len(entries), path) for name in dimensions}


def as_scores(
    measured: Mapping[str, Dimension], spec: ScoreSpec
) -> tuple[dict[str, Score], dict[str, list[float]]]:
    """Return scores named ``vbench/...`` and the values of each video.

    A score has an interval only if it is the mean of its videos' values.
    """
    scores, columns = {}, {}
    for dimension, found in measured.items():
        name = f"vbench/{dimension}"
        better = "" if dimension == "dynamic_degree" else "higher"
        meaning = "Computed by VBench's own package on whole videos."
        values = np.array(found.videos)
        score = mean_score(values, meaning, better, spec)
        if not np.isclose(values.mean(), found.value, rtol=1e-3):
            score = Score(found.value, len(values), meaning, better)
        scores[name], columns[name] = score, found.videos
    return scores, columns


def _read(results: Mapping[str, Any], name: str, number: int, path: Path) -> Dimension:
    value, of_videos = results[name]
    values = {int(Path(one["video_path"]).stem): float(one["video_results"]) for one in of_videos}
    if values.keys() != set(range(number)):
        raise ValueError(f"{path}: {name} is of {len(values)} videos, and {number} were given")
    return Dimension(float(value), [values[place] for place in range(number)])
