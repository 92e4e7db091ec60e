"""Writes videos that every decoder here reads back exactly: h264 in mp4, constant rate, closed
GOPs, full chroma.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8

from sora_lightning.data.decoding.readers import DecodeError, decoded_frames

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


def reencode(source: Path, target: Path, start_s: float, end_s: float) -> None:
    """Write the frames of a window of any video again, upright, each at its time, as h264 with
    closed GOPs of 30 frames, which is what random access likes best.

    The file is moved into place when it is whole. Raises ``DecodeError`` for a source that cannot
    be read to its end, and for a window without frames.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.stem}.partial{target.suffix}")
    options = {"crf": "18", "g": "30", "bf": "0", "threads": "1"}
    options["x264-params"] = "open-gop=0"
    converter = VideoReformatter()
    shown = False
    with av.open(str(partial), "w") as container:
        stream = container.add_stream("libx264", options=options)
        for time_s, frame in decoded_frames(source):
            if not start_s - 1e-6 <= time_s < end_s - 1e-6:
                continue
            image = converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
            image = np.ascontiguousarray(np.rot90(image, int(frame.rotation) // 90 % 4), np.uint8)
            if not shown:
                stream.height, stream.width = image.shape[:2]
                odd = stream.height % 2 or stream.width % 2
                stream.pix_fmt = "yuv444p" if odd else "yuv420p"
                stream.codec_context.time_base = Fraction(1, TICKS_PER_S)
                shown = True
            picture = av.VideoFrame.from_ndarray(image, format="rgb24")
            picture.pts = round((time_s - start_s) * TICKS_PER_S)
            picture.time_base = Fraction(1, TICKS_PER_S)
            container.mux(stream.encode(picture))
        if shown:
            container.mux(stream.encode())
    if not shown:
        partial.unlink()
        raise DecodeError(f"{source}: no frame is shown from {start_s} to {end_s} s")
    partial.replace(target)
