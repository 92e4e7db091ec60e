"""Turns a request for a batch into a batch: from video files, or from the latent cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from numpy import ndarray
from torch import Tensor
from torch.utils.data import Dataset

from sora_lightning.data.batching.buckets import fit_frames
from sora_lightning.data.batching.sampler import BatchRequest
from sora_lightning.data.decoding.bad_clips import BadClips, TooManyBadClips
from sora_lightning.data.decoding.checksums import Contents
from sora_lightning.data.decoding.errors import DecodeError
from sora_lightning.data.decoding.readers import Reader
from sora_lightning.data.decoding.shards import ShardFiles, State, state
from sora_lightning.data.decoding.timeline import Timeline
from sora_lightning.data.latents import LatentCache
from sora_lightning.data.manifest.records import ClipRecord
from sora_lightning.types import VideoBatch, VideoSize

TIMELINES_KEPT = 16384

ClipsBySize = Mapping[VideoSize, Sequence[ClipRecord]]


class Choice(NamedTuple):
    """What a clip's turn shows. ``window`` in [0, 1] is where the window stands between the clip's
    first and last.
    """

    window: float
    caption: str


@dataclass(frozen=True)
class RandomChoice:
    """A window and a wording drawn by (seed, clip, turn) alone, whichever worker and rank asks."""

    seed: int

    def __call__(self, record: ClipRecord, turn: int) -> Choice:
        key = np.array([self.seed, int(record.clip_id, 16)], dtype=np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key, counter=turn))
        window = rng.random()
        if len(set(record.weights)) < 2:
            return Choice(window, record.captions[rng.integers(len(record.captions))])
        return Choice(window, record.captions[rng.choice(len(record.captions), p=record.weights)])


@dataclass(frozen=True)
class EvenChoice:
    """The turn-th of evenly placed windows (one: the middle of the clip), and the first wording."""

    num_windows: int

    def __call__(self, record: ClipRecord, turn: int) -> Choice:
        return Choice((turn + 0.5) / self.num_windows, record.captions[0])


@dataclass(frozen=True)
class FixedWindows:
    """What another chooses, but the window is that one of evenly placed windows in whose share of
    the clip it falls: those are the ones that a latent cache holds.
    """

    choose: Chooser
    num_windows: int

    def __call__(self, record: ClipRecord, turn: int) -> Choice:
        choice = self.choose(record, turn)
        number = min(int(choice.window * self.num_windows), self.num_windows - 1)
        return choice._replace(window=(number + 0.5) / self.num_windows)


Chooser = Callable[[ClipRecord, int], Choice]
Namer = Callable[[ClipRecord, VideoSize, int], str]


class WindowReader(Protocol):
    """Gives the pixels of a clip's window."""

    fps: float

    def read(
        self, record: ClipRecord, size: VideoSize, window: float
    ) -> Float[Tensor, "3 F H W"]: ...


class ClipReader:
    """Reads windows of clips at a frame rate and a size; remembers when each file's frames are
    shown. A file that is not the one that was indexed is refused, as ``contents`` sees it.
    """

    def __init__(self, reader: Reader, fps: float, contents: Contents | None = None) -> None:
        self.reader = reader
        self.fps = fps
        self.contents = contents or Contents()
        self.files = ShardFiles()
        self._timelines: dict[tuple[Path, State | None], Timeline] = {}

    def read(self, record: ClipRecord, size: VideoSize, window: float) -> Float[Tensor, "3 F H W"]:
        """Frames spaced by ``1 / fps`` seconds, in [-1, 1]. Raises ``DecodeError`` or another
        ``ValueError``.
        """
        path, timeline, times_s = self.locate(record, size, window)
        frames = self.reader.read(path, timeline, timeline.shown_at(times_s).tolist())
        return fit_frames(torch.from_numpy(frames), size.height, size.width)

    def locate(
        self, record: ClipRecord, size: VideoSize, window: float
    ) -> tuple[Path, Timeline, Float64[ndarray, " F"]]:
        """The clip's file, and the times of a window's frames in it. Raises as ``read``."""
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
        start_s = record.start_s + window * max(0.0, latest_s - record.start_s)
        return path, timeline, start_s + np.arange(size.num_frames) / self.fps

    def timeline(self, record: ClipRecord, path: Path) -> Timeline:
        """When the frames of a clip's file, which lies at ``path``, are shown. Raises
        ``DecodeError``, also where the file is not the one that was indexed.
        """
        as_seen = path, state(record)
        if as_seen not in self._timelines:
            self.contents.require_unchanged(record, path)
            if len(self._timelines) >= TIMELINES_KEPT:
                self._timelines.pop(next(iter(self._timelines)))
            self._timelines[as_seen] = self.reader.timeline(path)
        return self._timelines[as_seen]


