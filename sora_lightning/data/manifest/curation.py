"""Scores of raw videos from one pass over small frames: motion, black and static frames, scene
cuts, and a hash that near duplicates share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import Float, Int, UInt8, UInt64

from sora_lightning.checks import import_optional
from sora_lightning.data.decoding.errors import DecodeError
from sora_lightning.data.decoding.readers import decoded_frames
from sora_lightning.data.decoding.timeline import read_timeline

ROWS, COLUMNS = 36, 64
# Levels of luma, of 255: limited-range black is 16, and codecs leave a little noise upon it.
BLACK_LEVEL = 24.0
STATIC_LEVEL = 0.5
# A cut changes the frame by this many levels on average, and this many times as much as the
# frames around it change.
CUT_LEVELS, CUT_RATIO = 12.0, 3.0
CUT_NEIGHBOURS = 4
NEAR_BITS = 10


@dataclass(frozen=True)
class Thumbnails:
    """A file's frames, scaled down, in luma and chroma, and the time of each."""

    times_s: Float[np.ndarray, " F"]
    frames: UInt8[np.ndarray, "F 3 h w"]

    @property
    def changes(self) -> Float[np.ndarray, " F-1"]:
        """Return the mean difference in levels between each frame and the next."""
        if len(self.frames) < 2:
            return np.zeros(0)
        steps = np.abs(np.diff(self.frames.astype(np.int16), axis=0))
        return steps.mean((1, 2, 3))


@dataclass(frozen=True)
class Scores:
    """Columns of one clip.

    ``motion`` is the mean change of luma between frames in levels of 255, ``black`` and ``static``
    are shares of the frames, ``look`` is a perceptual hash of 192 bits in hexadecimal, similar
    for similar clips.
    """

    motion: float
    black: float
    static: float
    look: str


def look_through(path: Path) -> Thumbnails:
    """Decode a file once, to small frames. Raises ``DecodeError``."""
    converter = VideoReformatter()
    times_s, frames = [], []
    for time_s, frame in decoded_frames(path, read_timeline(path)):
        small = converter.reformat(frame, COLUMNS, ROWS, "yuv444p", interpolation="AREA", threads=1)
        frames.append(small.to_ndarray())
        times_s.append(time_s)
    return Thumbnails(np.array(times_s), np.stack(frames))


def scene_cuts(thumbnails: Thumbnails) -> list[float]:
    """Return the times at which scenes begin, in seconds from the first frame, 0.0 included.

    A hard cut changes the whole frame at once, and far more than the frames before and after it
    change; a fade, a flash or a fast pan does not.
    """
    changes = thumbnails.changes
    cuts = [0.0]
    for place, change in enumerate(changes):
        around = changes[max(0, place - CUT_NEIGHBOURS) : place + CUT_NEIGHBOURS + 1]
        others = np.delete(around, min(place, CUT_NEIGHBOURS))
        usual = others.max() if len(others) else 0.0
        if change >= CUT_LEVELS and change >= CUT_RATIO * usual:
            cuts.append(float(thumbnails.times_s[place + 1]))
    return cuts


def require_pyscenedetect() -> None:
    """Raise ``ValueError`` where PySceneDetect is not installed."""
    import_optional("scenedetect", "detector = pyscenedetect", "scenes")


def pyscenedetect_cuts(path: Path) -> list[float]:
    """Return the times at which scenes begin by PySceneDetect's content detector."""
    from scenedetect import ContentDetector, detect

    scenes = detect(str(path), ContentDetector())
    return [start.seconds for start, _ in scenes] or [0.0]


def score(thumbnails: Thumbnails, start_s: float, end_s: float) -> Scores:
    """Return the scores of a window. Raises ``DecodeError`` for one without frames."""
    inside = (thumbnails.times_s >= start_s - 1e-6) & (thumbnails.times_s < end_s - 1e-6)
    if not inside.any():
        raise DecodeError(f"no frame is shown from {start_s} to {end_s} s")
    luma = thumbnails.frames[inside, 0].astype(np.float64)
    changes = np.abs(np.diff(luma, axis=0)).mean((1, 2))
    return Scores(
        motion=round(float(changes.mean()), 4) if len(changes) else 0.0,
        black=round(float((luma.mean((1, 2)) < BLACK_LEVEL).mean()), 4),
        static=round(float((changes < STATIC_LEVEL).mean()), 4) if len(changes) else 1.0,
        look=_look(luma),
    )


