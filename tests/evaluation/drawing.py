"""Moving outlines drawn pixel by pixel, by their own rule: fair impostors of the scenes' shapes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

F, H, W = 17, 32, 32
RED, BLUE = np.array((225.0, 30.0, 30.0)), np.array((35.0, 60.0, 230.0))
YELLOW = np.array((240.0, 220.0, 30.0))
_FINE = 8
_ROWS, _COLUMNS = np.mgrid[: H * _FINE, : W * _FINE] / _FINE

Outline = list[tuple[float, float]]
Path = Callable[[int], tuple[float, float]]


def polygon(points: Outline, x: float, y: float) -> np.ndarray:
    """How much of each pixel a polygon about (x, y) covers, by the even-odd rule."""
    inside = np.zeros(_ROWS.shape, bool)
    for (x1, y1), (x2, y2) in zip(points, points[1:] + points[:1], strict=True):
        x1, x2, y1, y2 = x1 + x, x2 + x, y1 + y, y2 + y
        between = (y1 > _ROWS) != (y2 > _ROWS)
        inside ^= between & ((x2 - x1) * (_ROWS - y1) / (y2 - y1 + 1e-12) + x1 > _COLUMNS)
    return inside.reshape(H, _FINE, W, _FINE).mean((1, 3))


def regular(sides: int, radius: float, turn: float = 0.0, inner: float = 1.0) -> Outline:
    """Corners of a regular polygon, its first at ``turn`` degrees; every other one, if ``inner`` is
    not 1, at that part of the radius.
    """
    angles = np.deg2rad(turn + np.arange(sides) * 360 / sides)
    radii = radius * np.where(np.arange(sides) % 2, inner, 1.0)
    return list(zip(radii * np.cos(angles), radii * np.sin(angles), strict=True))


def to_left(frame: int) -> tuple[float, float]:
    return 22 - 0.6 * frame, 16.0


def drawn(
    outline: Outline | Callable[[int], Outline],
    path: Path = to_left,
    colour: np.ndarray | Callable[[int], np.ndarray] = RED,
) -> np.ndarray:
    """A video of one outline on grey; outline and colour may change from frame to frame."""
    frames = []
    for frame in range(F):
        points = outline(frame) if callable(outline) else outline
        shade = colour(frame) if callable(colour) else colour
        frames.append(128 + polygon(points, *path(frame))[..., None] * (shade - 128))
    return np.rint(np.stack(frames)).astype(np.uint8)
