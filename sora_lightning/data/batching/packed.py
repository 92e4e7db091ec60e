"""Turns a request for a pack into a batch: clips of different sizes, from video files or from the
latent cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor
from torch.utils.data import Dataset

from sora_lightning.data.batching.clips import Chooser, ClipReader
from sora_lightning.data.batching.native_sizes import Packing
from sora_lightning.data.batching.packing import PackRequest
from sora_lightning.data.decoding.bad_clips import BadClips
from sora_lightning.data.latents import LatentCache
from sora_lightning.data.manifest.records import ClipRecord
from sora_lightning.types import PackedBatch, VideoSize


@dataclass(frozen=True)
class KeptTokens:
    """Draws which of a clip's tokens are kept, by (seed, clip, turn) alone."""

    packing: Packing
    seed: int

    def __call__(
        self, record: ClipRecord, size: VideoSize, turn: int, count: int
    ) -> Int[Tensor, " n"]:
        """``count`` token numbers in rising order."""
        total = prod(self.packing.grid(size.num_frames, size.height, size.width))
        rng = np.random.default_rng([self.seed, 5, int(record.clip_id, 16), turn])
        return torch.from_numpy(np.sort(rng.permutation(total)[:count]))


class PackedPixels(Dataset[PackedBatch]):
    """Packs decoded from video files. A clip that cannot be read is left out of its pack, and
    ``BadClips`` names it; nothing stands in its place, and a pack may end up without clips.
    """

    def __init__(
        self,
        records: Sequence[ClipRecord],
        reader: ClipReader,
        choose: Chooser,
        kept: KeptTokens,
        bad_clips: BadClips,
    ) -> None:
        self.records = records
        self.reader = reader
        self.choose = choose
        self.kept = kept
        self.bad_clips = bad_clips

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, request: PackRequest) -> PackedBatch:
        packed = _Pack(self.kept, self.reader.fps)
        videos: list[Float[Tensor, "3 _F _H _W"]] = []
        clips = zip(request.clips, request.sizes, request.turns, request.kept, strict=True)
        for number, size, turn, count in clips:
            record = self.records[number]
            if record in self.bad_clips:
                continue
            choice = self.choose(record, turn)
            try:
                videos.append(self.reader.read(record, size, choice.window))
            except ValueError as error:
                self.bad_clips.add(record, error)
                continue
            packed.add(record, choice.caption, size, turn, count)
        return packed.batch(videos=videos)


class PackedCache(Dataset[PackedBatch]):
    """Packs from the latent cache. ``numbers`` are those of each clip's windows in it, -1 for one
    that it lacks.
    """

    def __init__(
        self,
        records: Sequence[ClipRecord],
        numbers: Int[ndarray, "n w"],
        cache: LatentCache,
        choose: Chooser,
        kept: KeptTokens,
        fps: float,
    ) -> None:
        self.records = records
        self.numbers = numbers
        self.cache = cache
        self.choose = choose
        self.kept = kept
        self.fps = fps

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, request: PackRequest) -> PackedBatch:
        packed = _Pack(self.kept, self.fps)
        latents: list[Float[Tensor, "c _f _h _w"]] = []
        clips = zip(request.clips, request.sizes, request.turns, request.kept, strict=True)
        for number, size, turn, count in clips:
            record = self.records[number]
            choice = self.choose(record, turn)
            latents.append(self.cache.window(self.numbers[number], choice.window))
            packed.add(record, choice.caption, size, turn, count)
        return packed.batch(latents=latents)


class _Pack:
    """What a packed batch says of its clips, gathered one by one."""

    def __init__(self, kept: KeptTokens, fps: float) -> None:
        self.draw = kept
        self.fps = fps
        self.captions: list[str] = []
        self.names: list[str] = []
        self.turns: list[int] = []
        self.kept: list[Int[Tensor, " _n"]] = []
        self.num_tokens = 0

    def add(self, record: ClipRecord, caption: str, size: VideoSize, turn: int, count: int) -> None:
        self.captions.append(caption)
        self.names.append(record.clip_id)
        self.turns.append(turn)
        self.num_tokens += count
        if self.draw.packing.dropping is not None:
            self.kept.append(self.draw(record, size, turn, count))

    def batch(
        self, videos: list[Tensor] | None = None, latents: list[Tensor] | None = None
    ) -> PackedBatch:
        packing = self.draw.packing
        return PackedBatch(
            self.captions,
            torch.full((len(self.names),), self.fps),
            self.names,
            self.turns,
            self.num_tokens / packing.tokens,
            videos,
            latents,
            None if packing.dropping is None else self.kept,
        )
