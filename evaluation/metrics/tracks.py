"""Track of a single moving shape, and the change of frames across a seam."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8
from scipy import ndimage

from evaluation.metrics.shapes import coloured

# A frame shows the shape if its coloured area is within these multiples of the median area.
_AREAS = (0.4, 2.5)


def centres(video: UInt8[np.ndarray, "F H W 3"]) -> Float[np.ndarray, "F 2"]:
    """Return the centre of the shape in each frame (right, down), in units of the short side.

    It is NaN for frames that do not show the shape. If a frame has several coloured regions, the
    largest is used. ``video`` has the format of ``find_shapes`` and must show one shape.
    """
    cover = coloured(video)
    masks = np.stack([_largest_region(frame) for frame in cover])
    areas = masks.sum(axis=(1, 2))
    median = np.median(areas)
    shown = (areas > _AREAS[0] * median) & (areas < _AREAS[1] * median) & (areas > 0)
    rows, columns = np.mgrid[: cover.shape[1], : cover.shape[2]]
    found = np.full((len(video), 2), np.nan)
    for axis, places in enumerate((columns, rows)):
        found[shown, axis] = (masks[shown] * places).sum(axis=(1, 2)) / areas[shown]
    return found / min(cover.shape[1:])


def steps(centre: Float[np.ndarray, "F 2"], closed: bool = False) -> Float[np.ndarray, " s"]:
    """Return the distance that the centre moves between successive frames.

    For a ``closed`` video, the step from the last frame to the first is included. A step is NaN if
    one of its two frames does not show the shape.
    """
    following = np.roll(centre, -1, axis=0)
    moved = np.linalg.norm(following - centre, axis=1)
    return moved if closed else moved[:-1]


def distance_of_tracks(first: Float[np.ndarray, "F 2"], second: Float[np.ndarray, "F 2"]) -> float:
    """Mean distance of two tracks of equal length, in units of the short side.

    Only frames that show both shapes count; infinite if they are fewer than half of the frames.
    """
    apart = np.linalg.norm(first - second, axis=1)
    seen = np.isfinite(apart)
    return float(apart[seen].mean()) if seen.mean() >= 0.5 else float("inf")


def seam_ratio(
    video: UInt8[np.ndarray, "F H W 3"], seams: list[int], closed: bool = False
) -> float:
    """Ratio of the largest change between successive frames at a seam to the median change
    elsewhere.

    A seam is the index of the first frame after it; a ``closed`` video also has one before frame 0.
    A change is the mean absolute difference over pixels. Infinite if nothing moves elsewhere.
    """
    pixels = video.astype(np.float32)
    change = np.abs(np.roll(pixels, -1, axis=0) - pixels).mean(axis=(1, 2, 3))
    at_seams = {seam - 1 for seam in seams}
    inside = [c for i, c in enumerate(change[:-1]) if i not in at_seams]
    across = [change[i] for i in at_seams] + ([change[-1]] if closed else [])
    median = float(np.median(inside))
    return float(max(across)) / median if median > 0 else float("inf")


def _largest_region(cover: Float[np.ndarray, "H W"]) -> Float[np.ndarray, "H W"]:
    labels, count = ndimage.label(cover > 0, structure=np.ones((3, 3)))
    if count < 2:
        return cover
    sizes = ndimage.sum_labels(cover, labels, np.arange(1, count + 1))
    return cover * (labels == 1 + int(np.argmax(sizes)))
