"""Videos and prompts as the judge takes them in: files and lists of files to uint8 frames.

Frames are chosen by time, never by count, so that files of any frame rate are judged at the
protocol's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

SUFFIXES = (".mp4", ".gif", ".avi", ".mkv", ".mov", ".webm")
PROMPTS_FILE = "prompts.jsonl"
SAMPLING_KEYS = ("seed", "num_steps", "guidance_scale", "checkpoint_sha256")


@dataclass(frozen=True)
class VideoEntry:
    """One video to judge: its file, what it should show in one or more wordings, and how it was
    sampled.

    ``sampling`` holds those of ``SAMPLING_KEYS`` that its row has.
    """

    path: Path
    wordings: tuple[str, ...]
    sampling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """The first wording, by which the video is judged."""
        return self.wordings[0]


def read_entries(listing: Path) -> list[VideoEntry]:
    """The rows of a JSONL file: ``path`` (relative to the file's folder) and ``prompt`` or
    ``caption``.

    A caption may be a list of wordings. Raises ``ValueError`` naming the file, the line and the key
    for a row that is not JSON, a missing key, an empty prompt, a video that does not exist.
    """
    if not listing.is_file():
        raise ValueError(f"{listing}: no such file")
    lines = listing.read_text(encoding="utf-8").splitlines()
    entries = [
        _entry(line, listing.parent, where=f"{listing}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not entries:
        raise ValueError(f"{listing}: is empty; a row for each video is needed")
    return entries


def _entry(line: str, folder: Path, where: str) -> VideoEntry:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("path"), str):
        raise ValueError(f"{where}: 'path' is missing; it must name the video's file")
    prompt = row.get("prompt", row.get("caption"))
    wordings = prompt if isinstance(prompt, list) and prompt else [prompt]
    if not all(isinstance(text, str) and text.strip() for text in wordings):
        raise ValueError(
            f"{where}: 'prompt' or 'caption' is {prompt!r}; it must be a text, not empty"
        )
    path = folder / row["path"]
    if not path.is_file():
        raise ValueError(f"{where}: 'path' is {row['path']!r}, and {path} does not exist")
    sampling = {key: row[key] for key in SAMPLING_KEYS if key in row}
    return VideoEntry(path, tuple(map(str.strip, wordings)), sampling)


def read_folder(folder: Path) -> list[VideoEntry]:
    """The videos of a folder, with the prompts of the ``prompts.jsonl`` beside them.

    Raises ``ValueError`` for a folder that does not exist, holds no video, or holds no prompts.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    videos = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    if not videos:
        raise ValueError(f"{folder}: holds no video; known are {', '.join(SUFFIXES)}")
    if not (folder / PROMPTS_FILE).is_file():
        raise ValueError(
            f"{folder}: holds {len(videos)} videos and no {PROMPTS_FILE}; "
            'write a row {"path": ..., "prompt": ...} for each'
        )
    return read_entries(folder / PROMPTS_FILE)


def read_video(
    path: Path, num_frames: int, fps: float | None, window: str = "middle", draw: float = 0.5
) -> UInt8[np.ndarray, "F H W 3"]:
    """``num_frames`` frames at ``fps`` from a window of a video, each the one on display at its
    time; without ``fps``, as many successive frames as the file has them.

    The window stands at the ``start``, in the ``middle``, or, if ``random``, at the part ``draw``
    in 0..1 of the way between start and end. Raises ``ValueError`` naming the file when it cannot
    be decoded or is too short.
    """
    times, end = video_times(path)
    check_length(path, times, end, num_frames, fps)
    part = {"start": 0.0, "middle": 0.5, "random": draw}[window]
    if fps is None:
        first = int(part * (len(times) - num_frames) + (0.5 if window == "random" else 0))
        return _frames(path, np.arange(first, first + num_frames))
    start = times[0] + max(0.0, end - times[0] - num_frames / fps) * part
    wanted = start + np.arange(num_frames) / fps
    # Times are rounded to the file's clock: a frame that begins half a millisecond late is the one.
    return _frames(path, np.searchsorted(times, wanted + 5e-4, side="right") - 1)


def check_length(
    path: Path, times: Float[np.ndarray, " F"], end: float, num_frames: int, fps: float | None
) -> None:
    """Raises ``ValueError`` naming a file too short for a window."""
    if fps is None:
        if len(times) < num_frames:
            raise ValueError(f"{path}: has {len(times)} frames; {num_frames} are needed")
        return
    length = end - times[0]
    # A whole window has num_frames / fps; the last of its frames need only have begun.
    if (num_frames - 1) / fps >= length - 1e-6:
        raise ValueError(
            f"{path}: lasts {length:.2f} s; {num_frames} frames at {fps:g} fps "
            f"take {num_frames / fps:.2f} s"
        )


def video_times(path: Path) -> tuple[Float[np.ndarray, " F"], float]:
    """When each frame begins, in seconds, in the order of display; and when the last one ends."""
    with _opened(path) as (container, stream):
        packets = [packet for packet in container.demux(stream) if packet.size]
        if not packets:
            raise ValueError(f"{path}: holds no frame")
        tick, rate = float(stream.time_base or 1), float(stream.average_rate or 1)
        stamps = [p.dts if p.pts is None else p.pts for p in packets]
        known = [stamp for stamp in stamps if stamp is not None]
        times = np.sort(np.array(known, dtype=np.float64)) * tick
        if len(known) < len(stamps):
            times = np.arange(len(stamps)) / rate
        step = (packets[-1].duration or 0) * tick or 1 / rate
    return times, float(times[-1] + step)


def _frames(path: Path, indices: Sequence[int] | np.ndarray) -> UInt8[np.ndarray, "F H W 3"]:
    wanted = set(map(int, indices))
    kept: dict[int, np.ndarray] = {}
    to_rgb = VideoReformatter()  # one for all frames: setting it up costs more than a small frame
    with _opened(path) as (container, stream):
        for index, frame in enumerate(container.decode(stream)):
            if index in wanted:
                pixels = to_rgb.reformat(frame, format="rgb24").to_ndarray()
                kept[index] = np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90))
            if index >= max(wanted):
                break
    if missing := sorted(wanted - kept.keys()):
        raise ValueError(f"{path}: frame {missing[0]} does not decode; the file is damaged")
    return np.stack([kept[int(index)] for index in indices])


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, av.VideoStream]]:
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path}: holds no video stream")
            # Clips are short: threads would take longer to start than to decode.
            container.streams.video[0].thread_type = "NONE"
            yield container, container.streams.video[0]
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"{path}: cannot be decoded as video ({error})") from error


