"""Clips with the clips they are edits of (InstructPix2Pix, arXiv 2211.09800, for video): the column
``source`` of a manifest names the file before the edit, ``path`` the one after it, and the caption
is the instruction.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from sora_lightning.data.batching.buckets import Assignment, fit_frames
from sora_lightning.data.batching.clip_reader import ClipReader
from sora_lightning.data.batching.size_assignment import LatentKeys
from sora_lightning.data.decoding.errors import DecodeError
from sora_lightning.data.latents import LatentCache
from sora_lightning.data.manifest.records import ClipRecord
from sora_lightning.types import VideoSize


class SourceReader:
    """Reads a clip's source at the times and with the crop that ``clips`` uses for the clip.

    A clip that changed since it was indexed is refused; its source is not, since a row records
    only the hash of the clip.
    """

    def __init__(self, clips: ClipReader) -> None:
        self.clips = clips
        self.fps = clips.fps

    def read(
        self, record: ClipRecord, size: VideoSize, position: float
    ) -> Float[Tensor, "3 F H W"]:
        """Read the source as ``ClipReader.read`` does. Raises ``DecodeError`` too for a source that
        ends before the window, and for one of another aspect ratio, whose crop would differ.
        """
        path, edited, times_s = self.clips.locate(record, size, position)
        source = record.source
        assert source is not None
        timeline = self.clips.timeline(_source_of(record), source)
        if times_s[-1] >= timeline.end_s:
            raise DecodeError(
                f"{source}: ends after {timeline.end_s:.3f} s, and the window of {path.name} goes "
                f"on to {times_s[-1]:.3f} s"
            )
        reader = self.clips.reader
        frames = reader.read(source, timeline, timeline.shown_at(times_s).tolist())
        if (metadata := record.metadata) is not None:
            height, width = metadata.height, metadata.width
        else:
            height, width = reader.read(path, edited, [0]).shape[1:3]
        rows, columns = frames.shape[1:3]
        if rows * width != columns * height:
            raise DecodeError(
                f"{source}: frames of {rows}x{columns} have not the proportions of {path.name}'s "
                f"{height}x{width}"
            )
        return fit_frames(torch.from_numpy(frames), size.height, size.width)


@dataclass(frozen=True)
class PairKeys(LatentKeys):
    """Names clips' windows in the latent cache, and those of their sources."""

    num_parts: ClassVar[int] = 2

    def of_source(self, record: ClipRecord, size: VideoSize, window: int) -> str:
        """Return the key of one window of the source. It depends on the clip's content too, since
        the clip's length decides where the window is.
        """
        return _source_key(self(record, size, window), self.checksums.of(_source_of(record)))

    def find(self, record: ClipRecord, size: VideoSize, cache: LatentCache) -> Int[ndarray, "2 w"]:
        """Return the indices of a clip's windows and of its source's in a cache; -1 for both if
        either is missing.
        """
        content = self.checksums.of(_source_of(record))
        keys = self.of_windows(record, size)
        of_sources = cache.find(_source_key(key, content) for key in keys)
        found = np.stack([cache.find(keys), of_sources])
        return np.where((found < 0).any(axis=0), np.int32(-1), found)


def require_sources(manifest: Path, assignment: Assignment) -> None:
    """Raise ``ValueError`` naming the first clip whose source does not exist."""
    for clips in assignment.clips.values():
        for record in clips:
            if record.source is None:
                raise ValueError(
                    f"{manifest}: source is missing in the row of {record.path.name}: "
                    "data.reading.sources = true needs the file that each clip is an edit of"
                )
            if not record.source.is_file():
                raise ValueError(
                    f"{manifest}: source = {str(record.columns['source'])!r}: no such file: "
                    f"{record.source}"
                )


def _source_of(record: ClipRecord) -> ClipRecord:
    """Return the source as a record without technical columns."""
    assert record.source is not None
    return replace(record, path=record.source, columns={})


def _source_key(key: str, content: str) -> str:
    return hashlib.sha256(json.dumps(["source", key, content]).encode()).hexdigest()[:32]
