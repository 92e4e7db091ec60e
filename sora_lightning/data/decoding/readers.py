"""Reads chosen frames of a video file: by PyAV, or by decord where decord is known to return the
right ones.

decord 0.6.0 gives wrong frames without a word for open GOPs, mpeg-ts and edit lists, and may loop
for ever on stream-copied cuts. All of these show in the packets alone, so a file is judged by
demuxing it, not by decoding.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av import Packet, VideoFrame
from av.container import InputContainer
from av.video import VideoStream
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter
from jaxtyping import Float, Int, UInt8

from sora_lightning.data.manifest.records import Footage

DECORD_CODECS = ("h264", "hevc", "vp8", "vp9", "mpeg4", "mjpeg")
# Damage ends the decoding in place of being painted over: a frame that is predicted from a damaged
# one is wrong too, and nothing marks it. FFmpeg's other checks (crccheck, careful, aggressive) were
# seen to catch no wrong frame that this lets pass.
STRICT = {"err_detect": "explode"}
# MAX_NVOP_SIZE of FFmpeg: so small a packet of mpeg4 may only say that nothing changed.
LARGEST_NOT_CODED = 19

log = logging.getLogger(__name__)


class DecodeError(ValueError):
    """A file, or the frames asked of it, cannot be decoded. The message names the file."""


@dataclass(frozen=True)
class Timeline:
    """When the frames of a file are shown, in the order of showing.

    ``pts`` are presentation timestamps in the stream's own units; ``times_s`` are seconds from the
    first frame. ``keyframes`` are indices into both. ``timed`` is false where the container keeps
    no timestamps: frames are then counted from the start. ``decord_objection`` says why decord must
    not read the file, None that it may.
    """

    pts: Int[np.ndarray, " F"]
    times_s: Float[np.ndarray, " F"]
    end_s: float
    tick_s: float
    keyframes: tuple[int, ...]
    timed: bool
    decord_objection: str | None

    def __len__(self) -> int:
        return len(self.times_s)

    def shown_at(self, times_s: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The index of the frame on screen at each time (seconds from the first frame): the last
        that has begun.

        Half a tick of the container's clock is forgiven, since timestamps are rounded to whole
        ticks. Before the first frame it is the first, after the last the last.
        """
        slack = self.tick_s / 2 + 1e-6
        indices = np.searchsorted(self.times_s, times_s + slack, side="right") - 1
        return np.clip(indices, 0, len(self) - 1)


def read_timeline(path: Path) -> Timeline:
    """Demux the first video stream of a file, decoding nothing. Raises ``DecodeError``."""
    with _opened(path) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in _packets(path, container, stream) if packet.size]
        if not packets:
            raise DecodeError(f"{path}: the video stream holds no packets")
        codec = stream.codec_context
        smallest = min(packet.size for packet in packets)
        stored = _Stored(container.format.name, codec.name, codec.pix_fmt, smallest)
        tick_s = float(stream.time_base or 0)
        mean_gap_s = 1 / float(stream.average_rate or stream.guessed_rate or 25)
        if not tick_s or any(packet.pts is None for packet in packets):
            return _counted_timeline(path, mean_gap_s)
        decoded = [packet for packet in packets if not packet.is_discard]
        pts = np.array([packet.pts for packet in decoded], dtype=np.int64)
        keys = np.array([packet.is_keyframe for packet in decoded])
        durations = [packet.duration for packet in decoded]
    if not len(pts) or len(np.unique(pts)) != len(pts):
        return _counted_timeline(path, mean_gap_s)
    order = np.argsort(pts)
    times_s = (pts[order] - pts[order[0]]) * tick_s
    last_s = (durations[order[-1]] or 0) * tick_s or (_gap(times_s) if len(pts) > 1 else mean_gap_s)
    objection = _decord_objection(stored, len(packets) - len(decoded), pts, keys)
    return Timeline(
        pts=pts[order],
        times_s=times_s,
        end_s=float(times_s[-1] + last_s),
        tick_s=tick_s,
        keyframes=tuple(np.flatnonzero(keys[order]).tolist()),
        timed=True,
        decord_objection=objection,
    )


