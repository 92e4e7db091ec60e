"""Turns requests into batches and packs, of pixels from files or of cached latents.

A ``Clips`` gives the tensors of single clips; a ``BatchDataset`` or a ``PackDataset`` puts those of
a request together.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor
from torch.utils.data import Dataset

from sora_lightning.data.batching.clip_reader import WindowReader
from sora_lightning.data.batching.native_sizes import Packing
from sora_lightning.data.batching.packing import PackRequest
from sora_lightning.data.batching.sampler import BatchRequest
from sora_lightning.data.batching.windows import Window, WindowSampler
from sora_lightning.data.decoding.bad_clips import BadClips, TooManyBadClips
from sora_lightning.data.latents import LatentCache
from sora_lightning.data.manifest.records import ClipRecord
from sora_lightning.types import PackedBatch, VideoBatch, VideoSize

ClipsBySize = Mapping[VideoSize, Sequence[ClipRecord]]
KeyFn = Callable[[ClipRecord, VideoSize, int], str]


class Clips(ABC):
    """Clips by their index in ``records``."""

    records: Sequence[ClipRecord]
    fps: float
    has_latents: bool

    @abstractmethod
    def load(
        self, index: int, size: VideoSize, sampler: WindowSampler, repeat: int
    ) -> Loaded | None:
        """Return the sampled window of a clip; ``None`` if the clip cannot be read."""


@dataclass(frozen=True)
class Loaded:
    """A clip's tensor and, where pairs are served, that of its source; ``decode_s`` is the seconds
    that decoding took.
    """

    record: ClipRecord
    caption: str
    tensors: tuple[Float[Tensor, "_c _f _h _w"], ...]
    decode_s: float = 0.0


class PixelClips(Clips):
    """Clips decoded from files, in [-1, 1].

    ``readers`` read the clip and, where pairs are served, its source. ``bad_clips`` names a clip
    that one of them cannot read.
    """

    has_latents = False

    def __init__(
        self,
        records: Sequence[ClipRecord],
        readers: Sequence[WindowReader],
        bad_clips: BadClips,
    ) -> None:
        self.records = records
        self.readers = readers
        self.bad_clips = bad_clips
        self.fps = readers[0].fps

    def load(
        self, index: int, size: VideoSize, sampler: WindowSampler, repeat: int
    ) -> Loaded | None:
        record = self.records[index]
        if record in self.bad_clips:
            return None
        window = sampler(record, repeat)
        begun_s = time.perf_counter()
        try:
            tensors = [reader.read(record, size, window.position) for reader in self.readers]
        except ValueError as error:
            self.bad_clips.add(record, error)
            return None
        decode_s = time.perf_counter() - begun_s
        return Loaded(record, window.caption, tuple(tensors), decode_s)


class LatentClips(Clips):
    """Clips from a latent cache.

    ``indices`` are those of each clip's windows in the cache, -1 for one that it lacks; where pairs
    are served, a second array has those of the source's windows.
    """

    has_latents = True

    def __init__(
        self,
        records: Sequence[ClipRecord],
        indices: Sequence[Int[ndarray, "_n w"]],
        cache: LatentCache,
        fps: float,
    ) -> None:
        self.records = records
        self.indices = indices
        self.cache = cache
        self.fps = fps

    def load(self, index: int, size: VideoSize, sampler: WindowSampler, repeat: int) -> Loaded:
        record = self.records[index]
        window: Window = sampler(record, repeat)
        tensors = [self.cache.window(part[index], window.position) for part in self.indices]
        return Loaded(record, window.caption, tuple(tensors))


def slowest(loaded: Sequence[Loaded]) -> tuple[str, float] | None:
    """Return the file that took longest to decode, and its seconds; ``None`` for latents."""
    longest = max(loaded, key=lambda one: one.decode_s, default=None)
    if longest is None or not longest.decode_s:
        return None
    return str(longest.record.path), longest.decode_s


def clip_id(record: ClipRecord, size: VideoSize, repeat: int) -> str:
    return record.clip_id


class BatchDataset(Dataset[VideoBatch]):
    """Batches of clips of one size.

    The next clip of its size that can be read takes the place of one that cannot, so that batches
    stay full and their order stays what it is. ``key_fn`` gives the batch's ``clip_ids``. Raises
    ``TooManyBadClips`` where no clip of a size can be read.
    """

    def __init__(
        self, clips: Mapping[VideoSize, Clips], sampler: WindowSampler, key_fn: KeyFn = clip_id
    ) -> None:
        self.clips = clips
        self.sampler = sampler
        self.key_fn = key_fn

    def __len__(self) -> int:
        return sum(len(clips.records) for clips in self.clips.values())

    def named(self, request: BatchRequest) -> list[str]:
        """Return file and size of each clip."""
        records = self.clips[request.size].records
        return [f"{records[index].path} as {request.size}" for index in request.clips]

    def __getitem__(self, request: BatchRequest) -> VideoBatch:
        clips, size = self.clips[request.size], request.size
        wanted = list(zip(request.clips, request.repeats, strict=True))
        loaded = [self._readable(clips, size, index, repeat) for index, repeat in wanted]
        names = [
            self.key_fn(one.record, size, repeat)
            for one, (_, repeat) in zip(loaded, wanted, strict=True)
        ]
        captions = [one.caption for one in loaded]

        def batch(tensors: tuple[Tensor, ...]) -> VideoBatch:
            if clips.has_latents:
                return VideoBatch(captions, clips.fps, names, latents=torch.stack(tensors))
            return VideoBatch(captions, clips.fps, names, video=torch.stack(tensors))

        own, *source = map(batch, zip(*(one.tensors for one in loaded), strict=True))
        return replace(own, source=source[0] if source else None, slowest=slowest(loaded))

    def _readable(self, clips: Clips, size: VideoSize, index: int, repeat: int) -> Loaded:
        for step in range(len(clips.records)):
            place = (index + step) % len(clips.records)
            if (loaded := clips.load(place, size, self.sampler, repeat)) is not None:
                return loaded
        raise TooManyBadClips(f"none of the {len(clips.records)} clips of size {size} can be read")


@dataclass(frozen=True)
class KeptTokens:
    """Draw which of a clip's tokens are kept, by (seed, clip, repeat) alone."""

    packing: Packing
    seed: int

    def __call__(
        self, record: ClipRecord, size: VideoSize, repeat: int, count: int
    ) -> Int[Tensor, " n"]:
        """Return ``count`` token indices in rising order."""
        total = prod(self.packing.grid(size.num_frames, size.height, size.width))
        rng = np.random.default_rng([self.seed, 5, int(record.clip_id, 16), repeat])
        return torch.from_numpy(np.sort(rng.permutation(total)[:count]))


