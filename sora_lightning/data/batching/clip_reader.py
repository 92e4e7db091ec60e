"""Pixels of a clip's window, at a frame rate and a size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy import ndarray
from torch import Tensor

from sora_lightning.data.batching.buckets import fit_frames
from sora_lightning.data.decoding.checksums import Checksums
from sora_lightning.data.decoding.errors import DecodeError
from sora_lightning.data.decoding.readers import Reader
from sora_lightning.data.decoding.shards import FETCH_TIMEOUT_S, ShardFiles, State, state
from sora_lightning.data.decoding.timeline import Timeline
from sora_lightning.data.manifest.records import ClipRecord
from sora_lightning.types import VideoSize

TIMELINES_KEPT = 16384


class WindowReader(Protocol):
    """Reads the pixels of a clip's window."""

    fps: float

    def read(
        self, record: ClipRecord, size: VideoSize, position: float
    ) -> Float[Tensor, "3 F H W"]: ...


class ClipReader:
    """Reads windows of clips at a frame rate and a size; remembers when each file's frames are
    shown. A file whose checksum is not the one that was indexed is refused.
    """

    def __init__(
        self,
        reader: Reader,
        fps: float,
        checksums: Checksums | None = None,
        fetch_timeout_s: float | None = FETCH_TIMEOUT_S,
    ) -> None:
        self.reader = reader
        self.fps = fps
        self.checksums = checksums or Checksums()
        self.files = ShardFiles(fetch_timeout_s)
        self._timelines: dict[tuple[Path, State | None], Timeline] = {}

    def read(
        self, record: ClipRecord, size: VideoSize, position: float
    ) -> Float[Tensor, "3 F H W"]:
        """Read frames spaced by ``1 / fps`` seconds, in [-1, 1].

        Raises ``DecodeError`` or another ``ValueError``.
        """
        path, timeline, times_s = self.locate(record, size, position)
        frames = self.reader.read(path, timeline, timeline.shown_at(times_s).tolist())
        return fit_frames(torch.from_numpy(frames), size.height, size.width)

    def locate(
        self, record: ClipRecord, size: VideoSize, position: float
    ) -> tuple[Path, Timeline, Float64[ndarray, " F"]]:
        """Return the clip's file and the times of a window's frames in it. Raises as ``read``."""
        path = self.files.local(record)
        timeline = self.timeline(record, path)
        if record.decord_objection is not None:
            timeline = replace(timeline, decord_objection=record.decord_objection)
        span_s = (size.num_frames - 1) / self.fps
        end_s = min(record.end_s, timeline.end_s)
        if span_s >= end_s - record.start_s:
            raise DecodeError(
                f"{record.path}: {end_s - record.start_s:.3f} s are too short for {size}"
            )
        latest_s = min(timeline.times_s[-1], end_s) - span_s
        start_s = record.start_s + position * max(0.0, latest_s - record.start_s)
        return path, timeline, start_s + np.arange(size.num_frames) / self.fps

    def timeline(self, record: ClipRecord, path: Path) -> Timeline:
        """Return the times of the frames of a clip's file, which lies at ``path``.

        Raises ``DecodeError``, also where the file is not the one that was indexed.
        """
        as_seen = path, state(record)
        if as_seen not in self._timelines:
            self.checksums.require_unchanged(record, path)
            if len(self._timelines) >= TIMELINES_KEPT:
                self._timelines.pop(next(iter(self._timelines)))
            self._timelines[as_seen] = self.reader.timeline(path)
        return self._timelines[as_seen]
