"""Video files: containers, folders of frames, and tensors.

Containers are read by ``sora_lightning.data.decoding``. Tensors are read without executing code,
and only up to a size limit.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open

from evaluation.features.weights import digest_of
from sora_lightning.data.decoding import PyAVReader, Timeline, read_frames, read_timeline
from sora_lightning.data.manifest.tables import IMAGES, VIDEOS
from sora_lightning.files import check_archive

CONTAINERS, IMAGE_SUFFIXES = VIDEOS, (*IMAGES, ".bmp")
TENSORS = (".pt", ".npy", ".safetensors")
# Larger files are refused before they are read, since they would not fit into memory.
_MOST_BYTES = 2**33
LAYOUTS = {"F H W 3": 3, "3 F H W": 0, "F 3 H W": 1}  # and the axis of the colours, if not the last
RANGES = {"0..255": (0.0, 255.0), "0..1": (0.0, 1.0), "-1..1": (-1.0, 1.0)}

Frames = UInt8[np.ndarray, "F H W 3"]


@dataclass(frozen=True)
class VideoFile:
    """A video by its path, with the properties that the file itself does not store.

    ``fps`` is the frame rate of a folder of frames or of a tensor; containers store their own.
    ``layout`` is the axis order of a tensor, one of ``LAYOUTS``. ``range`` is its value range, one
    of ``RANGES``; for uint8 it is always ``0..255``. A tensor file holds one tensor. ``start_s``
    and ``end_s`` select a window, in seconds from the first frame.
    """

    path: Path
    fps: float | None = None
    layout: str | None = None
    range: str | None = None
    start_s: float = 0.0
    end_s: float = math.inf

    @property
    def has_clock(self) -> bool:
        """Return True if the frames have timestamps."""
        return self.fps is not None or self.path.suffix.lower() in CONTAINERS

    def times(self) -> tuple[Float[np.ndarray, " F"], float]:
        """Return the start times of the window's frames in display order, and the end of the last
        one.

        Times are in seconds. Without a frame rate, each frame lasts one second.
        """
        times, end = self._all_times()
        inside = times[self._first(times) : np.searchsorted(times, self.end_s)]
        if self.start_s >= end or not len(inside):
            raise ValueError(
                f"{self.path}: no frame is shown from {self.start_s:g} to {self.end_s:g} s"
            )
        return inside, min(end, self.end_s)

    def frames(self, places: Sequence[int] | np.ndarray) -> Frames:
        """Return the frames at these indices of the window.

        Raises ``ValueError`` naming the file if it cannot be decoded, or if a tensor does not have
        the given layout or range.
        """
        indices = np.asarray(places, dtype=int)
        if self.start_s > 0:
            indices = indices + self._first(self._all_times()[0])
        if self.path.is_dir():
            return _image_frames(self.path, indices)
        if self.path.suffix.lower() in TENSORS:
            return self._levels(self._tensor()[torch.as_tensor(indices)])
        return PyAVReader().read(self.path, self._timeline, indices.tolist())

    @cached_property
    def _timeline(self) -> Timeline:
        return read_timeline(self.path)

    def _first(self, times: Float[np.ndarray, " F"]) -> int:
        """Index of the frame displayed at the start of the window."""
        return max(0, int(np.searchsorted(times, self.start_s + 5e-4, side="right")) - 1)

    def _all_times(self) -> tuple[Float[np.ndarray, " F"], float]:
        if self.path.is_dir():
            num_frames = len(_image_files(self.path))
        elif self.path.suffix.lower() in TENSORS:
            num_frames = len(self._tensor())
        else:
            return self._timeline.times_s, self._timeline.end_s
        step = 1 / (self.fps or 1.0)
        return np.arange(num_frames) * step, num_frames * step

    def check(self) -> tuple[int, int]:
        """Return the height and width.

        Raises ``ValueError`` as ``frames`` does, for all values of a tensor and for the first frame
        of any other video.
        """
        if self.path.suffix.lower() in TENSORS:
            height, width = self._levels(self._tensor()).shape[1:3]
        else:
            height, width = self.frames([0]).shape[1:3]
        return height, width

    def sha256(self) -> str:
        """Return the hash of content and window; for a folder, of its frames in their order."""
        window = (self.start_s, self.end_s)
        if not self.path.is_dir() and window == (0.0, math.inf):
            return digest_of(self.path).removeprefix("sha256:")
        paths = _image_files(self.path) if self.path.is_dir() else [self.path]
        names = [digest_of(path) for path in paths]
        names += [] if window == (0.0, math.inf) else [str(window)]
        return hashlib.sha256("\n".join(names).encode()).hexdigest()

    def _tensor(self) -> torch.Tensor:
        """The tensor with layout F H W 3."""
        tensor = _only_tensor(self.path)
        if self.layout not in LAYOUTS:
            said = "no 'layout'" if self.layout is None else f"'layout' {self.layout!r}"
            raise ValueError(
                f"{self.path}: its row says {said}; it must be one of {', '.join(LAYOUTS)}"
            )
        if tensor.ndim != 4 or tensor.shape[LAYOUTS[self.layout]] != 3:
            raise ValueError(f"{self.path}: has shape {tuple(tensor.shape)}, not {self.layout}")
        if not tensor.numel():
            raise ValueError(f"{self.path}: has shape {tuple(tensor.shape)}: holds no pixel")
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
        slack = (high - low) / 255  # rounding; larger excess means another range
        fits = low - slack <= least and greatest <= high + slack
        # An image with only the darkest levels is in 0..1, labelled with the wrong range.
        if not fits or (self.range == "0..255" and 0 < greatest <= 1):
            raise ValueError(
                f"{self.path}: has values from {least:.4g} to {greatest:.4g}, not in {self.range}"
            )
        levels = (tensor.double() - low) / (high - low) * 255
        return levels.round().clamp(0, 255).to(torch.uint8).numpy()


def is_video(path: Path) -> bool:
    """Return True for a video or tensor file, by its suffix, and for a folder of images."""
    if path.name.startswith("."):
        return False
    if path.is_dir():
        return any(one.suffix.lower() in IMAGE_SUFFIXES for one in path.iterdir())
    return path.suffix.lower() in CONTAINERS + TENSORS


def _only_tensor(path: Path) -> torch.Tensor:
    """The only tensor of a file, memory-mapped. Its size is checked before its values are read."""
    suffix = path.suffix.lower()
    content: Any
    try:
        if suffix == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            _check_bytes(path, array.nbytes)
            content = torch.from_numpy(np.array(array))
        elif suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        else:
            check_archive(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except SafetensorError as error:
        raise ValueError(f"{path}: cannot be read as tensors ({error})") from error
    except Exception as error:  # torch and numpy raise many types for a damaged file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if reason.startswith(f"{path}: "):
            raise
        raise ValueError(f"{path}: cannot be read as an array ({reason})") from error
    found = list(content.values()) if isinstance(content, dict) else [content]
    if len(found) != 1 or not isinstance(found[0], torch.Tensor):
        raise ValueError(f"{path}: holds {len(found)} values; a video is one tensor")
    _check_bytes(path, found[0].numel() * found[0].element_size())
    return found[0]


def _check_bytes(path: Path, size: int) -> None:
    if size > _MOST_BYTES:
        raise ValueError(f"{path}: holds {size:,} bytes; at most {_MOST_BYTES:,} are read")


def _image_files(folder: Path) -> list[Path]:
    """The frames of a folder in natural order, so that 10 comes after 9."""
    found = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    ]
    if not found:
        raise ValueError(f"{folder}: holds no frame; known are {', '.join(IMAGE_SUFFIXES)}")

    def numbers_in(path: Path) -> list[tuple[int, str]]:
        parts = re.split(r"(\d+)", path.name)
        return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]

    return sorted(found, key=numbers_in)


def _image_frames(folder: Path, places: Sequence[int] | np.ndarray) -> Frames:
    paths = _image_files(folder)
    frames: list[np.ndarray] = []
    for path in (paths[int(place)] for place in places):
        frames.append(read_frames(path)[0][0])
        if frames[-1].shape != frames[0].shape:
            first, this = ("x".join(map(str, one.shape[:2])) for one in (frames[0], frames[-1]))
            raise ValueError(f"{path}: is {this} pixels, and another frame of the video {first}")
    return np.stack(frames)
