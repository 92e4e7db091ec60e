"""Reads moving shapes from pixels, without any network: colour, shape and direction of motion.

A shape is a saturated blob on a background without hue. Its pixels are found by their chroma (RGB
less its mean), tracked as one connected region of space and time, and weighed by a soft mask, so
that anti-aliased, blurred and noisy edges count in proportion. Shapes are told apart by matched
filters: the mask is compared with drawings of an upright circle, square and triangle about the same
centre, over a few sizes and softnesses of the edge, and the drawing that explains most of its
energy names it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Complex, Float, Int, UInt8
from scipy import ndimage

# Hues in degrees. Purple stands between blue and magenta, so that violet is nearer to it than to
# blue.
HUES = {"red": 0, "yellow": 60, "green": 120, "cyan": 180, "blue": 240, "purple": 290}
COLOURS = tuple(HUES)
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = ("left", "right", "up", "down")

# Chroma is a length in [0, 0.82]: 0.82 for a pure red, 0 for any gray.
_LEAST_CHROMA = 0.12
# A foreground pixel has at least this part of the chroma of the video's strongest hundredth.
_FOREGROUND = 0.4
# A colour, to be present, holds this part of the foreground; less is the fringe of another one.
_LEAST_SHARE = 0.12
# A shape covers this part of a frame, in this part of the frames.
_LEAST_AREA = 0.008
_LEAST_PRESENCE = 0.6
# A shape moves when it travels this part of the short side, and twice as far along an axis as
# across it.
_LEAST_TRAVEL = 0.06
_GREATEST_SKEW = 0.5
# |m2| / A^2 with m2 = sum(mask * (x + iy)^2) is 0 for the three shapes and 0.055 for an ellipse of
# axes 1.4 : 1.
_GREATEST_ELONGATION = 0.05
# sum(mask * r^2) / A^2 is 0.159 for a circle, 0.167 for a square, 0.192 for a triangle; a cloud has
# more.
_GREATEST_SPREAD = 0.26
# The best drawing explains at least this part of the mask's energy; it explains 0.99 of a rendered
# shape's, and 0.84 under noise whose deviation is a tenth of the range.
_LEAST_EXPLAINED = 0.75
# Directions, from right over down, in which the sides of a drawing lie, and its area over the
# square of their distance from the centre.
_SIDES = {"square": (0, 90, 180, 270), "triangle": (90, 210, 330)}
_AREAS = {"circle": np.pi, "square": 4.0, "triangle": 3 * 3**0.5}
_RELATIVE_SIZES = np.linspace(0.88, 1.12, 5)
_EDGE_WIDTHS = (1.0, 2.0, 3.5)  # pixels from covered to uncovered


@dataclass(frozen=True)
class FoundShape:
    """One moving shape. ``shape`` is None for a blob that is none of the three, ``direction`` for
    one that stands still or moves aslant. ``area`` is in pixels, ``travel`` in pixels from the
    first frame to the last (right, down), ``presence`` the part of the frames in which it is seen.
    """

    colour: str
    shape: str | None
    direction: str | None
    area: float
    travel: tuple[float, float]
    presence: float

    def __str__(self) -> str:
        return f"{self.colour} {self.shape or 'blob'} {self.direction or 'not moving'}"


def find_shapes(video: UInt8[np.ndarray, "F H W 3"]) -> list[FoundShape]:
    """The moving shapes of a video, largest first; empty when nothing in it has a colour.

    ``video`` is RGB in 0..255 on a background of any gray, of at least two frames. Raises
    ``ValueError`` for other layouts. Shapes narrower than about 6 pixels are found but not told
    apart reliably.
    """
    if video.ndim != 4 or video.shape[3] != 3 or video.dtype != np.uint8 or len(video) < 2:
        raise ValueError(
            f"a video of shape {video.shape} and type {video.dtype}: "
            "must be uint8 (frames >= 2, height, width, 3)"
        )
    contrast = _contrast(video)
    chroma = contrast - contrast.mean(axis=-1, keepdims=True)
    peak = _peak(chroma)
    if peak < _LEAST_CHROMA:
        return []
    # Noise must neither make islands nor holes; a narrow blur moves no edge that is straight.
    smooth = ndimage.gaussian_filter(chroma, sigma=(0, 0.6, 0.6, 0))
    foreground = np.linalg.norm(smooth, axis=-1) > _FOREGROUND * peak
    colours = _colour_of_pixels(smooth, foreground)
    tracks = [(c, t) for c in range(len(COLOURS)) for t in _tracks(foreground & (colours == c))]
    taken = np.zeros(foreground.shape, dtype=bool)
    for _, track in tracks:
        taken |= track
    found = [_measure(COLOURS[c], contrast, track, taken & ~track) for c, track in tracks]
    return sorted(found, key=lambda shape: -shape.area)


def coloured(video: UInt8[np.ndarray, "F H W 3"]) -> Float[np.ndarray, "F H W"]:
    """How much of each pixel a colour covers: its chroma relative to the strongest of the video,
    0 where there is next to none. All 0 for a video without colour.
    """
    contrast = _contrast(video)
    chroma = contrast - contrast.mean(axis=-1, keepdims=True)
    peak = _peak(chroma)
    cover = np.linalg.norm(chroma, axis=-1) / max(peak, _LEAST_CHROMA)
    return np.where(cover > _FOREGROUND, cover, 0.0) if peak >= _LEAST_CHROMA else 0 * cover


def _peak(chroma: Float[np.ndarray, "F H W 3"]) -> float:
    """The chroma of the video's strongest hundredth."""
    return float(np.percentile(np.linalg.norm(chroma, axis=-1), 99))


