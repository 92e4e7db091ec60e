"""Files of videos in three forms: containers that know their own times, folders of frames, and
tensors.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from einops import rearrange
from jaxtyping import Float, UInt8
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from evaluation.features.weights import digest_of, read_tensors

CONTAINERS = (".mp4", ".gif", ".avi", ".mkv", ".mov", ".webm")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
TENSORS = (".pt", ".npy", ".safetensors")
LAYOUTS = {"F H W 3": 3, "3 F H W": 0, "F 3 H W": 1}  # and which axis holds the colours
RANGES = {"0..255": (0.0, 255.0), "0..1": (0.0, 1.0), "-1..1": (-1.0, 1.0)}

Frames = UInt8[np.ndarray, "F H W 3"]


@dataclass(frozen=True)
class VideoFile:
    """A video by its path, and what it cannot say of itself.

    ``fps`` is the rate of a folder of frames or of a tensor; containers have their own. ``layout``
    is a tensor's, one of ``LAYOUTS``; ``range`` that of its values, one of ``RANGES``, which for
    uint8 is ``0..255`` without saying. A file of tensors holds one.
    """

    path: Path
    fps: float | None = None
    layout: str | None = None
    range: str | None = None

    @property
    def has_clock(self) -> bool:
        """Whether its frames have times: without, they only follow one another."""
        return self.fps is not None or self.path.suffix.lower() in CONTAINERS

    def times(self) -> tuple[Float[np.ndarray, " F"], float]:
        """When each frame begins, in seconds, in the order of display; and when the last one ends.
        A second a frame without a clock.
        """
        if self.path.is_dir():
            num_frames = len(_pictures(self.path))
        elif self.path.suffix.lower() in TENSORS:
            num_frames = len(self._tensor())
        else:
            return _container_times(self.path)
        step = 1 / (self.fps or 1.0)
        return np.arange(num_frames) * step, num_frames * step

    def frames(self, places: Sequence[int] | np.ndarray) -> Frames:
        """Those at these places. Raises ``ValueError`` naming the file for what cannot be decoded,
        and for tensors of another layout or range than is said.
        """
        if self.path.is_dir():
            return _picture_frames(self.path, places)
        if self.path.suffix.lower() in TENSORS:
            return self._levels(self._tensor()[torch.as_tensor(np.asarray(places))])
        return _container_frames(self.path, places)

    def check(self) -> tuple[int, int]:
        """Height and width. Raises ``ValueError`` as ``frames`` does, for all of a tensor's values
        and the first frame of another video.
        """
        if self.path.suffix.lower() in TENSORS:
            height, width = self._levels(self._tensor()).shape[1:3]
        else:
            height, width = self.frames([0]).shape[1:3]
        return height, width

    def sha256(self) -> str:
        """Of its content; of a folder, of its frames' in their order."""
        if not self.path.is_dir():
            return digest_of(self.path).removeprefix("sha256:")
        names = "\n".join(digest_of(path) for path in _pictures(self.path))
        return hashlib.sha256(names.encode()).hexdigest()

    def _tensor(self) -> torch.Tensor:
        """With frames first and colours last."""
        tensor = _only_tensor(self.path)
        if self.layout not in LAYOUTS:
            said = "no 'layout'" if self.layout is None else f"'layout' {self.layout!r}"
            raise ValueError(
                f"{self.path}: its row says {said}; it must be one of {', '.join(LAYOUTS)}"
            )
        if tensor.ndim != 4 or tensor.shape[LAYOUTS[self.layout]] != 3:
            raise ValueError(f"{self.path}: has shape {tuple(tensor.shape)}, not {self.layout}")
        letters = self.layout.replace("3", "c")
        return rearrange(tensor, f"{letters} -> F H W c")

    def _levels(self, tensor: torch.Tensor) -> Frames:
        if tensor.dtype == torch.uint8:
            if self.range not in (None, "0..255"):
                raise ValueError(f"{self.path}: is uint8, and 'range' {self.range!r} is said")
            return tensor.contiguous().numpy()
        if not tensor.is_floating_point() or self.range not in RANGES:
            raise ValueError(
                f"{self.path}: has values of type {tensor.dtype} and 'range' {self.range!r}; they "
                f"must be uint8, or floating point in one of {', '.join(RANGES)}"
            )
        low, high = RANGES[self.range]
        least, greatest = tensor.min().item(), tensor.max().item()
        slack = (high - low) / 255  # of rounding; more is another range
        fits = low - slack <= least and greatest <= high + slack
        # A picture of nothing but the darkest level is one in 0..1 taken for another.
        if not fits or (self.range == "0..255" and 0 < greatest <= 1):
            raise ValueError(
                f"{self.path}: has values from {least:.4g} to {greatest:.4g}, not in {self.range}"
            )
        levels = (tensor.double() - low) / (high - low) * 255
        return levels.round().clamp(0, 255).to(torch.uint8).numpy()


def is_video(path: Path) -> bool:
    """By its name, or for a folder by the pictures in it."""
    if path.is_dir():
        return any(one.suffix.lower() in PICTURES for one in path.iterdir())
    return path.suffix.lower() in CONTAINERS + TENSORS


def _only_tensor(path: Path) -> torch.Tensor:
    suffix = path.suffix.lower()
    if suffix == ".npy":
        try:
            return torch.from_numpy(np.load(path, allow_pickle=False))
        except (ValueError, EOFError, TypeError) as error:
            raise ValueError(f"{path}: cannot be read as an array ({error})") from error
    content: Any
    if suffix == ".safetensors":
        try:
            content = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: cannot be read as tensors ({error})") from error
    else:
        content = read_tensors(path)
    found = list(content.values()) if isinstance(content, dict) else [content]
    if len(found) != 1 or not isinstance(found[0], torch.Tensor):
        raise ValueError(f"{path}: holds {len(found)} values; a video is one tensor")
    return found[0]


def _pictures(folder: Path) -> list[Path]:
    """The frames of a folder by their numbers, so that 10 comes after 9."""
    found = [path for path in folder.iterdir() if path.suffix.lower() in PICTURES]
    if not found:
        raise ValueError(f"{folder}: holds no frame; known are {', '.join(PICTURES)}")

    def numbers_in(path: Path) -> list[tuple[int, str]]:
        parts = re.split(r"(\d+)", path.name)
        return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]

    return sorted(found, key=numbers_in)


def _picture_frames(folder: Path, places: Sequence[int] | np.ndarray) -> Frames:
    paths = _pictures(folder)
    frames: list[np.ndarray] = []
    for path in (paths[int(place)] for place in places):
        try:
            with Image.open(path) as picture:
                frames.append(np.asarray(picture.convert("RGB")))
        except OSError as error:
            raise ValueError(f"{path}: cannot be decoded as a picture ({error})") from error
        if frames[-1].shape != frames[0].shape:
            first, this = ("x".join(map(str, one.shape[:2])) for one in (frames[0], frames[-1]))
            raise ValueError(f"{path}: is {this} pixels, and another frame of the video {first}")
    return np.stack(frames)


def _container_times(path: Path) -> tuple[Float[np.ndarray, " F"], float]:
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


def _container_frames(path: Path, places: Sequence[int] | np.ndarray) -> Frames:
    wanted = set(map(int, places))
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
    return np.stack([kept[int(place)] for place in places])


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