class PackDataset(Dataset[PackedBatch]):
    """Packs of clips of many sizes.

    A clip that cannot be read is left out of its pack and nothing takes its place, so that a pack
    may end up without clips.
    """

    def __init__(self, clips: Clips, sampler: WindowSampler, kept: KeptTokens) -> None:
        self.clips = clips
        self.sampler = sampler
        self.kept = kept

    def __len__(self) -> int:
        return len(self.clips.records)

    def named(self, request: PackRequest) -> list[str]:
        """Return file and size of each clip."""
        shown = zip(request.clips, request.sizes, strict=True)
        return [f"{self.clips.records[index].path} as {size}" for index, size in shown]

    def __getitem__(self, request: PackRequest) -> PackedBatch:
        packing = self.kept.packing
        loaded: list[Loaded] = []
        repeats: list[int] = []
        kept: list[Int[Tensor, " _n"]] = []
        num_tokens = 0
        wanted = zip(request.clips, request.sizes, request.repeats, request.kept, strict=True)
        for index, size, repeat, count in wanted:
            one = self.clips.load(index, size, self.sampler, repeat)
            if one is None:
                continue
            loaded.append(one)
            repeats.append(repeat)
            num_tokens += count
            if packing.dropping is not None:
                kept.append(self.kept(one.record, size, repeat, count))
        tensors = [one.tensors[0] for one in loaded]
        return PackedBatch(
            captions=[one.caption for one in loaded],
            fps=self.clips.fps,
            clip_ids=[one.record.clip_id for one in loaded],
            repeats=repeats,
            fill=num_tokens / packing.tokens,
            videos=None if self.clips.has_latents else tensors,
            latents=tensors if self.clips.has_latents else None,
            kept=None if packing.dropping is None else kept,
            slowest=slowest(loaded),
        )
