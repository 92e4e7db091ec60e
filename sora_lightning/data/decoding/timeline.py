"""Times of a file's frames, and which decoders read it correctly.

decord 0.6.0 silently returns wrong frames for open GOPs, mpeg-ts and edit lists, and may loop
endlessly on stream-copied cuts. The packets reveal all of these, so a file is checked by demuxing
it and decoding one frame.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av import Packet, VideoFrame
from av.container import InputContainer
from av.stream import Disposition
from av.video import VideoStream
from jaxtyping import Float, Int

from sora_lightning.data.decoding.display import has_alpha, orientation, shown_width
from sora_lightning.data.decoding.errors import DecodeError, looks_like, require_decodable_size
from sora_lightning.data.decoding.images import check_image, is_image
from sora_lightning.data.decoding.nal_units import has_hole

DECORD_CODECS = ("h264", "hevc", "vp8", "vp9", "mpeg4", "mjpeg")
# MAX_NVOP_SIZE of FFmpeg: so small a packet of mpeg4 may only say that nothing changed.
LARGEST_NOT_CODED = 19
IMAGE_DURATION_S = 0.04  # as FFmpeg counts


@dataclass(frozen=True)
class Timeline:
    """Times of a file's frames, in presentation order.

    Args:
        pts: Presentation timestamps in the stream's own units.
        times_s: Seconds from the first frame.
        end_s: When the last frame ends.
        tick_s: Seconds of one unit of the timestamps.
        keyframes: Indices into both.
        timed: False where the container keeps no timestamps: frames are then counted from the
            start.
        pixel_aspect: The width of a stored pixel over its height.
        pyav_only: Why only PyAV shows the file correctly; ``None`` if others do.
        decord_objection: Why decord must not read the file; ``None`` if it may.
    """

    pts: Int[np.ndarray, " F"]
    times_s: Float[np.ndarray, " F"]
    end_s: float
    tick_s: float
    keyframes: tuple[int, ...]
    timed: bool
    pixel_aspect: float
    pyav_only: str | None
    decord_objection: str | None

    def __len__(self) -> int:
        return len(self.times_s)

    @property
    def fps(self) -> float:
        """Return the mean frame rate."""
        return len(self) / self.end_s

    def shown_at(self, times_s: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Return the index of the frame on screen at each time (seconds from the first frame): the
        last that has begun.

        Half a tick of the container's clock is forgiven, since timestamps are rounded to whole
        ticks. Before the first frame it is the first, after the last the last.
        """
        slack = self.tick_s / 2 + 1e-6
        indices = np.searchsorted(self.times_s, times_s + slack, side="right") - 1
        return np.clip(indices, 0, len(self) - 1)

    def shown_within(self, start_s: float, end_s: float) -> Int[np.ndarray, " n"]:
        """Return the indices of the frame on screen at ``start_s`` and of later ones that begin
        before ``end_s``.
        """
        first = int(self.shown_at(np.array([start_s]))[0])
        return np.arange(first, max(first + 1, int(np.searchsorted(self.times_s, end_s - 1e-6))))


def read_timeline(path: Path) -> Timeline:
    """Demux the video stream that players choose, decoding one frame. Raises ``DecodeError``."""
    if is_image(path):
        check_image(path)
        return _image_timeline()
    with opened(path) as (container, stream):
        facts = _facts(container, stream)
        packets, first_frame = _demuxed(path, container, stream)
    if not packets:
        raise DecodeError(f"{path}: the video stream holds no packets")
    pyav_only = _pyav_only(facts, packets, first_frame)
    decoded = [packet for packet in packets if not packet.discarded]
    pts = np.array([packet.pts or 0 for packet in decoded], dtype=np.int64)
    untimed = not facts.tick_s or any(packet.pts is None for packet in packets)
    if untimed or not len(pts) or len(np.unique(pts)) != len(pts):
        return _counted_timeline(path, facts)
    keys = np.array([packet.is_keyframe for packet in decoded])
    order = np.argsort(pts)
    times_s = (pts[order] - pts[order[0]]) * facts.tick_s
    gap_s = float(np.median(np.diff(times_s))) if len(pts) > 1 else facts.mean_gap_s
    last_s = decoded[order[-1]].duration * facts.tick_s or gap_s
    objection = _decord_objection(facts, packets, pts, keys)
    return Timeline(
        pts=pts[order],
        times_s=times_s,
        end_s=float(times_s[-1] + last_s),
        tick_s=facts.tick_s,
        keyframes=tuple(np.flatnonzero(keys[order]).tolist()),
        timed=True,
        pixel_aspect=facts.pixel_aspect,
        pyav_only=pyav_only,
        decord_objection=objection or pyav_only,
    )