def _contrast(video: UInt8[np.ndarray, "F H W 3"]) -> Float[np.ndarray, "F H W 3"]:
    """RGB in [0, 1] less the background's, which is the median of each frame."""
    pixels = video.astype(np.float32) / 255
    return pixels - np.median(pixels, axis=(1, 2), keepdims=True)


def _colour_of_pixels(
    chroma: Float[np.ndarray, "F H W 3"], foreground: Bool[np.ndarray, "F H W"]
) -> Int[np.ndarray, "F H W"]:
    """The nearest hue of each pixel, among the colours that hold a fair share of the foreground."""
    likeness = chroma @ _palette().T
    nearest = likeness.argmax(axis=-1)
    mass = np.linalg.norm(chroma, axis=-1) * foreground
    share = np.array([mass[nearest == colour].sum() for colour in range(len(COLOURS))])
    absent = share < _LEAST_SHARE * share.sum()
    likeness[..., absent] = -np.inf
    return likeness.argmax(axis=-1)


def _palette() -> Float[np.ndarray, "6 3"]:
    """Unit chroma of each colour: the projection of the hue circle onto the plane R + G + B = 0."""
    hue = np.deg2rad(np.array(list(HUES.values()), dtype=np.float32))
    red, green, blue = (np.cos(hue - np.deg2rad(angle)) for angle in (0, 120, 240))
    palette = np.stack([red, green, blue], axis=-1)
    return palette / np.linalg.norm(palette, axis=-1, keepdims=True)


def _tracks(mask: Bool[np.ndarray, "F H W"]) -> list[Bool[np.ndarray, "F H W"]]:
    """Regions connected in space and time, large enough and long enough to be a shape."""
    labels, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    least_area = _LEAST_AREA * mask[0].size
    tracks = [labels == label for label in range(1, count + 1)]
    return [
        t for t in tracks if np.mean(t.sum(axis=(1, 2)) >= least_area) >= _LEAST_PRESENCE
    ]  # fmt: skip


