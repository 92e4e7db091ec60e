"""Detection of moving shapes in pixels, without a network: colour, shape and direction of motion.

A shape is a saturated blob on a gray background. Its pixels are found by their chroma (RGB minus
its mean), tracked as one connected region of space and time, and weighted by a soft mask, so that
anti-aliased, blurred and noisy edges count in proportion.

Shapes are classified by matched filters. The mask is compared with templates about the same centre,
over a few sizes and edge widths. The template that explains most of the mask's energy names the
shape, if it explains enough of it, clearly more than the other shapes, and is the best in each part
of the video. If the template of another polygon, rectangle or ellipse explains the mask better, it
is none of the shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Complex, Float, Int, UInt8
from scipy import ndimage

# Hues in degrees. Purple lies between blue and magenta, so that violet is nearer to it than to
# blue.
HUES = {"red": 0, "yellow": 60, "green": 120, "cyan": 180, "blue": 240, "purple": 290}
COLOURS = tuple(HUES)
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = ("left", "right", "up", "down")

# Chroma is a length in [0, 0.82]: 0.82 for a pure red, 0 for any gray.
_LEAST_CHROMA = 0.12
# Minimal chroma of a foreground pixel, relative to the 99th percentile of the video.
_FOREGROUND = 0.4
# Minimal share of a colour in the foreground; less is the edge of another colour.
_LEAST_SHARE = 0.12
# Minimal area of a shape as a share of a frame, and minimal share of frames that show it.
_LEAST_AREA = 0.008
_LEAST_PRESENCE = 0.6
# A shape moves if it travels this share of the short side, and twice as far along an axis as
# across it.
_LEAST_TRAVEL = 0.06
_GREATEST_SKEW = 0.5
# In each part of the video it travels at least this share of an equal part of its way.
_LEAST_PART = 0.25
# |m2| / A^2 with m2 = sum(mask * (x + iy)^2) is 0 for the three shapes and 0.055 for an ellipse of
# axes 1.4 : 1.
_GREATEST_ELONGATION = 0.05
# sum(mask * r^2) / A^2 is 0.159 for a circle, 0.167 for a square, 0.192 for a triangle; a
# diffuse cloud has more.
_GREATEST_SPREAD = 0.26
# Minimal share of the mask's energy (minus that of noise) that the template of a shape explains,
# and its minimal margin to the other two. Rendered clips have 0.989 and 0.030; through JPEG at
# quality 60 they have 0.964 and 0.009.
_LEAST_EXPLAINED = 0.95
_LEAST_MARGIN = 0.01
# Another outline is better if it explains at least this share of the energy that the shape's
# template leaves over, and at least the minimal lead, which grows with the variance of noise.
_GREATEST_LEAD = 0.5
_LEAST_LEAD = 0.002
_LEAD_PER_NOISE = 0.3
_NUM_PARTS = 3  # of a video, each classified separately
AMBIGUOUS = "ambiguous"
# A pixel on the edge of a whole shape is half covered at most. A shape is cut off if it is so in
# this share of the frames.
_FULL_COLOUR = 0.6
_LEAST_CUT = 0.1
_RELATIVE_SIZES = tuple(np.linspace(0.88, 1.12, 5))
_FEW_SIZES = _RELATIVE_SIZES[1:4]
_EDGE_WIDTHS = (1.0, 2.0, 3.5)  # in pixels


@dataclass(frozen=True)
class _Outline:
    """A regular polygon, or a circle if it has no sides.

    ``normal`` is the direction of one side's normal in degrees (right, then down). The outline is
    stretched horizontally by the square root of ``aspect``.
    """

    num_sides: int = 0
    normal: float = 0.0
    aspect: float = 1.0

    @property
    def area(self) -> float:
        """Area divided by the squared distance from the centre to the sides."""
        if not self.num_sides:
            return np.pi
        return self.num_sides * np.tan(np.pi / self.num_sides)

    def distances(self, z: Complex[np.ndarray, " n"]) -> list[Float[np.ndarray, " n"]]:
        """Distances from the centre along each side's normal."""
        z = z.real / self.aspect**0.5 + 1j * z.imag * self.aspect**0.5
        if not self.num_sides:
            return [abs(z)]
        normals = np.deg2rad(self.normal + np.arange(self.num_sides) * 360 / self.num_sides)
        return [(z * np.exp(-1j * normal)).real for normal in normals]