@contextmanager
def opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Yield the open file and the video stream that players choose. Raises ``DecodeError``."""
    is_open = False
    try:
        # An absolute path, since FFmpeg takes what stands before a colon for a protocol.
        with av.open(os.path.abspath(path), metadata_errors="replace") as container:
            is_open = True
            stream = container.streams.best("video")
            if not isinstance(stream, VideoStream):
                raise DecodeError(f"{path}: holds no video stream")
            if stream.codec_context is None:
                raise DecodeError(f"{path}: the codec of its video stream is unknown")
            require_decodable_size(path, stream.height, shown_width(stream.width, _aspect(stream)))
            yield container, stream
    except (av.error.FFmpegError, OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "needs too much memory"
        raise DecodeError(f"{path}: {reason}{'' if is_open else looks_like(path)}") from error


def demux(path: Path, container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    """Yield the packets of a stream, including the empty one that flushes the decoder."""
    try:
        yield from container.demux(stream)
    except IndexError as error:  # PyAV's, where damage makes a stream appear midway
        raise DecodeError(f"{path}: a packet of a stream that the file does not have") from error


class _Facts(NamedTuple):
    """Properties in the headers of a file and its video stream."""

    container: str
    codec: str
    pixels: str | None
    num_streams: int
    pixel_aspect: float
    tick_s: float
    mean_gap_s: float


def _facts(container: InputContainer, stream: VideoStream) -> _Facts:
    codec = stream.codec_context
    covers = [s for s in container.streams.video if s.disposition & Disposition.attached_pic]
    return _Facts(
        container=container.format.name,
        codec=codec.name,
        pixels=codec.pix_fmt,
        num_streams=len(container.streams.video) - len(covers),
        pixel_aspect=_aspect(stream),
        tick_s=float(stream.time_base or 0),
        mean_gap_s=1 / float(stream.average_rate or stream.guessed_rate or 25),
    )


def _aspect(stream: VideoStream) -> float:
    aspect = stream.sample_aspect_ratio
    return float(aspect) if aspect and aspect > 0 else 1.0


class _Packet(NamedTuple):
    pts: int | None
    size: int
    duration: int
    is_keyframe: bool
    discarded: bool
    has_hole: bool


def _demuxed(
    path: Path, container: InputContainer, stream: VideoStream
) -> tuple[list[_Packet], VideoFrame | None]:
    """Return all packets with data, and the first frame or ``None`` if it does not decode."""
    packets, frame, damaged = [], None, False
    stream.codec_context.thread_count = 1
    for packet in demux(path, container, stream):
        if packet.size:
            values = packet.pts, packet.size, packet.duration or 0, packet.is_keyframe
            hole = has_hole(packet, stream.codec_context)
            packets.append(_Packet(*values, packet.is_discard, hole))
        if frame is None and not damaged:
            try:
                frame = next(iter(packet.decode()), None)
            except av.error.FFmpegError:
                damaged = True
    return packets, frame


def _pyav_only(facts: _Facts, packets: list[_Packet], frame: VideoFrame | None) -> str | None:
    """Return why only PyAV decodes the pixels that are shown, or ``None``."""
    if facts.num_streams > 1:
        return f"{facts.num_streams} video streams, of which decoders choose differently"
    if shown_width(1000, facts.pixel_aspect) != 1000:
        return f"pixels of aspect {facts.pixel_aspect:g}, which other decoders show as square"
    if frame is None:
        return "the first frame does not decode"
    if has_alpha(frame.format):
        return "transparent frames, of which other decoders show what is hidden"
    if not orientation(frame).is_rotation:
        return "a mirrored image, which other decoders only rotate"
    if any(packet.has_hole for packet in packets):
        return "zeros in place of data, which other decoders read on"
    return None


def _decord_objection(
    facts: _Facts, packets: list[_Packet], pts: np.ndarray, keys: np.ndarray
) -> str | None:
    """Return why decord is unsafe, or ``None``; ``pts`` and ``keys`` are in decoding order."""
    if "mpegts" in facts.container:
        return "mpeg-ts: decord seeks to wrong frames"
    if facts.container == "avi":
        return "avi: keeps no timestamps, and decord loses its place where its index is damaged"
    if facts.codec not in DECORD_CODECS:
        return f"codec {facts.codec}: unknown to decord"
    if facts.codec == "h264" and "444" in (facts.pixels or "") and keys.sum() > 1:
        # Streams of x264 before build 151 need a workaround, which decord's FFmpeg forgets when it
        # seeks.
        return "h264 in 4:4:4 with several keyframes: decord garbles old ones after a seek"
    if facts.codec == "mpeg4" and min(p.size for p in packets) <= LARGEST_NOT_CODED:
        return "mpeg4 with frames that may not be coded, which decord counts and does not show"
    if num_discarded := len(packets) - len(pts):
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


def _counted_timeline(path: Path, facts: _Facts) -> Timeline:
    """Return frames at an even rate, counted by decoding, for a container whose timestamps are
    absent or repeat.
    """
    with opened(path) as (container, stream):
        num_frames = sum(len(packet.decode()) for packet in demux(path, container, stream))
    if not num_frames:
        raise DecodeError(f"{path}: no frame can be decoded")
    frames = np.arange(num_frames)
    return Timeline(
        pts=frames,
        times_s=frames * facts.mean_gap_s,
        end_s=num_frames * facts.mean_gap_s,
        tick_s=facts.mean_gap_s / 100,
        keyframes=(0,),
        timed=False,
        pixel_aspect=facts.pixel_aspect,
        pyav_only="timestamps are missing or repeat",
        decord_objection="timestamps are missing or repeat",
    )


def _image_timeline() -> Timeline:
    return Timeline(
        pts=np.zeros(1, np.int64),
        times_s=np.zeros(1),
        end_s=IMAGE_DURATION_S,
        tick_s=IMAGE_DURATION_S,
        keyframes=(0,),
        timed=True,
        pixel_aspect=1.0,
        pyav_only="a still image",
        decord_objection="a still image",
    )
