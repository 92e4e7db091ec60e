"""Determines, before the training, which clips of a manifest can be used: probed, sized, and
found in the cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Int
from numpy import ndarray
from tqdm import tqdm

from sora_lightning.data.batching.buckets import Assignment, Removal, SizeRule
from sora_lightning.data.decoding.bad_clips import BadClips
from sora_lightning.data.decoding.checksums import Checksums
from sora_lightning.data.decoding.errors import DecodeError
from sora_lightning.data.decoding.readers import probe
from sora_lightning.data.decoding.subprocess_decoding import DecoderFailed, subprocess_map
from sora_lightning.data.decoding.video_metadata import VideoMetadata
from sora_lightning.data.latents import LatentCache, latent_key
from sora_lightning.data.manifest.filters import Filter, first_against, require_columns
from sora_lightning.data.manifest.memory_mapped import cells, chosen, joined
from sora_lightning.data.manifest.records import ClipRecord
from sora_lightning.types import VideoSize

PROBES_AT_ONCE = 4
PROBE_TIMEOUT_S = 60.0


def assign_sizes(
    records: Sequence[ClipRecord],
    sizes: SizeRule,
    bad_clips: BadClips,
    filters: Sequence[Filter] = (),
) -> Assignment:
    """Assign a size to every clip that has a caption and that the filters keep.

    One frame is decoded of every file whose row lacks the technical columns.
    """
    require_columns(records, filters)
    found = _probed(records, filters)

    def place(record: ClipRecord) -> VideoSize | Removal | Filter:
        if (against := first_against(record, filters)) is not None:
            return against
        if not record.captions:
            return Removal.NO_CAPTION
        metadata = record.metadata or next(found)
        if isinstance(metadata, VideoMetadata):
            return sizes.place(record, metadata)
        bad_clips.add(record, metadata)
        return Removal.UNREADABLE

    return Assignment.of(records, map(place, records), sizes.sizes)


def require_checksums(manifest: Path, assignment: Assignment) -> None:
    """Raise ``ValueError`` naming the first clip without a hash in the manifest."""
    for clips in assignment.clips.values():
        for index, content in enumerate(cells(clips, "content")):
            if not isinstance(content, str) or not content:
                raise ValueError(
                    f"{manifest}: content is missing in the row of {clips[index].path.name}: "
                    "data.reading.verify_content = true needs the SHA-256 of each file: run "
                    "sora-lightning index"
                )


def _probed(
    records: Sequence[ClipRecord], filters: Sequence[Filter]
) -> Iterator[VideoMetadata | DecodeError]:
    """Yield the metadata of the files whose rows lack it, in order.

    Nothing is probed before the first is asked for, and then a few thousand ahead.
    """
    unknown = (
        r for r in records
        if r.metadata is None and r.captions and first_against(r, filters) is None
    )  # fmt: skip
    paths, asked = itertools.tee(record.path for record in unknown)
    num_workers = max(1, min(PROBES_AT_ONCE, len(records) // 8))
    probed = subprocess_map(probe, asked, num_workers, PROBE_TIMEOUT_S)
    bar = tqdm(probed, "probing", len(records), unit="clip", disable=len(records) < 100)
    for result, path in zip(bar, paths, strict=True):
        yield DecodeError(f"{path}: {result}") if isinstance(result, DecoderFailed) else result


@dataclass(frozen=True)
class LatentKeys:
    """Names clips' windows in the latent cache. A file without a hash in the
    manifest is read whole, by ``checksums``.
    """

    fps: float
    num_windows: int
    checksums: Checksums = field(default_factory=Checksums, compare=False)
    num_parts: ClassVar[int] = 1

    def __call__(self, record: ClipRecord, size: VideoSize, window: int) -> str:
        """Return the key of one window."""
        content = self.checksums.of(record)
        return latent_key(content, record, size, self.fps, window, self.num_windows)

    def of_windows(self, record: ClipRecord, size: VideoSize) -> list[str]:
        """Return the keys of all windows."""
        content = self.checksums.of(record)
        windows = range(self.num_windows)
        return [latent_key(content, record, size, self.fps, w, self.num_windows) for w in windows]

    def find(self, record: ClipRecord, size: VideoSize, cache: LatentCache) -> Int[ndarray, "p w"]:
        """Return the indices of a clip's windows in a cache, -1 for missing ones: ``num_parts``
        rows, the first of the clip itself.
        """
        return cache.find(self.of_windows(record, size))[None]


class Encoded(NamedTuple):
    """The clips with at least one window in a cache, and the windows' indices; with pairs, those of
    their sources' windows too.
    """

    clips: Assignment
    indices: dict[VideoSize, Int[ndarray, "_n w"]]
    source_indices: dict[VideoSize, Int[ndarray, "_n w"]] | None

    def indices_of(self, size: VideoSize) -> list[Int[ndarray, "_n w"]]:
        """Return the indices of a size's clips and, with pairs, of their sources."""
        parts = (self.indices, self.source_indices)
        return [part[size] for part in parts if part is not None]


def find_encoded(assignment: Assignment, keys: LatentKeys, cache: LatentCache) -> Encoded:
    """Find the windows of all clips in a cache."""
    kept = Assignment({}, dict(assignment.removed))
    indices: list[dict[VideoSize, Int[ndarray, "_n w"]]] = [{} for _ in range(keys.num_parts)]
    lacking: list[Sequence[ClipRecord]] = []
    for size, clips in assignment.clips.items():
        found = np.full((keys.num_parts, len(clips), keys.num_windows), -1, dtype=np.int32)
        for row, record in enumerate(clips):
            found[:, row] = keys.find(record, size, cache)
        there = (found[0] >= 0).any(axis=1)
        kept.clips[size] = chosen(clips, np.flatnonzero(there))
        for of_part, part in zip(indices, found, strict=True):
            of_part[size] = part[there]
        lacking.append(chosen(clips, np.flatnonzero(~there)))
    if len(without := joined(lacking)):
        kept.removed[Removal.NOT_ENCODED] = without
    return Encoded(kept, indices[0], indices[1] if len(indices) > 1 else None)