_OUTLINES = {"circle": _Outline(), "square": _Outline(4), "triangle": _Outline(3, 90.0)}
_STRETCHED = (1 / 1.3, 1 / 1.15, 1.15, 1.3)
_OTHERS = (
    *(_Outline(3, 90.0 + turn) for turn in range(15, 120, 15)),
    *(_Outline(4, float(turn)) for turn in range(15, 90, 15)),
    *(_Outline(5, float(turn)) for turn in range(0, 72, 9)),
    *(_Outline(6, float(turn)) for turn in range(0, 60, 10)),
    *(_Outline(7, normal) for normal in (90.0, -90.0)),
    *(_Outline(8, normal) for normal in (0.0, 11.25, 22.5, 33.75)),
    *(_Outline(sides, 0.0, aspect) for sides in (0, 4) for aspect in _STRETCHED),
)


@dataclass(frozen=True)
class FoundShape:
    """A moving shape found in a video.

    ``shape`` is None for a blob that is none of the three shapes, and ``AMBIGUOUS`` if two shapes
    fit equally or if parts of the video differ. ``colour`` is ``AMBIGUOUS`` if it changes.
    ``direction`` is None for a shape that stands still, moves diagonally, turns, or stops for a
    third of the video. ``area`` is in pixels, ``travel`` in pixels from the first frame to the
    last (right, down). ``presence`` is the share of frames that show the shape. ``nearest`` is the
    one of the three shapes whose template explains most of the whole video, however little.
    """

    colour: str
    shape: str | None
    direction: str | None
    area: float
    travel: tuple[float, float]
    presence: float
    nearest: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape or 'blob'} {self.direction or 'not moving'}"


def find_shapes(video: UInt8[np.ndarray, "F H W 3"]) -> list[FoundShape]:
    """Find the moving shapes of a video, largest first; empty if nothing in it has a colour.

    ``video`` is RGB in 0..255 on a gray background, with at least two frames. Raises ``ValueError``
    for other layouts. Shapes narrower than about 6 pixels are found but not classified reliably.
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
    # Smoothing removes isolated pixels and holes; a narrow blur does not move straight edges.
    smooth = ndimage.gaussian_filter(chroma, sigma=(0, 0.6, 0.6, 0))
    foreground = np.linalg.norm(smooth, axis=-1) > _FOREGROUND * peak
    colours = _colour_of_pixels(smooth, foreground)
    tracks = [(c, t) for c in range(len(COLOURS)) for t in _tracks(foreground & (colours == c))]
    taken = np.zeros(foreground.shape, dtype=bool)
    for _, track in tracks:
        taken |= track
    stray = _large(foreground & ~taken)
    found = []
    for c, track in tracks:
        changes = (stray & ~track.any(axis=(1, 2))).sum() >= 2
        colour = AMBIGUOUS if changes else COLOURS[c]
        found.append(_measure(colour, contrast, track, taken & ~track))
    return sorted(found, key=lambda shape: -shape.area)


def coloured(video: UInt8[np.ndarray, "F H W 3"]) -> Float[np.ndarray, "F H W"]:
    """Return the chroma of each pixel relative to the strongest chroma of the video.

    Values of nearly gray pixels are 0, and all values are 0 for a video without colour.
    """
    contrast = _contrast(video)
    chroma = contrast - contrast.mean(axis=-1, keepdims=True)
    peak = _peak(chroma)
    cover = np.linalg.norm(chroma, axis=-1) / max(peak, _LEAST_CHROMA)
    return np.where(cover > _FOREGROUND, cover, 0.0) if peak >= _LEAST_CHROMA else 0 * cover


def is_cut(video: UInt8[np.ndarray, "F H W 3"]) -> bool:
    """Return True if a shape is partly out of view: if its colour reaches the border in full, in
    two pixels of a tenth of the frames.
    """
    full = coloured(video) > _FULL_COLOUR
    full[:, 1:-1, 1:-1] = False
    return bool((full.sum(axis=(1, 2)) >= 2).mean() >= _LEAST_CUT)


def regions(video: UInt8[np.ndarray, "F H W 3"]) -> list[list[str]]:
    """Return for each frame the colours of its shape-sized regions, largest first."""
    contrast = _contrast(video)
    chroma = contrast - contrast.mean(axis=-1, keepdims=True)
    colours = []
    for frame, cover in zip(chroma, coloured(video), strict=True):
        labels, count = ndimage.label(cover > 0, structure=np.ones((3, 3)))
        masks = [labels == label for label in range(1, count + 1)]
        masks = [mask for mask in masks if mask.sum() >= _LEAST_AREA * mask.size]
        means = [frame[mask].mean(axis=0) for mask in sorted(masks, key=lambda mask: -mask.sum())]
        colours.append([COLOURS[int((mean @ _palette().T).argmax())] for mean in means])
    return colours


def _peak(chroma: Float[np.ndarray, "F H W 3"]) -> float:
    """The 99th percentile of the chroma of the video."""
    return float(np.percentile(np.linalg.norm(chroma, axis=-1), 99))


def _contrast(video: UInt8[np.ndarray, "F H W 3"]) -> Float[np.ndarray, "F H W 3"]:
    """RGB in [0, 1] minus the background's, which is the median of each frame."""
    pixels = video.astype(np.float32) / 255
    return pixels - np.median(pixels, axis=(1, 2), keepdims=True)


