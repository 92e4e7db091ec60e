"""Makes the plan of a training, or the batches of one epoch, from clips with sizes."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Container, Sequence

import numpy as np

from sora_lightning.data.batching.buckets import SizeRule
from sora_lightning.data.batching.datasets import ClipsBySize, KeyFn
from sora_lightning.data.batching.native_sizes import Packing, smallest_int_dtype
from sora_lightning.data.batching.packing import PackPlan
from sora_lightning.data.batching.sampler import BatchPlan, BatchRequest, WindowBatches
from sora_lightning.data.manifest.memory_mapped import cells, clip_ids, joined
from sora_lightning.data.manifest.records import ClipRecord


def batch_plan(clips: ClipsBySize, rule: SizeRule, seed: int, run_length: int) -> BatchPlan:
    num_clips = {size: len(of_size) for size, of_size in clips.items()}
    batch_sizes = {size: rule.batch_size(size) for size in clips}
    places = {size: _shards(of_size) for size, of_size in clips.items()}
    return BatchPlan(num_clips, batch_sizes, seed, run_length, _identity(clips), places=places)


def pack_plan(clips: ClipsBySize, packing: Packing, seed: int, run_length: int) -> PackPlan:
    sizes = [(size, len(of_size)) for size, of_size in clips.items()]
    grids = [packing.grid(s.num_frames, s.height, s.width) for s, _ in sizes]
    of_clips = np.repeat(smallest_int_dtype(np.array(grids)), [count for _, count in sizes], axis=0)
    places = _shards(joined(clips.values()))
    return PackPlan(of_clips, packing, seed, run_length, _identity(clips), places)


def window_batches(
    clips: ClipsBySize,
    rule: SizeRule,
    num_windows: int,
    key_fn: KeyFn,
    done: Container[str] | None = None,
) -> Sequence[BatchRequest]:
    """Return every window of every clip once, except those whose key is in ``done``."""
    windows = {}
    for size, of_size in clips.items():
        indices = np.arange(len(of_size) * num_windows, dtype=np.int32)
        if done is not None:
            of_windows = itertools.product(of_size, range(num_windows))
            missing = (key_fn(record, size, w) not in done for record, w in of_windows)
            indices = indices[np.fromiter(missing, bool, len(indices))]
        windows[size] = indices
    batch_sizes = {size: rule.batch_size(size) for size in clips}
    return WindowBatches(windows, batch_sizes, num_windows)


def _shards(records: Sequence[ClipRecord]) -> np.ndarray | None:
    """Return the index of each clip's shard; ``None`` if some clips are in no shard."""
    indices: dict[str, int] = {}
    places = array("i")
    for shard in cells(records, "shard"):
        if shard is None:
            return None
        places.append(indices.setdefault(shard, len(indices)))
    return smallest_int_dtype(np.frombuffer(places, np.int32))


def _identity(clips: ClipsBySize) -> str:
    identity = hashlib.sha256()
    separator = ""
    for clip_id in itertools.chain.from_iterable(map(clip_ids, clips.values())):
        identity.update(f"{separator}{clip_id}".encode())
        separator = "\n"
    return identity.hexdigest()
