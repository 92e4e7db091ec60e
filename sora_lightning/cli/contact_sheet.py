"""Images of many videos at once: a still sheet with time from left to right, and a moving
one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

_PAPER, _INK, _FAINT, _RULE = "#ffffff", "#1f2328", "#6e7781", "#d8dee4"


@dataclass(frozen=True)
class SheetStyle:
    """Extents in pixels. A frame is enlarged without interpolation, so that the pixels stay
    visible."""

    num_columns: int = 7
    cell: int = 96
    gap: int = 6
    margin: int = 28
    caption: int = 250
    caption_font: int = 15
    header_font: int = 12


def contact_sheet(
    videos: Sequence[UInt8[np.ndarray, "F H W 3"]],
    captions: Sequence[str],
    fps: float,
    style: SheetStyle | None = None,
) -> Image.Image:
    """Draw ``num_columns`` frames of each video, evenly spaced from the first to the last, beside
    its caption.

    Sizes may differ from row to row. Raises ``ValueError`` for no videos, or more captions than
    videos or fewer.
    """
    style = style or SheetStyle()
    if not videos or len(videos) != len(captions):
        raise ValueError(
            f"{len(videos)} videos and {len(captions)} captions: need one caption to each video"
        )
    header = style.margin + style.header_font + 2 * style.gap
    row = style.cell + style.gap + 1
    left = style.margin + style.caption
    width = left + style.num_columns * (style.cell + style.gap) - style.gap + style.margin
    sheet = Image.new("RGB", (width, header + len(videos) * row + style.margin - style.gap), _PAPER)
    draw = ImageDraw.Draw(sheet)
    _draw_header(draw, videos[0].shape[0], fps, left, style)
    for index, (video, caption) in enumerate(zip(videos, captions, strict=True)):
        top = header + index * row
        draw.line(
            (
                style.margin,
                top - style.gap // 2 - 1,
                width - style.margin,
                top - style.gap // 2 - 1,
            ),
            _RULE,
        )
        _draw_caption(draw, caption, top, style)
        for column, frame in enumerate(_spread(video.shape[0], style.num_columns)):
            image = _fit(video[frame], style.cell)
            x = left + column * (style.cell + style.gap) + (style.cell - image.width) // 2
            sheet.paste(image, (x, top + (style.cell - image.height) // 2))
    return sheet


def moving_sheet(
    videos: Sequence[UInt8[np.ndarray, "F H W 3"]],
    captions: Sequence[str],
    num_columns: int = 4,
    cell: int = 160,
) -> list[Image.Image]:
    """Return the frames of an animation that plays all videos side by side, captions below.

    A video that is shorter than the longest one stays at its last frame.
    """
    style = SheetStyle(cell=cell, caption=cell, caption_font=12)
    num_rows = -(-len(videos) // num_columns)
    row, column = cell + 60, cell + 2 * style.gap
    blank = Image.new("RGB", (num_columns * column + 2 * style.gap, num_rows * row), _PAPER)
    places = [
        (2 * style.gap + i % num_columns * column, style.gap + i // num_columns * row)
        for i in range(len(videos))
    ]
    for (x, y), caption in zip(places, captions, strict=True):
        text = "\n".join(_wrap(caption, _font(style.caption_font), cell)[:3])
        ImageDraw.Draw(blank).multiline_text(
            (x, y + cell + 4), text, fill=_INK, font=_font(style.caption_font)
        )
    sheets = []
    for frame in range(max(len(video) for video in videos)):
        sheet = blank.copy()
        for (x, y), video in zip(places, videos, strict=True):
            image = _fit(video[min(frame, len(video) - 1)], cell)
            sheet.paste(image, (x + (cell - image.width) // 2, y + cell - image.height))
        sheets.append(sheet)
    return sheets


def save_animation(sheets: Sequence[Image.Image], path: Path, fps: float) -> None:
    """Write a GIF that repeats endlessly and holds its last frame for a second."""
    several = np.concatenate([np.asarray(sheets[i]) for i in _spread(len(sheets), 4)])
    palette = Image.fromarray(several).quantize(255)
    frames = [sheet.quantize(palette=palette, dither=Image.Dither.NONE) for sheet in sheets]
    durations = [*[round(1000 / fps)] * (len(frames) - 1), 1000]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def _draw_header(
    draw: ImageDraw.ImageDraw, num_frames: int, fps: float, left: int, style: SheetStyle
) -> None:
    font = _font(style.header_font)
    draw.text((style.margin, style.margin), "prompt", fill=_FAINT, font=font, anchor="ls")
    for column, frame in enumerate(_spread(num_frames, style.num_columns)):
        x = left + column * (style.cell + style.gap) + style.cell // 2
        draw.text((x, style.margin), f"{frame / fps:.1f} s", fill=_FAINT, font=font, anchor="ms")


def _draw_caption(draw: ImageDraw.ImageDraw, caption: str, top: int, style: SheetStyle) -> None:
    font = _font(style.caption_font)
    lines = _wrap(caption, font, style.caption - 20)
    text = "\n".join(lines[:5])
    middle = (style.margin, top + style.cell // 2)
    draw.multiline_text(middle, text, fill=_INK, font=font, anchor="lm", spacing=4)


def _wrap(
    caption: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[str]:
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _spread(num_frames: int, count: int) -> list[int]:
    return [round(i * (num_frames - 1) / max(count - 1, 1)) for i in range(count)]


def _fit(frame: UInt8[np.ndarray, "H W 3"], side: int) -> Image.Image:
    image = Image.fromarray(frame)
    scale = side / max(image.size)
    extent = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    return image.resize(
        extent, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    )


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