def _colour_of_pixels(
    chroma: Float[np.ndarray, "F H W 3"], foreground: Bool[np.ndarray, "F H W"]
) -> Int[np.ndarray, "F H W"]:
    """Nearest hue of each pixel, among colours with a sufficient share of the foreground."""
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
    """Regions connected in space and time that are large and long enough to be a shape."""
    labels, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    tracks = [labels == label for label in range(1, count + 1)]
    return [track for track in tracks if np.mean(_large(track)) >= _LEAST_PRESENCE]


def _large(mask: Bool[np.ndarray, "F H W"]) -> Bool[np.ndarray, " F"]:
    """Return which frames contain enough pixels of the mask for a shape."""
    return mask.sum(axis=(1, 2)) >= _LEAST_AREA * mask[0].size


def _measure(
    colour: str,
    contrast: Float[np.ndarray, "F H W 3"],
    track: Bool[np.ndarray, "F H W"],
    others: Bool[np.ndarray, "F H W"],
) -> FoundShape:
    mask, noise = _soft_mask(contrast, track, others)
    # In a frame where another shape is next to all of it, nothing of the mask is left.
    visible = track.any(axis=(1, 2)) & (mask.sum(axis=(1, 2)) > 0)
    mask, times = mask[visible], np.flatnonzero(visible)
    area = mask.sum(axis=(1, 2))
    rows, columns = np.mgrid[: mask.shape[1], : mask.shape[2]]
    centre = np.stack([(mask * axis).sum(axis=(1, 2)) / area for axis in (columns, rows)], axis=-1)
    travel = _travel(centre, times, len(track))
    z = (columns - centre[:, 0, None, None]) + 1j * (rows - centre[:, 1, None, None])
    nearest, shape = _shape_of(mask, z, noise)
    return FoundShape(
        colour=colour,
        shape=shape,
        direction=_direction_of(centre, times, travel, short_side=min(mask.shape[1:])),
        area=float(area.mean()),
        travel=travel,
        presence=float(visible.mean()),
        nearest=nearest,
    )


def _soft_mask(
    contrast: Float[np.ndarray, "F H W 3"],
    track: Bool[np.ndarray, "F H W"],
    others: Bool[np.ndarray, "F H W"],
) -> tuple[Float[np.ndarray, "F H W"], float]:
    """Return the coverage of each pixel by the shape, and the variance of its noise.

    Coverage is 1 inside and 0 outside, and is not clipped, so that noise averages out.
    """
    core = contrast[track].mean(axis=0)
    cover = contrast @ (core / np.linalg.norm(core))
    # The inner half of the shape's pixels is fully covered, however blurred the edges are.
    inside = cover[track]
    cover = cover / np.median(inside[inside >= np.median(inside)])
    eight_neighbours = np.ones((1, 3, 3), dtype=bool)
    near = ndimage.binary_dilation(track, eight_neighbours, iterations=2)
    away = ~ndimage.binary_dilation(track | others, eight_neighbours, iterations=4)
    noise = float(np.square(cover[away]).mean()) if away.any() else 0.0
    return cover * (near & ~ndimage.binary_dilation(others, eight_neighbours)), noise