def _look(luma: Float[np.ndarray, "F h w"]) -> str:
    """Return the difference hashes of the first, middle and last frame: on 8 rows of 9 cells, a bit
    says whether a cell is brighter than the one to its left.
    """
    chosen = luma[[0, len(luma) // 2, -1]]
    rows = np.array_split(np.arange(ROWS), 8)
    columns = np.array_split(np.arange(COLUMNS), 9)
    cells = np.array(
        [[[frame[np.ix_(r, c)].mean() for c in columns] for r in rows] for frame in chosen]
    )
    # Flat frames differ by noise alone: the margin keeps their bits at zero.
    bits = np.diff(cells, axis=2) > 1.0
    return np.packbits(bits.ravel()).tobytes().hex()


def duplicates(clips: Iterable[tuple[str, str]]) -> Int[np.ndarray, " n"]:
    """Return for each clip, given as its content and its look, the index of the first earlier clip
    of the same content or nearly the same look that is no duplicate itself, or -1.

    Looks are near if at most ``NEAR_BITS`` of 192 bits differ. Then one of ``NEAR_BITS + 1``
    stretches of them is the same, so that only clips that share one are compared. Flat looks, such
    as of black clips, say nothing and are never near. Takes about 300 bytes a clip.
    """
    digests, packed = bytearray(), bytearray()
    for content, look in clips:
        digests += hashlib.blake2b(content.encode(), digest_size=16).digest()
        packed += bytes.fromhex(look)
    _, first, which = np.unique(
        np.frombuffer(bytes(digests), "V16"), return_index=True, return_inverse=True
    )
    looks = np.frombuffer(bytes(packed), np.uint64).reshape(-1, 3)
    first = first[which].astype(np.int32)
    copies = np.flatnonzero(first != np.arange(len(first)))
    found = np.full(len(first), -1, np.int32)
    found[copies] = first[copies]
    sharing = [_Sharing(stretch) for stretch in _stretches(looks)]
    shown = np.flatnonzero(np.bitwise_count(looks).sum(axis=1) > NEAR_BITS)
    for index in shown[found[shown] < 0].tolist():
        candidates = np.concatenate([one.before(index) for one in sharing])
        differing = np.bitwise_count(looks[candidates] ^ looks[index]).sum(axis=1)
        near = candidates[(differing <= NEAR_BITS) & (found[candidates] < 0)]
        if len(near):
            found[index] = near.min()
    of_first = found[first[copies]]
    found[copies] = np.where(of_first < 0, first[copies], of_first)
    return found


def _stretches(looks: UInt64[np.ndarray, "n 3"]) -> Iterator[Int[np.ndarray, " n"]]:
    """Yield the value of each stretch of the looks' bits, one stretch after the other."""
    of_bytes = looks.view(np.uint8).reshape(len(looks), -1)
    for bits in np.array_split(np.arange(8 * of_bytes.shape[1]), NEAR_BITS + 1):
        value = np.zeros(len(looks), np.int32)
        for bit in bits.tolist():
            value <<= 1
            value |= of_bytes[:, bit // 8] >> (7 - bit % 8) & 1
        yield value


class _Sharing:
    """The clips whose looks have the same value in one stretch."""

    def __init__(self, values: Int[np.ndarray, " n"]) -> None:
        order = np.argsort(values, kind="stable").astype(np.int32)
        begins = np.flatnonzero(np.diff(values[order], prepend=-1))
        lengths = np.diff(begins, append=len(order))
        self.order = order
        self.begin = np.empty(len(order), np.int32)
        self.begin[order] = np.repeat(begins, lengths)
        self.place = np.empty(len(order), np.int32)
        self.place[order] = np.arange(len(order), dtype=np.int32)

    def before(self, index: int) -> Int[np.ndarray, " m"]:
        """Return the indices of earlier clips that share a clip's value."""
        return self.order[self.begin[index] : self.place[index]]
