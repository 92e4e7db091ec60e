"""Converts decoded frames to the images that a player shows."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from av import VideoFrame
from av.sidedata.sidedata import Type
from av.video.format import VideoFormat
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8

from sora_lightning.data.decoding.images import on_white

# A pixel aspect nearer to 1 than this is rounding, and its frames are not resampled.
SQUARE_TOLERANCE = 0.01


class Orientation(NamedTuple):
    """Swap rows and columns if ``transpose``, then reverse the rows (``flip``) and the columns
    (``mirror``).
    """

    transpose: bool = False
    flip: bool = False
    mirror: bool = False

    @property
    def is_rotation(self) -> bool:
        return (self.transpose + self.flip + self.mirror) % 2 == 0

    def apply(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "H W 3"]:
        image = image.swapaxes(0, 1) if self.transpose else image
        image = image[::-1] if self.flip else image
        return image[:, ::-1] if self.mirror else image


def orientation(frame: VideoFrame) -> Orientation:
    """Return the nearest of the eight orientations to a frame's display matrix."""
    try:
        matrix: Any = frame.side_data.get(Type.DISPLAYMATRIX)  # type: ignore[call-overload]
    except ValueError:  # PyAV does not know some newer kinds of side data
        return _ROTATIONS[int(frame.rotation) // 90 % 4]
    if matrix is None:
        return Orientation()
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].astype(np.int64)
    if max(abs(a), abs(d)) >= max(abs(b), abs(c)):
        return Orientation(False, bool(d < 0), bool(a < 0))
    return Orientation(True, bool(b < 0), bool(c < 0))


# By counterclockwise rotations of 90 degrees.
_ROTATIONS = (
    Orientation(),
    Orientation(True, True, False),
    Orientation(False, True, True),
    Orientation(True, False, True),
)


def has_alpha(video_format: VideoFormat) -> bool:
    return any(component.is_alpha for component in video_format.components)


def shown_width(width: int, pixel_aspect: float) -> int:
    """Return the number of square pixels that fill the same width."""
    if abs(pixel_aspect - 1) < SQUARE_TOLERANCE:
        return width
    return max(1, round(width * pixel_aspect))


def upright_rgb(
    frame: VideoFrame, pixel_aspect: float, converter: VideoReformatter
) -> UInt8[np.ndarray, "H W 3"]:
    """Return RGB pixels as shown: square, upright, and on white where the frame is transparent.

    ``pixel_aspect`` is the width of a stored pixel over its height.
    """
    if has_alpha(frame.format):
        rgba = converter.reformat(frame, format="rgba", threads=1).to_ndarray()
        image = on_white(rgba)
    else:
        image = converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    width = shown_width(frame.width, pixel_aspect)
    if width != frame.width:
        stored = VideoFrame.from_ndarray(image, format="rgb24")
        image = converter.reformat(stored, width=width, threads=1).to_ndarray()
    return orientation(frame).apply(image)
