"""Small videos with the index of each frame painted on it."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BITS, STRIPE, ROWS = 8, 16, 64


def barcode(number: int) -> np.ndarray:
    """A frame whose stripes are the bits of a number, white for one; the upper half alone, so that
    a frame that is turned shows it."""
    frame = np.full((ROWS, BITS * STRIPE, 3), 64, np.uint8)
    for bit in range(BITS):
        value = 235 if number >> bit & 1 else 16
        frame[: ROWS // 2, bit * STRIPE : (bit + 1) * STRIPE] = value
    return frame


def numbers_in(frames: np.ndarray) -> list[int]:
    """The numbers painted in frames, F H W 3."""
    middle = frames[:, ROWS // 4, STRIPE // 2 :: STRIPE, 1] > 128
    return (middle @ (1 << np.arange(BITS))).tolist()


def write_barcodes(
    path: Path,
    times_ms: Sequence[int],
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    rotation: int | None = None,
    pix_fmt: str = "yuv420p",
) -> Path:
    """Frame ``i`` shows the number ``i`` and is presented at ``times_ms[i]``."""
    with av.open(str(path), "w") as container:
        rate = round(1000 * (len(times_ms) - 1) / max(1, times_ms[-1])) or 8
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = ROWS, BITS * STRIPE
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for number, time_ms in enumerate(times_ms):
            frame = av.VideoFrame.from_ndarray(barcode(number), format="rgb24")
            frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def cut_without_encoding(
    source: Path, target: Path, start_s: float, length_s: float = float("inf")
) -> Path:
    """Cut as ``ffmpeg -ss START -i SOURCE -t LENGTH -c copy TARGET`` does: whole GOPs, and an edit
    list that hides the frames before the cut."""
    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream)
        shift = int(start_s / stream.time_base)
        reader.seek(shift, stream=stream)
        for packet in reader.demux(stream):
            if packet.size:
                if packet.dts * stream.time_base >= start_s + length_s:
                    break
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = copy
                writer.mux(packet)
    return target
