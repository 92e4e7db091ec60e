"""Writes videos that every decoder here reads back exactly: h264 in mp4, constant rate, closed
GOPs, full chroma.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import OutputContainer
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8

from sora_lightning.data.decoding.display import upright_rgb
from sora_lightning.data.decoding.errors import DecodeError
from sora_lightning.data.decoding.readers import decoded_frames
from sora_lightning.data.decoding.timeline import Timeline, read_timeline

TICKS_PER_S = 90000


def write_video(
    path: Path,
    frames: UInt8[np.ndarray, "F H W 3"],
    fps: float,
    keyframe_every: int = 250,
    crf: int = 12,
) -> None:
    """Write RGB frames as ``path`` (mp4 by its suffix), the same bytes for the same frames.

    4:4:4 chroma keeps colours true at the edges of small shapes, and allows odd sizes. There are no
    B-frames. The default makes a short clip one closed GOP, which decord reads fastest. Raises
    ``ValueError`` for frames of another layout or type.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(
            f"{path}: frames of type {frames.dtype} and shape {frames.shape}: must be uint8 F H W 3"
        )
    # One thread, because x264 cuts slices by the number of threads and the bytes would depend on
    # the machine.
    options = {
        "crf": str(crf),
        "preset": "ultrafast",
        "g": str(keyframe_every),
        "bf": "0",
        "threads": "1",
    }
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        converter = (
            VideoReformatter()
        )  # one for all frames: to set it up takes longer than to use it
        for image in frames:
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            container.mux(stream.encode(converter.reformat(frame, format="yuv444p", threads=1)))
        container.mux(stream.encode())


def reencode(
    source: Path, target: Path, start_s: float, end_s: float, short_side: int | None = None
) -> None:
    """Write a window of any video as h264 with closed GOPs of 30 frames.

    Each frame is upright and keeps its time and duration, and its size unless its shorter side
    exceeds ``short_side``, to which it is then scaled by area averaging.

    The file is moved into place when it is whole. Raises ``DecodeError`` for a source that cannot
    be read to its end, and for a window without frames.
    """
    timeline = read_timeline(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.stem}.partial{target.suffix}")
    try:
        with av.open(str(partial), "w") as container:
            num_frames = _encode_window(container, source, timeline, start_s, end_s, short_side)
        if not num_frames:
            raise DecodeError(f"{source}: no frame is shown from {start_s} to {end_s} s")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _encode_window(
    container: OutputContainer,
    source: Path,
    timeline: Timeline,
    start_s: float,
    end_s: float,
    short_side: int | None,
) -> int:
    options = {"crf": "18", "g": "30", "bf": "0", "threads": "1", "x264-params": "open-gop=0"}
    rate = Fraction(timeline.fps).limit_denominator(1001)
    stream = container.add_stream("libx264", rate=rate, options=options)
    converter = VideoReformatter()
    ends_s = [*timeline.times_s[1:].tolist(), timeline.end_s]
    num_frames = 0
    frames = decoded_frames(source, timeline)
    for (time_s, frame), frame_end_s in zip(frames, ends_s, strict=False):
        if not start_s - 1e-6 <= time_s < end_s - 1e-6:
            continue
        image = np.ascontiguousarray(upright_rgb(frame, timeline.pixel_aspect, converter))
        if not num_frames:
            stream.height, stream.width = _scaled(image.shape[0], image.shape[1], short_side)
            odd = stream.height % 2 or stream.width % 2
            stream.pix_fmt = "yuv444p" if odd else "yuv420p"
            stream.codec_context.time_base = Fraction(1, TICKS_PER_S)
        shown = av.VideoFrame.from_ndarray(image, format="rgb24")
        if image.shape[:2] != (stream.height, stream.width):
            height, width = stream.height, stream.width
            shown = converter.reformat(shown, width, height, interpolation="AREA", threads=1)
        shown.time_base = Fraction(1, TICKS_PER_S)
        shown.pts = round((time_s - start_s) * TICKS_PER_S)
        shown.duration = round((min(frame_end_s, end_s) - start_s) * TICKS_PER_S) - shown.pts
        container.mux(stream.encode(shown))
        num_frames += 1
    if num_frames:
        container.mux(stream.encode())
    return num_frames


def _scaled(height: int, width: int, short_side: int | None) -> tuple[int, int]:
    """Return a frame's size with a shorter side of at most ``short_side``, and the other even."""
    shorter = min(height, width)
    if short_side is None or shorter <= short_side:
        return height, width
    longer = max(short_side, 2 * round(max(height, width) * short_side / shorter / 2))
    return (short_side, longer) if height == shorter else (longer, short_side)