def nearest_size(
    video: UInt8[np.ndarray, "F H W 3"], sizes: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """The (height, width) whose aspect ratio is nearest to the video's; the first of equals."""
    ratio = np.log(video.shape[1] / video.shape[2])
    return min(sizes, key=lambda size: abs(np.log(size[0] / size[1]) - ratio))


def cover(
    video: UInt8[np.ndarray, "F H W 3"], height: int, width: int
) -> UInt8[np.ndarray, "F height width 3"]:
    """Cut about the centre to the proportions of height x width, then resized to them (bilinear,
    antialiased). Nothing is distorted by more than half a pixel of the source."""
    rows = min(video.shape[1], max(1, round(video.shape[2] * height / width)))
    columns = min(video.shape[2], max(1, round(video.shape[1] * width / height)))
    top, left = (video.shape[1] - rows) // 2, (video.shape[2] - columns) // 2
    cut = video[:, top : top + rows, left : left + columns]
    return cut if cut.shape[1:3] == (height, width) else _resized(cut, [height, width])


def squash(video: UInt8[np.ndarray, "F H W 3"], side: int) -> UInt8[np.ndarray, "F side side 3"]:
    """Resized to a square whatever the aspect ratio (bilinear, antialiased)."""
    return _resized(video, [side, side])


def _resized(
    video: UInt8[np.ndarray, "F H W 3"], size: list[int]
) -> UInt8[np.ndarray, "F height width 3"]:
    frames = rearrange(torch.from_numpy(video), "F H W c -> F c H W").float()
    frames = F.interpolate(frames, size=size, mode="bilinear", antialias=True)
    return rearrange(frames.round().clamp(0, 255).byte(), "F c H W -> F H W c").numpy()


def as_batch(videos: Sequence[UInt8[np.ndarray, "F H W 3"]]) -> UInt8[Tensor, "b 3 F H W"]:
    """Clips of one size as extractors take them."""
    return rearrange(torch.from_numpy(np.stack(videos)), "b F H W c -> b c F H W")