def _measure(
    colour: str,
    contrast: Float[np.ndarray, "F H W 3"],
    track: Bool[np.ndarray, "F H W"],
    others: Bool[np.ndarray, "F H W"],
) -> FoundShape:
    mask = _soft_mask(contrast, track, others)
    visible = track.any(axis=(1, 2))
    mask, times = mask[visible], np.flatnonzero(visible)
    area = mask.sum(axis=(1, 2))
    rows, columns = np.mgrid[: mask.shape[1], : mask.shape[2]]
    centre = np.stack([(mask * axis).sum(axis=(1, 2)) / area for axis in (columns, rows)], axis=-1)
    travel = _travel(centre, times, len(track))
    z = (columns - centre[:, 0, None, None]) + 1j * (rows - centre[:, 1, None, None])
    return FoundShape(
        colour=colour,
        shape=_shape_of(mask, z),
        direction=_direction_of(travel, short_side=min(mask.shape[1:])),
        area=float(area.mean()),
        travel=travel,
        presence=float(visible.mean()),
    )


def _soft_mask(
    contrast: Float[np.ndarray, "F H W 3"],
    track: Bool[np.ndarray, "F H W"],
    others: Bool[np.ndarray, "F H W"],
) -> Float[np.ndarray, "F H W"]:
    """How much of each pixel the shape covers: 1 inside, 0 outside, unclipped so that noise
    averages out.
    """
    core = contrast[track].mean(axis=0)
    cover = contrast @ (core / np.linalg.norm(core))
    # The inner half of the shape's pixels is covered wholly, whatever the blur at the edges.
    inside = cover[track]
    cover = cover / np.median(inside[inside >= np.median(inside)])
    eight_neighbours = np.ones((1, 3, 3), dtype=bool)
    near = ndimage.binary_dilation(track, eight_neighbours, iterations=2)
    return cover * (near & ~ndimage.binary_dilation(others, eight_neighbours))


def _travel(
    centre: Float[np.ndarray, "visible 2"], times: Int[np.ndarray, " visible"], num_frames: int
) -> tuple[float, float]:
    """Slope of the centre over time by least squares, times the length of the video."""
    if len(times) < 2:
        return 0.0, 0.0
    slope = np.polyfit(times, centre, deg=1)[0] * (num_frames - 1)
    return float(slope[0]), float(slope[1])


def _direction_of(travel: tuple[float, float], short_side: int) -> str | None:
    right, down = travel
    along, across = (right, down) if abs(right) > abs(down) else (down, right)
    if abs(along) < _LEAST_TRAVEL * short_side or abs(across) > _GREATEST_SKEW * abs(along):
        return None
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "down" if down > 0 else "up"


def _shape_of(mask: Float[np.ndarray, "F H W"], z: Complex[np.ndarray, "F H W"]) -> str | None:
    """The drawing that explains most of the mask; ``z`` = x + iy, y downwards, from the centre of
    each frame.
    """
    area = mask.sum() / len(mask)

    def moment(weight: np.ndarray) -> float:
        return float(abs((mask * weight).sum()) / len(mask) / area**2)

    if moment(z**2) > _GREATEST_ELONGATION or moment(abs(z) ** 2) > _GREATEST_SPREAD:
        return None
    near = abs(z) < 1.05 * np.sqrt(area) + 2  # the largest triangle's corners, and their edges
    explained = {shape: _explained(mask[near], z[near], shape, area) for shape in SHAPES}
    best = max(explained, key=lambda shape: explained[shape])
    return best if explained[best] >= _LEAST_EXPLAINED else None


def _explained(
    mask: Float[np.ndarray, " n"], z: Complex[np.ndarray, " n"], shape: str, area: float
) -> float:
    """The part of the mask's energy that the best drawing of one shape explains, in 0..1."""
    if shape == "circle":
        outside = [abs(z)]
    else:
        outside = [(z * np.exp(-1j * np.deg2rad(side))).real for side in _SIDES[shape]]
    radius = np.sqrt(area / _AREAS[shape])
    best = 0.0
    for size in _RELATIVE_SIZES * radius:
        for width in _EDGE_WIDTHS:
            drawing = np.ones_like(mask)
            for distance in outside:
                drawing *= np.clip(0.5 + (size - distance) / width, 0, 1)
            best = max(best, float((drawing * mask).sum() ** 2 / (drawing**2).sum()))
    return best / float((mask**2).sum())
