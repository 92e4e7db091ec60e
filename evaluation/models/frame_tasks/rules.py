"""Rules for when a video is right. They depend on pixels only, not on the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from evaluation.inputs import as_batch
from evaluation.metrics.alignment import ExpectedShape, align
from evaluation.metrics.intervals import bootstrap_interval, wilson_interval
from evaluation.metrics.reconstruction import psnr_per_clip
from evaluation.metrics.shapes import find_shapes, regions
from evaluation.metrics.tracks import centres, distance_of_tracks, steps

Video = UInt8[np.ndarray, "F H W 3"]

LEAST_TRAVEL = 0.06
"""Short sides of all steps together, below which nothing moves."""
LONGEST_STEP = 0.08
"""Short sides from one frame to the next; the quickest shape of the data moves 0.027."""
SAME_TRACK = 0.1
"""Short sides between two tracks, mean over the frames."""


@dataclass(frozen=True)
class Rate:
    """Share of videos that are right, and its goal (``None`` without one)."""

    right: tuple[bool, ...]
    meaning: str
    goal: float | None = None

    def row(self) -> dict[str, Any]:
        n, num_right = len(self.right), sum(self.right)
        low, high = wilson_interval(num_right, n)
        met = None if self.goal is None else num_right / n >= self.goal
        return _row(num_right / n, low, high, n, self.goal, met, self.meaning, "share")


@dataclass(frozen=True)
class Mean:
    """Mean of one value per video, in ``unit``."""

    values: tuple[float, ...]
    meaning: str
    unit: str

    def row(self) -> dict[str, Any]:
        values = np.array(self.values)
        low, high = bootstrap_interval(values)
        mean, n = float(values.mean()), len(values)
        return _row(mean, low, high, n, None, None, self.meaning, self.unit)


def gap_row(
    seen: dict[str, Any], unseen: dict[str, Any], largest: float, meaning: str
) -> dict[str, Any]:
    """Difference of two rates, which may be at most ``largest``; without an interval."""
    gap = seen["value"] - unseen["value"]
    return _row(gap, None, None, unseen["n"], largest, gap <= largest, meaning, "share")


def _row(
    value: float,
    low: float | None,
    high: float | None,
    n: int,
    goal: float | None,
    met: bool | None,
    meaning: str,
    unit: str,
) -> dict[str, Any]:
    return {
        "value": value,
        "low": low,
        "high": high,
        "n": n,
        "goal": goal,
        "met": met,
        "unit": unit,
        "meaning": meaning,
    }


def shows(video: Video, expected: ExpectedShape, attributes: Sequence[str]) -> bool:
    """Return True if the video shows only one shape, with these attributes of the expected one."""
    alignment = align(find_shapes(video), [expected])
    return all(getattr(alignment, name) for name in attributes)


def moves(video: Video, direction: str) -> bool:
    """Return True if the video shows exactly one shape, moving in this direction."""
    found = find_shapes(video)
    return len(found) == 1 and found[0].direction == direction


def moves_evenly(video: Video, closed: bool = False) -> bool:
    """Return True if every frame shows exactly one shape, of one colour, that moves without jumps.

    In a ``closed`` video, the first frame follows the last.
    """
    colours = regions(video)
    if any(len(frame) != 1 for frame in colours) or len({frame[0] for frame in colours}) != 1:
        return False
    moved = steps(centres(video), closed)
    if not np.isfinite(moved).all():
        return False
    return bool(moved.max() <= LONGEST_STEP and moved.sum() >= LEAST_TRAVEL)


def follows(video: Video, other: Video) -> bool:
    """Return True if the shapes of two videos take the same path."""
    return distance_of_tracks(centres(video), centres(other)) <= SAME_TRACK


def keeps_colour(video: Video, expected: ExpectedShape, num_parts: int) -> bool:
    """Return True if each of ``num_parts`` equal parts shows this colour and no other."""
    parts = np.array_split(np.arange(len(video)), num_parts)
    for part in parts:
        found = find_shapes(video[part])
        if {shape.colour for shape in found} != {expected.colour}:
            return False
    return True


def frame_psnr(frame: UInt8[np.ndarray, "H W 3"], other: UInt8[np.ndarray, "H W 3"]) -> float:
    """Peak signal-to-noise ratio in dB; 100 for equal frames."""
    return float(psnr_per_clip(as_batch([frame[None]]), as_batch([other[None]]))[0])