class PixelClips(Dataset[VideoBatch]):
    """Batches decoded from video files.

    In the place of a clip that cannot be read stands the next of its size that can, so that batches
    stay full and the order stays what it is; ``BadClips`` names it. Raises ``TooManyBadClips``
    where no clip of a size can be read, or ``bad_clips`` bears with no more. ``name`` gives what
    the batch calls a clip at its turn. ``source_reader`` reads the batch's ``source``; a clip whose
    source it cannot read is bad.
    """

    def __init__(
        self,
        clips: ClipsBySize,
        reader: WindowReader,
        choose: Chooser,
        name: Namer,
        bad_clips: BadClips,
        source_reader: WindowReader | None = None,
    ) -> None:
        self.clips = clips
        self.reader = reader
        self.source_reader = source_reader
        self.choose = choose
        self.name = name
        self.bad_clips = bad_clips

    def __len__(self) -> int:
        return sum(map(len, self.clips.values()))

    def __getitem__(self, request: BatchRequest) -> VideoBatch:
        names, captions, videos = [], [], []
        for number, turn in zip(request.clips, request.turns, strict=True):
            record, choice, read = self._readable(request.size, number, turn)
            names.append(self.name(record, request.size, turn))
            captions.append(choice.caption)
            videos.append(read)
        fps = torch.full((len(videos),), self.reader.fps)
        video, *source = (torch.stack(part) for part in zip(*videos, strict=True))
        batch = VideoBatch(captions, fps, names, video=video)
        return replace(batch, source=replace(batch, video=source[0])) if source else batch

    def _readable(
        self, size: VideoSize, number: int, turn: int
    ) -> tuple[ClipRecord, Choice, list[Float[Tensor, "3 F H W"]]]:
        clips = self.clips[size]
        readers = [one for one in (self.reader, self.source_reader) if one is not None]
        for step in range(len(clips)):
            record = clips[(number + step) % len(clips)]
            if record in self.bad_clips:
                continue
            choice = self.choose(record, turn)
            try:
                read = [one.read(record, size, choice.window) for one in readers]
                return record, choice, read
            except ValueError as error:
                self.bad_clips.add(record, error)
        raise TooManyBadClips(f"none of the {len(clips)} clips of size {size} can be read")


class LatentClips(Dataset[VideoBatch]):
    """Batches from the latent cache. ``numbers`` are those of each clip's windows in it, -1 for
    one that it lacks. ``source_numbers``, where the batch is to have a ``source``, are those of its
    windows, and -1 where ``numbers`` are.
    """

    def __init__(
        self,
        clips: ClipsBySize,
        numbers: Mapping[VideoSize, Int[ndarray, "_n w"]],
        cache: LatentCache,
        choose: Chooser,
        fps: float,
        source_numbers: Mapping[VideoSize, Int[ndarray, "_n w"]] | None = None,
    ) -> None:
        self.clips = clips
        self.numbers = numbers
        self.source_numbers = source_numbers
        self.cache = cache
        self.choose = choose
        self.fps = fps

    def __len__(self) -> int:
        return sum(map(len, self.clips.values()))

    def __getitem__(self, request: BatchRequest) -> VideoBatch:
        records = [self.clips[request.size][number] for number in request.clips]
        turns = zip(records, request.turns, strict=True)
        choices = [self.choose(record, turn) for record, turn in turns]
        captions = [choice.caption for choice in choices]
        fps = torch.full((len(records),), self.fps)
        names = [record.clip_id for record in records]
        latents = self._latents(self.numbers, request, choices)
        batch = VideoBatch(captions, fps, names, latents=latents)
        if self.source_numbers is None:
            return batch
        sources = self._latents(self.source_numbers, request, choices)
        return replace(batch, source=replace(batch, latents=sources))

    def _latents(
        self,
        numbers: Mapping[VideoSize, Int[ndarray, "_n w"]],
        request: BatchRequest,
        choices: Sequence[Choice],
    ) -> Float[Tensor, "b c f h w"]:
        windows = numbers[request.size][list(request.clips)]
        pairs = zip(windows, choices, strict=True)
        return torch.stack([self.cache.window(row, choice.window) for row, choice in pairs])
