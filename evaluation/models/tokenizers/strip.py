"""An image of clips and their reconstructions, frame by frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

Video = UInt8[np.ndarray, "F H W 3"]
_SIDE, _GAP, _MARGIN, _LINE = 128, 4, 76, 16
_PAPER, _INK = (255, 255, 255), (31, 35, 40)


def write_strip(
    rows: Mapping[str, Sequence[Video]], titles: Sequence[str], num_frames: int, path: Path
) -> None:
    """Write an image with one row for each name.

    A row shows evenly spaced frames of each of its clips. ``titles`` are those of the clips.
    """
    tiles = {
        name: [_tile(frame) for video in videos for frame in _spaced(video, num_frames)]
        for name, videos in rows.items()
    }
    widths = [tile.width + _GAP for tile in next(iter(tiles.values()))]
    canvas = Image.new("RGB", (_MARGIN + sum(widths), _LINE + len(rows) * (_SIDE + _GAP)), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for number, title in enumerate(titles):
        left = _MARGIN + sum(widths[: number * num_frames])
        room = sum(widths[number * num_frames : (number + 1) * num_frames])
        draw.text((left, 2), _shortened(draw, title, room), _INK)
    for number, (name, row) in enumerate(tiles.items()):
        top = _LINE + number * (_SIDE + _GAP)
        draw.text((2, top + _SIDE // 2 - 6), name.replace(" ", "\n"), _INK)
        left = _MARGIN
        for tile in row:
            canvas.paste(tile, (left, top))
            left += tile.width + _GAP
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, optimize=True)


def _spaced(video: Video, number: int) -> Sequence[UInt8[np.ndarray, "H W 3"]]:
    return [video[i] for i in np.linspace(0, len(video) - 1, number).round().astype(int)]


def _tile(frame: UInt8[np.ndarray, "H W 3"]) -> Image.Image:
    """Enlarge a frame by an integer factor if it is smaller than a tile."""
    height, width = frame.shape[:2]
    factor = max(1, _SIDE // height)
    image = Image.fromarray(frame).resize(
        (width * factor, height * factor), Image.Resampling.NEAREST
    )
    if image.height != _SIDE:
        image = image.resize((round(image.width * _SIDE / image.height), _SIDE))
    return image


def _shortened(draw: ImageDraw.ImageDraw, text: str, room: int) -> str:
    if draw.textlength(text) <= room - _GAP:
        return text
    while text and draw.textlength(text + "...") > room - _GAP:
        text = text[:-1]
    return text + "..."