def _packets(path: Path, container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    try:
        yield from container.demux(stream)
    except IndexError as error:  # PyAV's, where damage makes a stream appear midway
        raise DecodeError(f"{path}: a packet of a stream that the file does not have") from error


def _gap(times_s: np.ndarray) -> float:
    return float(np.median(np.diff(times_s)))


class _Stored(NamedTuple):
    container: str
    codec: str
    pixels: str | None
    smallest_packet: int


def _decord_objection(
    stored: _Stored, num_discarded: int, pts: np.ndarray, keys: np.ndarray
) -> str | None:
    """Why decord would be unsafe; ``pts`` and ``keys`` in decoding order."""
    if "mpegts" in stored.container:
        return "mpeg-ts: decord seeks to wrong frames"
    if stored.container == "avi":
        return "avi: keeps no timestamps, and decord goes astray where its index is damaged"
    if stored.codec not in DECORD_CODECS:
        return f"codec {stored.codec}: unknown to decord"
    if stored.codec == "h264" and "444" in (stored.pixels or "") and keys.sum() > 1:
        # Streams of x264 before build 151 need a workaround, which decord's FFmpeg forgets when it
        # seeks.
        return "h264 in 4:4:4 with several keyframes: decord garbles old ones after a seek"
    if stored.codec == "mpeg4" and stored.smallest_packet <= LARGEST_NOT_CODED:
        return "mpeg4 with pictures that may not be coded, which decord counts and does not show"
    if num_discarded:
        return f"an edit list discards {num_discarded} packets, which decord shows"
    if not keys[0]:
        return "the first packet is no keyframe"
    rank = np.empty(len(pts), dtype=np.int64)
    rank[np.argsort(pts)] = np.arange(len(pts))
    gaps = np.diff(np.sort(pts))
    for key in np.flatnonzero(keys):
        if rank[key] != key:
            return f"open GOP: packet {key} is a keyframe and shown as frame {rank[key]}"
        if key and gaps[key - 1] > 1.5 * np.median(gaps):
            return f"a gap in time before keyframe {key}, as a cut without re-encoding leaves"
    return None


def _counted_timeline(path: Path, gap_s: float) -> Timeline:
    """For containers whose timestamps are absent or repeat: frames at an even rate, counted by
    decoding them.
    """
    with _opened(path) as container:
        stream = container.streams.video[0]
        num_frames = sum(len(packet.decode()) for packet in _packets(path, container, stream))
    if not num_frames:
        raise DecodeError(f"{path}: no frame can be decoded")
    frames = np.arange(num_frames)
    return Timeline(
        pts=frames,
        times_s=frames * gap_s,
        end_s=num_frames * gap_s,
        tick_s=gap_s / 100,
        keyframes=(0,),
        timed=False,
        decord_objection="timestamps are missing or repeat",
    )


def decoded_frames(path: Path) -> Iterator[tuple[float, VideoFrame]]:
    """All frames with their times in seconds from the first, not turned. Raises ``DecodeError``."""
    timeline = read_timeline(path)
    with _opened(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        stream.codec_context.options = STRICT
        for number, frame in enumerate(_frames(path, container, stream, headless=False)):
            if number < len(timeline):
                yield float(timeline.times_s[number]), frame


def probe(path: Path) -> Footage:
    """Frames, mean rate and displayed size of a file. Decodes one frame. Raises ``DecodeError``."""
    timeline = read_timeline(path)
    height, width = PyAVReader().read(path, timeline, [0]).shape[1:3]
    return Footage(len(timeline), len(timeline) / timeline.end_s, height, width)


class Reader(ABC):
    """Decodes chosen frames. Keeps no file open and no state, so that it may be used in any
    process.
    """

    def timeline(self, path: Path) -> Timeline:
        """When the frames of the file are shown. Raises ``DecodeError``."""
        return read_timeline(path)

    @abstractmethod
    def read(
        self, path: Path, timeline: Timeline, indices: Sequence[int]
    ) -> UInt8[np.ndarray, "F H W 3"]:
        """The frames at ``indices`` (ascending, may repeat), RGB, turned upright.

        Raises ``DecodeError`` where one of them cannot be had; never gives another frame in its
        place.
        """


class PyAVReader(Reader):
    """Reads every file that FFmpeg reads; frames are found by their timestamps."""

    def read(
        self, path: Path, timeline: Timeline, indices: Sequence[int]
    ) -> UInt8[np.ndarray, "F H W 3"]:
        wanted = {int(timeline.pts[index]) for index in indices}
        entry = self._entry(timeline, min(indices))
        # Where the seek goes astray, from the start; where the file was cut out of an open GOP,
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
            raise DecodeError(f"{path}: the size of the picture changes within the file")
        return np.stack(frames)

    @staticmethod
    def _entry(timeline: Timeline, first: int) -> int | None:
        """The timestamp of the keyframe to start decoding at, or None for the start of the file."""
        behind = [key for key in timeline.keyframes if key <= first]
        return int(timeline.pts[behind[-1]]) if timeline.timed and behind and behind[-1] else None

    @staticmethod
    def _images(
        path: Path, timeline: Timeline, wanted: set[int], entry: int | None, headless: bool
    ) -> dict[int, np.ndarray]:
        images: dict[int, np.ndarray] = {}
        converter = VideoReformatter()
        with _opened(path) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            stream.codec_context.options = STRICT
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
                    upright = int(frame.rotation) // 90 % 4
                    image = converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
                    images[pts] = np.rot90(image, upright)
                # A B-frame is no better than the frame after it that it is predicted from.
                if len(images) == len(wanted) and frame.pict_type != PictureType.B:
                    break
        return images


def _frames(
    path: Path, container: InputContainer, stream: VideoStream, headless: bool
) -> Iterator[VideoFrame]:
    """Decoded frames in the order of showing. Raises ``DecodeError`` at the first damaged one.

    ``headless`` leaves out what is shown before the first keyframe met: in an open GOP such frames
    are predicted from the GOP before.
    """
    first: int | None = None
    for packet in _packets(path, container, stream):
        first = packet.pts if first is None else first
        if headless and packet.pts is not None and first is not None and packet.pts < first:
            continue
        if packet.is_corrupt:
            raise DecodeError(f"{path}: a damaged packet")
        for frame in packet.decode():
            if frame.is_corrupt:
                raise DecodeError(f"{path}: a damaged frame")
            yield frame


class DecordReader(Reader):
    """Reads by decord what decord reads rightly, everything else by PyAV.

    A reader is opened for each call and deleted at once: an idle one goes on decoding into memory.
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

        # At this level it says which frames it painted over; GuardedReader listens.
        decord.logging.set_level(decord.logging.INFO)
        try:
            reader = decord.VideoReader(str(path), num_threads=1)
            if len(reader) != len(timeline):
                raise DecodeError(
                    f"decord counts {len(reader)} frames, the packets say {len(timeline)}"
                )
            frames = reader.get_batch(list(indices)).asnumpy()
            del reader
        except (DecodeError, RuntimeError, AssertionError, decord.DECORDError) as error:
            log.debug("%s: read by PyAV, as decord fails: %s", path, error)
            return PyAVReader().read(path, timeline, indices)
        return frames


def default_reader() -> Reader:
    """decord's where it is installed, else PyAV's, and says so."""
    if importlib.util.find_spec("decord") is not None:
        return DecordReader()
    log.warning("decord is not installed: videos are read by PyAV")
    return PyAVReader()


@contextmanager
def _opened(path: Path) -> Iterator[InputContainer]:
    """The open file, its errors told as ``DecodeError``."""
    opened = False
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            opened = True
            if not container.streams.video:
                raise DecodeError(f"{path}: holds no video stream")
            if container.streams.video[0].codec_context is None:
                raise DecodeError(f"{path}: the codec of its video stream is unknown")
            yield container
    except (av.error.FFmpegError, OSError) as error:
        looks = "" if opened else _looks_like(path)
        raise DecodeError(f"{path}: {getattr(error, 'strerror', None) or error}{looks}") from error


def _looks_like(path: Path) -> str:
    """What a file that FFmpeg cannot open seems to be, in brackets; nothing for one that is not
    there.
    """
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        head = file.read(1024)
    if not head:
        return " (the file is empty)"
    if head[4:8] == b"ftyp":
        return " (an mp4 without its index: cut short?)"
    text = head.decode("utf-8", errors="replace")  # its last letter may be cut in two
    if "\ufffd" not in text[:-1] and all(c.isprintable() or c.isspace() for c in text):
        return " (the file is text)"
    return " (no known container)"
