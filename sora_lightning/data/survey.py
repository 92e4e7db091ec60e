"""Finds out, before anything trains, which clips of a manifest can be used: probed, sized, and
found in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from sora_lightning.data.bad_clips import BadClips
from sora_lightning.data.buckets import Assignment, Removal, SizeRule
from sora_lightning.data.decode import DecodeError, probe
from sora_lightning.data.filters import Filter, first_against, require_columns
from sora_lightning.data.guard import ChildDied, guarded_map
from sora_lightning.data.latents import LatentCache, latent_key
from sora_lightning.data.manifest import ClipRecord, Footage
from sora_lightning.data.mapped import chosen
from sora_lightning.data.shards import clip_content
from sora_lightning.types import VideoSize

PROBES_AT_ONCE = 4
PROBE_TIMEOUT_S = 60.0


def survey(
    records: Sequence[ClipRecord],
    sizes: SizeRule,
    bad_clips: BadClips,
    filters: Sequence[Filter] = (),
) -> Assignment:
    """Give every clip that the filters keep its size.

    One frame is decoded of every file whose row lacks the technical columns.
    """
    require_columns(records, filters)
    found = _probed(records, filters)

    def place(record: ClipRecord) -> VideoSize | Removal | Filter:
        if (against := first_against(record, filters)) is not None:
            return against
        footage = record.footage or found[record.clip_id]
        if isinstance(footage, Footage):
            return sizes.place(record, footage)
        bad_clips.add(record, footage)
        return Removal.UNREADABLE

    return Assignment.of(records, map(place, records), sizes.sizes)


def _probed(
    records: Sequence[ClipRecord], filters: Sequence[Filter]
) -> dict[str, Footage | DecodeError]:
    """What the files hold of which the manifest does not say it, by ``clip_id``."""
    unknown = [r for r in records if r.footage is None and first_against(r, filters) is None]
    found: dict[str, Footage | DecodeError] = {}
    num_workers = max(1, min(PROBES_AT_ONCE, len(unknown) // 8))
    paths = [record.path for record in unknown]
    probed = guarded_map(probe, paths, num_workers, PROBE_TIMEOUT_S)
    bar = tqdm(probed, "probing", len(unknown), unit="clip", disable=len(unknown) < 100)
    for record, result in zip(unknown, bar, strict=True):
        if isinstance(result, ChildDied):
            result = DecodeError(f"{record.path}: {result}")
        found[record.clip_id] = result
    return found


@dataclass(frozen=True)
class LatentKeys:
    """Names clips' windows in the latent cache."""

    fps: float
    num_windows: int

    def __call__(self, record: ClipRecord, size: VideoSize, window: int) -> str:
        """The key of one window. Reads the whole file where the manifest does not say what it
        holds.
        """
        content = clip_content(record)
        return latent_key(content, record, size, self.fps, window, self.num_windows)

    def present(self, record: ClipRecord, size: VideoSize, cache: LatentCache) -> list[str]:
        """The keys of a clip's windows that a cache holds."""
        content = clip_content(record)
        windows = range(self.num_windows)
        keys = [latent_key(content, record, size, self.fps, w, self.num_windows) for w in windows]
        return [key for key in keys if key in cache]


def encoded(
    assignment: Assignment, keys: LatentKeys, cache: LatentCache
) -> tuple[Assignment, dict[str, list[str]]]:
    """The clips of which a cache holds a window or more, and those windows' keys by ``clip_id``."""
    kept = Assignment({}, dict(assignment.removed))
    present: dict[str, list[str]] = {}
    lacking: list[ClipRecord] = []
    for size, clips in assignment.clips.items():
        numbers = []
        for number, record in enumerate(clips):
            present[record.clip_id] = keys.present(record, size, cache)
            if present[record.clip_id]:
                numbers.append(number)
            else:
                lacking.append(record)
        kept.clips[size] = chosen(clips, numbers)
    if lacking:
        kept.removed[Removal.NOT_ENCODED] = lacking
    return kept, present