def _travel(
    centre: Float[np.ndarray, "visible 2"], times: Int[np.ndarray, " visible"], num_frames: int
) -> tuple[float, float]:
    """Least-squares slope of the centre over time, multiplied by the length of the video."""
    if len(times) < 2:
        return 0.0, 0.0
    slope = np.polyfit(times, centre, deg=1)[0] * (num_frames - 1)
    return float(slope[0]), float(slope[1])


def _direction_of(
    centre: Float[np.ndarray, "visible 2"],
    times: Int[np.ndarray, " visible"],
    travel: tuple[float, float],
    short_side: int,
) -> str | None:
    axis = 0 if abs(travel[0]) > abs(travel[1]) else 1
    along, across = travel[axis], travel[1 - axis]
    if abs(along) < _LEAST_TRAVEL * short_side or abs(across) > _GREATEST_SKEW * abs(along):
        return None
    for part in np.array_split(np.arange(len(times)), _NUM_PARTS):
        if len(part) < 2:
            continue
        (slope,) = np.polyfit(times[part], centre[part, axis], deg=1)[:1]
        if slope * (times[-1] - times[0]) / along < _LEAST_PART:
            return None
    return DIRECTIONS[2 * axis + int(along > 0)]


def _shape_of(
    mask: Float[np.ndarray, "F H W"], z: Complex[np.ndarray, "F H W"], noise: float
) -> tuple[str, str | None]:
    """Return the nearest shape, and the shape whose template explains the mask, in the whole video
    and in each part of it.

    The second is ``AMBIGUOUS`` if two shapes explain the mask equally or parts differ, and None if
    no shape explains it or another outline is better. ``z`` = x + iy, y downwards, is measured from
    the centre of each frame.
    """
    whole = _Energy(mask, z, noise)
    by_shape = {name: whole.explained(outline) for name, outline in _OUTLINES.items()}
    second, best = sorted(by_shape, key=lambda name: by_shape[name])[1:]
    if not whole.is_compact or by_shape[best] < _LEAST_EXPLAINED:
        return best, None
    lead = max(whole.explained(outline, _FEW_SIZES) for outline in _OTHERS) - by_shape[best]
    left_over = 1 - by_shape[best]
    if lead > max(_GREATEST_LEAD * left_over, _LEAST_LEAD + _LEAD_PER_NOISE * noise):
        return best, None
    if by_shape[best] - by_shape[second] < _LEAST_MARGIN:
        return best, AMBIGUOUS
    for frames in np.array_split(np.arange(len(mask)), min(_NUM_PARTS, len(mask))):
        part = _Energy(mask[frames], z[frames], noise)
        by_shape = {name: part.explained(outline) for name, outline in _OUTLINES.items()}
        if by_shape[best] < max(_LEAST_EXPLAINED, *by_shape.values()):
            return best, AMBIGUOUS
    return best, best


class _Energy:
    """Energy of a mask minus that of its noise, and the shares that templates explain."""

    def __init__(
        self, mask: Float[np.ndarray, "F H W"], z: Complex[np.ndarray, "F H W"], noise: float
    ) -> None:
        self.area = mask.sum() / len(mask)
        moments = [abs((mask * w).sum()) / len(mask) / self.area**2 for w in (z**2, abs(z) ** 2)]
        near = (
            abs(z) < 1.05 * np.sqrt(self.area) + 2
        )  # includes the corners of the largest triangle
        self.mask, self.z, self.noise = mask[near], z[near], noise
        self.energy = float((self.mask**2).sum()) - noise * self.mask.size
        elongation, spread = moments
        self.is_compact = (
            elongation <= _GREATEST_ELONGATION and spread <= _GREATEST_SPREAD and self.energy > 0
        )

    def explained(self, outline: _Outline, sizes: tuple[float, ...] = _RELATIVE_SIZES) -> float:
        """Return the share explained by the best template of an outline; at most about 1.

        Templates vary in size, about the area of the mask, and in the width of the edge.
        """
        distances = outline.distances(self.z)
        best = 0.0
        for size in sizes:
            radius = size * np.sqrt(self.area / outline.area)
            for width in _EDGE_WIDTHS:
                drawing = np.clip(0.5 + (radius - distances[0]) / width, 0, 1)
                for distance in distances[1:]:
                    drawing *= np.clip(0.5 + (radius - distance) / width, 0, 1)
                best = max(best, float((drawing @ self.mask) ** 2 / (drawing @ drawing)))
        return (best - self.noise) / self.energy
