"""Readers of pixels from video and image files."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from av import VideoFrame
from av.container import InputContainer
from av.video import VideoStream
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8

from sora_lightning.checks import require_positive
from sora_lightning.data.decoding.display import upright_rgb
from sora_lightning.data.decoding.errors import DecodeError
from sora_lightning.data.decoding.images import is_image, read_image
from sora_lightning.data.decoding.nal_units import has_hole
from sora_lightning.data.decoding.timeline import Timeline, demux, opened, read_timeline
from sora_lightning.data.decoding.video_metadata import VideoMetadata

# Damage ends the decoding in place of being painted over: a frame that is predicted from a damaged
# one is wrong too, and nothing marks it. FFmpeg's other checks (crccheck, careful, aggressive) were
# seen to catch no wrong frame that this lets pass.
STRICT = {"err_detect": "explode"}

log = logging.getLogger(__name__)


def read_frames(
    path: Path, start_s: float = 0.0, end_s: float = math.inf, fps: float | None = None
) -> tuple[UInt8[np.ndarray, "F H W 3"], float]:
    """Decode the frames that are shown in a window of a video or image file.

    Args:
        path: A file; an image is a video of one frame.
        start_s: Begin of the window, in seconds from the first frame.
        end_s: End of the window.
        fps: Return the frame on screen at ``start_s + i / fps``. By default every frame comes once.

    Returns the frames, RGB as a player shows them, and their rate: ``fps`` or the file's mean.
    Raises ``DecodeError`` for a file that cannot be decoded and for a window without frames.
    """
    require_positive(fps=fps)
    timeline = read_timeline(path)
    end_s = min(end_s, timeline.end_s)
    if not 0 <= start_s < end_s:
        raise DecodeError(f"{path}: no frame is shown from {start_s:g} to {end_s:g} s")
    if fps is None:
        indices = timeline.shown_within(start_s, end_s)
    else:
        num_frames = max(1, math.ceil((end_s - start_s) * fps - 1e-6))
        indices = timeline.shown_at(start_s + np.arange(num_frames) / fps)
    return PyAVReader().read(path, timeline, indices.tolist()), fps or timeline.fps


def decoded_frames(path: Path, timeline: Timeline) -> Iterator[tuple[float, VideoFrame]]:
    """Yield all frames as stored, with their times in seconds from the first.

    ``upright_rgb`` converts one to what is shown. Raises ``DecodeError``.
    """
    if is_image(path):
        yield 0.0, VideoFrame.from_ndarray(read_image(path), format="rgb24")
        return
    with opened(path) as (container, stream):
        frames = _frames(path, container, stream, headless=False)
        yield from zip(timeline.times_s.tolist(), frames, strict=False)


def probe(path: Path) -> VideoMetadata:
    """Return frames, mean rate and displayed size. Decodes one frame. Raises ``DecodeError``."""
    timeline = read_timeline(path)
    height, width = PyAVReader().read(path, timeline, [0]).shape[1:3]
    return VideoMetadata(len(timeline), timeline.fps, height, width)


class Reader(ABC):
    """Decodes chosen frames. Keeps no file open and no state, so that it may be used in any
    process.
    """

    def timeline(self, path: Path) -> Timeline:
        """Return the times of the file's frames. Raises ``DecodeError``."""
        return read_timeline(path)

    @abstractmethod
    def read(
        self, path: Path, timeline: Timeline, indices: Sequence[int]
    ) -> UInt8[np.ndarray, "F H W 3"]:
        """Return the frames at ``indices`` (ascending, may repeat), RGB as a player shows them.

        Raises ``DecodeError`` if one of them cannot be decoded; never returns another frame in its
        place.
        """


class PyAVReader(Reader):
    """Reads every file that FFmpeg reads, and still images. Finds frames by their timestamps."""

    def read(
        self, path: Path, timeline: Timeline, indices: Sequence[int]
    ) -> UInt8[np.ndarray, "F H W 3"]:
        if is_image(path):
            return np.repeat(read_image(path)[None], len(indices), axis=0)
        wanted = {int(timeline.pts[index]) for index in indices}
        entry = self._entry(timeline, min(indices))
        # From the start where the seek misses; where the file was cut out of an open GOP,
        # from the start without the frames whose references the cut took away.
        ways = [(None, False), (None, True)]
        error: DecodeError | None = None
        for seek_to, headless in ways if entry is None else [(entry, True), *ways]:
            try:
                images = self._images(path, timeline, wanted, seek_to, headless)
            except DecodeError as raised:
                error, images = raised, {}
            if len(images) == len(wanted):
                break
        else:
            lost = f"{len(wanted) - len(images)} of {len(wanted)} frames do not decode"
            raise error or DecodeError(f"{path}: {lost}")
        frames = [images[int(timeline.pts[index])] for index in indices]
        if len({frame.shape for frame in frames}) > 1:
            raise DecodeError(f"{path}: the size of the frames changes within the file")
        return np.stack(frames)

    @staticmethod
    def _entry(timeline: Timeline, first: int) -> int | None:
        """Return the timestamp of the keyframe to decode from; ``None`` is the file's start."""
        behind = [key for key in timeline.keyframes if key <= first]
        return int(timeline.pts[behind[-1]]) if timeline.timed and behind and behind[-1] else None

    @staticmethod
    def _images(
        path: Path, timeline: Timeline, wanted: set[int], entry: int | None, headless: bool
    ) -> dict[int, np.ndarray]:
        images: dict[int, np.ndarray] = {}
        converter = VideoReformatter()
        with opened(path) as (container, stream):
            if entry is not None:
                container.seek(entry, stream=stream)
            shown = -math.inf
            for number, frame in enumerate(_frames(path, container, stream, headless)):
                pts = frame.pts if timeline.timed else number
                if number == 0 and entry is not None and (pts is None or pts > entry):
                    return {}
                if pts is None or pts <= shown:
                    raise DecodeError(f"{path}: damaged timestamps: {pts} comes after {shown}")
                shown = pts
                if pts in wanted:
                    images[pts] = upright_rgb(frame, timeline.pixel_aspect, converter)
                # A B-frame is no better than the frame after it that it is predicted from.
                if len(images) == len(wanted) and frame.pict_type != PictureType.B:
                    break
        return images


def _frames(
    path: Path, container: InputContainer, stream: VideoStream, headless: bool
) -> Iterator[VideoFrame]:
    """Yield decoded frames in presentation order. Raises ``DecodeError`` at the first damaged one.

    ``headless`` leaves out frames before the first keyframe: in an open GOP they are predicted from
    the previous GOP.
    """
    stream.codec_context.thread_count = 1
    stream.codec_context.options = STRICT
    first: int | None = None
    for packet in demux(path, container, stream):
        first = packet.pts if first is None else first
        if headless and packet.pts is not None and first is not None and packet.pts < first:
            continue
        if packet.is_corrupt or has_hole(packet, stream.codec_context):
            raise DecodeError(f"{path}: a damaged packet")
        for frame in packet.decode():
            if frame.is_corrupt:
                raise DecodeError(f"{path}: a damaged frame")
            yield frame


class DecordReader(Reader):
    """Reads by decord what decord reads correctly, everything else by PyAV.

    A reader is opened for each call and deleted at once: an idle one keeps decoding into memory.
    Raises ``ValueError`` when decord is not installed.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("decord") is None:
            raise ValueError(
                "decord is not installed (its wheels are for x86-64 alone): use PyAVReader"
            )

    def read(
        self, path: Path, timeline: Timeline, indices: Sequence[int]
    ) -> UInt8[np.ndarray, "F H W 3"]:
        if timeline.decord_objection is not None:
            return PyAVReader().read(path, timeline, indices)
        import decord

        # At this level it says which frames it painted over; SubprocessReader listens.
        decord.logging.set_level(decord.logging.INFO)
        try:
            reader = decord.VideoReader(os.path.abspath(path), num_threads=1)
            if len(reader) != len(timeline):
                raise DecodeError(
                    f"decord counts {len(reader)} frames, the packets say {len(timeline)}"
                )
            frames = reader.get_batch(list(indices)).asnumpy()
            del reader
        except (ValueError, RuntimeError, AssertionError, MemoryError, decord.DECORDError) as error:
            log.debug("%s: read by PyAV, as decord fails: %s", path, error)
            return PyAVReader().read(path, timeline, indices)
        return frames


def default_reader() -> Reader:
    """Return decord's reader if it is installed, else PyAV's, and log which."""
    if importlib.util.find_spec("decord") is not None:
        return DecordReader()
    log.warning("decord is not installed: videos are read by PyAV")
    return PyAVReader()
