"""The DataModule of every system: batches of clips or of cached latents from a manifest."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Collection, Container, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from torch.utils.data import DataLoader, Dataset

from sora_lightning.data.batching.buckets import Assignment, Removal, SizeRule
from sora_lightning.data.batching.clip_reader import ClipReader, WindowReader
from sora_lightning.data.batching.datasets import (
    BatchDataset,
    Clips,
    ClipsBySize,
    KeptTokens,
    KeyFn,
    LatentClips,
    PackDataset,
    PixelClips,
    clip_id,
)
from sora_lightning.data.batching.native_sizes import Packing
from sora_lightning.data.batching.plans import batch_plan, pack_plan, window_batches
from sora_lightning.data.batching.sampler import (
    BatchRequest,
    BatchStream,
    FixedBatches,
    Plan,
    StreamLoader,
)
from sora_lightning.data.batching.size_assignment import (
    Encoded,
    LatentKeys,
    assign_sizes,
    find_encoded,
    require_checksums,
)
from sora_lightning.data.batching.sources import PairKeys, SourceReader, require_sources
from sora_lightning.data.batching.windows import (
    EvenWindows,
    FixedWindows,
    RandomWindows,
    WindowSampler,
)
from sora_lightning.data.decoding.bad_clips import BadClips, TooManyBadClips
from sora_lightning.data.decoding.checksums import Checksums
from sora_lightning.data.decoding.readers import default_reader
from sora_lightning.data.decoding.subprocess_decoding import CAN_FORK, SubprocessReader
from sora_lightning.data.latents import INDEX, LatentCache
from sora_lightning.data.manifest.captions import Captions
from sora_lightning.data.manifest.filters import Filter
from sora_lightning.data.manifest.memory_mapped import chosen, clip_ids, joined, open_manifest
from sora_lightning.data.ranks import data_ranks, require_even
from sora_lightning.data.settings import Batching, Reading
from sora_lightning.data.spec import DataSpec
from sora_lightning.types import VideoBatch, VideoSize

# The share of clips that a latent cache may lack, since some cannot be read.
MAX_MISSING = 0.05
# Batches of one size, or packs of like cost, that come in a row: 1, 2, 4 or 8 ranks share them.
RUN_LENGTH = 8

log = logging.getLogger(__name__)


class VideoDataModule(L.LightningDataModule):
    """Clips of a manifest as ``VideoBatch``, each at the nearest of several sizes; or, by
    ``packing``, as ``PackedBatch``, each at its own size and several to a sequence.

    Args:
        manifest: JSONL, CSV, Parquet, a folder, or Arrow, whose rows stay in the file; README.md of
            this folder lists the columns.
        val_manifest: Clips to validate on: the middle of each, once. Without it nothing is
            validated.
        fps: Frames per second that the clips are read at, whatever their own rate is.
        latents: A ``LatentCache`` written by ``predict`` on the same clips, sizes and fps; it is
            served in place of pixels.
        packing: In place of ``sizes`` and ``pixels_per_batch``: the budget of a sequence, and how
            large a clip may be. Validation and ``predict`` then see batches of one size at a time.
        batching: The sizes, and the order of clips.
        reading: The decoder, its limits, and its processes.
        filters: Rules over any column of the manifests, such as ``motion > 0.2``; a clip takes part
            where all hold.
        captions: The columns of captions, and how those by people and by a captioner are mixed. By
            default every row needs a ``caption``.

    Training batches follow ``BatchPlan`` or ``PackPlan``; a resumed run continues with the next
    batch. Clips that cannot be read, or have changed since they were indexed, are left out, and
    named in ``bad_clips.jsonl`` in the folder that the trainer logs to. Raises ``ValueError``
    at construction for settings that cannot work, in ``setup`` for manifests that cannot.
    """

    def __init__(
        self,
        manifest: Path,
        val_manifest: Path | None = None,
        fps: float = 8.0,
        latents: Path | None = None,
        packing: Packing | None = None,
        batching: Batching = Batching(),  # noqa: B008 (frozen)
        reading: Reading = Reading(),  # noqa: B008 (frozen)
        filters: list[str] | None = None,
        captions: Captions | None = None,
    ) -> None:
        super().__init__()
        if packing is not None and packing.resolution is not None and latents is not None:
            raise ValueError(
                "packing.resolution draws another size for each epoch, and data.latents holds one: "
                "leave one of them out"
            )
        if packing is not None and reading.sources:
            raise ValueError(
                "packing and sources are both given: clips with their sources are served in "
                "batches of one size"
            )
        self.manifest = Path(manifest)
        self.val_manifest = None if val_manifest is None else Path(val_manifest)
        self.fps = float(fps)
        self.latents = None if latents is None else Path(latents)
        self.packing = packing
        self.batching = batching
        self.reading = reading
        self.filters = [Filter.parse(text) for text in filters or ()]
        self.captions = captions
        self.sizes = batching.size_rule(self.fps, packing)
        self.predict_sizes = batching.predict_rule(self.sizes)
        self.reader = reading.reader or default_reader()
        if reading.decode_timeout_s is not None and CAN_FORK:
            self.reader = SubprocessReader(self.reader, reading.decode_timeout_s)
        self._checksums = Checksums(reading.verify_content)
        keys = PairKeys if reading.sources else LatentKeys
        self._key = keys(self.fps, batching.windows_per_clip, self._checksums)
        self._assigned: dict[tuple[Path, Captions | None, SizeRule], Assignment] = {}
        self._clips: dict[Path, Assignment] = {}
        self._encoded: dict[Path, Encoded] = {}
        self._cache: LatentCache | None = None

    def setup(self, stage: str) -> None:
        """Read the manifests, give every clip its size, and open the latent cache where one is
        served.
        """
        if stage == "validate" and self.val_manifest is None:
            raise ValueError("val_manifest is not set: there is nothing to validate on")
        for manifest, assignment in self.check(stage).items():
            self._refuse_bad(manifest, assignment)
        if stage != "predict" and self.latents is not None and self._cache is None:
            self._open_cache(self.latents)

    def check(self, stage: str = "fit") -> dict[Path, Assignment]:
        """Assign the clips of each manifest to sizes, or to the reason why they are left out. The
        ``str`` of an assignment is a table.

        Decodes one frame of every file of which the manifest does not say frames, rate and size.
        Raises ``ValueError`` with that table where no clip is left.
        """
        self._clips = {manifest: self._assign(manifest, stage) for manifest in self._manifests()}
        return dict(self._clips)

    def _assign(self, manifest: Path, stage: str) -> Assignment:
        captions, sizes = self.captions, self.sizes
        if stage == "predict":
            sizes = self.predict_sizes
            captions = None if captions is None else replace(captions, required=False)
        key = manifest, captions, sizes
        if key not in self._assigned:
            records = open_manifest(manifest, captions, self.reading.root)
            if captions is not None and captions.required and manifest == self.manifest:
                captions.require(manifest, records)
            assignment = assign_sizes(records, sizes, self._bad_clips(), self.filters)
            _refuse_empty(
                manifest, assignment, f"{manifest}: no clip is left for {self._settings(sizes)}"
            )
            if self.reading.sources:
                require_sources(manifest, assignment)
            if self._checksums.verify:
                require_checksums(manifest, assignment)
            self._assigned[key] = assignment
        return self._assigned[key]

    def files(self, ids: Collection[str]) -> list[Path]:
        """Return the files of the clips with these ``clip_ids``."""
        found: dict[str, Path] = {}
        for assignment in self._clips.values():
            for records in assignment.clips.values():
                for index, one in enumerate(clip_ids(records)):
                    if one in ids:
                        found[one] = records[index].path
        return list(found.values())

    def encoded(self, cache: LatentCache) -> dict[Path, Assignment]:
        """Return the clips of each manifest with latents in a cache, and those left out."""
        return {
            manifest: find_encoded(assignment, self._key, cache).clips
            for manifest, assignment in self.check("predict").items()
        }

    @property
    def spec(self) -> DataSpec:
        """Describe what is served. The tokenizer of cached latents is known after ``setup``."""
        return DataSpec(
            fps=self.fps,
            validates=self.val_manifest is not None,
            sizes=tuple(self.sizes.sizes),
            sources=self.reading.sources,
            packing=self.packing,
            latents=self.latents,
            tokenizer_fingerprint=None if self._cache is None else self._cache.tokenizer,
        )

    def train_dataloader(self) -> StreamLoader:
        rank, num_ranks = self._ranks()
        batching = self.batching
        run_length = batching.run_length or math.lcm(RUN_LENGTH, num_ranks)
        sampler: WindowSampler = RandomWindows(batching.seed)
        if batching.fixed_windows:
            sampler = FixedWindows(sampler, batching.windows_per_clip)
        plan: Plan
        dataset: PackDataset | BatchDataset
        clips = self._served(self.manifest).clips
        if self.packing is None:
            plan = batch_plan(clips, self.sizes, batching.seed, run_length)
            dataset = self._dataset(self.manifest, sampler)
        else:
            plan = pack_plan(clips, self.packing, batching.seed, run_length)
            kept = KeptTokens(self.packing, batching.seed)
            dataset = PackDataset(self._joined_clips(self.manifest), sampler, kept)
        stream = BatchStream(plan, rank, num_ranks, batching.steps_per_epoch)
        workers = self.reading.num_workers
        settings = {"data.fps": self.fps, "data.captions": self.captions}
        return StreamLoader(dataset, stream, workers, settings, persistent_workers=workers > 0)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        if self.val_manifest is None:
            return []
        clips = self._served(self.val_manifest).clips
        dataset = self._dataset(self.val_manifest, EvenWindows(1))
        batches = window_batches(clips, self.sizes, 1, clip_id)
        require_even(self.trainer, len(batches))
        return self._once(dataset, batches)

    def predict_dataloader(self) -> DataLoader | list[DataLoader]:
        """Return every window of every clip once, training manifest first; ``clip_ids`` are keys of
        the latent cache.

        Windows that the cache of a callback with a ``root`` already holds are left out. If all
        are there, the first batch is repeated, to check that the tokenizer is still the same.
        With ``sources`` a second loader has theirs.

        For a callback with ``captioned`` it returns the middle of each clip of the training
        manifest once, except clips in that; ``clip_ids`` are those of the manifest.
        """
        captioned = self._of_callback("captioned")
        if captioned is not None:
            clips, reader = self._clips[self.manifest].clips, self._clip_reader()
            return self._missing(clips, [self.manifest], reader, clip_id, 1, captioned)
        of_manifests = [self._clips[manifest].clips for manifest in self._manifests()]
        sizes = dict.fromkeys(itertools.chain(self.predict_sizes.sizes, *of_manifests))
        clips = {size: joined(one.get(size, ()) for one in of_manifests) for size in sizes}
        reader = self._clip_reader()
        loader = self._encoding(clips, reader, self._key)
        if not isinstance(self._key, PairKeys):
            return loader
        return [loader, self._encoding(clips, SourceReader(reader), self._key.of_source)]

    def statistics_dataloader(self, num_clips: int) -> DataLoader:
        """Return the middle of about ``num_clips`` of the training clips, or of all, spread
        evenly over it, at the sizes that ``predict`` encodes.
        """
        assignment = self._assign(self.manifest, "predict")
        step = max(1.0, assignment.num_clips / num_clips)
        some = {
            size: chosen(clips, np.arange(0, len(clips), step).astype(np.int32))
            for size, clips in assignment.clips.items()
        }
        return self._missing(some, [self.manifest], self._clip_reader(), clip_id, 1, None)

    def _encoding(self, clips: ClipsBySize, reader: WindowReader, key_fn: KeyFn) -> DataLoader:
        num_windows = self.batching.windows_per_clip
        root = self._of_callback("root")
        begun = root is not None and (Path(root) / INDEX).is_file()
        done = LatentCache.open(root) if begun else None
        return self._missing(clips, self._manifests(), reader, key_fn, num_windows, done)

    def _missing(
        self,
        clips: ClipsBySize,
        manifests: Sequence[Path],
        reader: WindowReader,
        key_fn: KeyFn,
        num_windows: int,
        done: Container[str] | None,
    ) -> DataLoader:
        """Return the windows whose key is not in ``done``, filled up to a batch for each rank."""
        bad_clips = self._bad_clips(manifests)
        pixels = {size: PixelClips(one, [reader], bad_clips) for size, one in clips.items()}
        dataset = BatchDataset(pixels, EvenWindows(num_windows), key_fn)
        batches = window_batches(clips, self.sizes, num_windows, key_fn, done)
        if (lacking := self._ranks()[1] - len(batches)) > 0 and done is not None:
            every = window_batches(clips, self.sizes, num_windows, key_fn)
            batches = [*batches, *every[:lacking]]
        return self._once(dataset, batches)

    def _of_callback(self, name: str) -> Any:
        """Return the attribute of the first callback that has it, ``None`` by default."""
        callbacks = getattr(self.trainer, "callbacks", ())
        values = (getattr(callback, name, None) for callback in callbacks)
        return next((value for value in values if value is not None), None)

    def _served(self, manifest: Path) -> Assignment:
        return self._clips[manifest] if self._cache is None else self._encoded[manifest].clips

    def _dataset(self, manifest: Path, sampler: WindowSampler) -> BatchDataset:
        served = self._served(manifest).clips
        if self._cache is None:
            readers, bad_clips = self._readers(), self._bad_clips([manifest])
            clips: dict[VideoSize, Clips] = {
                size: PixelClips(records, readers, bad_clips) for size, records in served.items()
            }
        else:
            found = self._encoded[manifest]
            clips = {
                size: LatentClips(records, found.indices_of(size), self._cache, self.fps)
                for size, records in served.items()
            }
        return BatchDataset(clips, sampler)

    def _joined_clips(self, manifest: Path) -> Clips:
        """Return the clips of all sizes, one size after the other."""
        records = joined(self._served(manifest).clips.values())
        if self._cache is None:
            return PixelClips(records, self._readers(), self._bad_clips([manifest]))
        indices = np.concatenate(list(self._encoded[manifest].indices.values()))
        return LatentClips(records, [indices], self._cache, self.fps)

    def _clip_reader(self) -> ClipReader:
        timeout_s = self.reading.decode_timeout_s
        return ClipReader(self.reader, self.fps, self._checksums, timeout_s)

    def _readers(self) -> list[WindowReader]:
        """Return the readers of the clips and, with pairs, of their sources."""
        reader = self._clip_reader()
        return [reader, SourceReader(reader)] if self.reading.sources else [reader]

    def _bad_clip_budget(self, assignment: Assignment) -> float:
        """Return how many clips of a manifest may be bad before the run stops."""
        bad = len(assignment.removed.get(Removal.UNREADABLE, ()))
        num_clips = assignment.num_clips + assignment.num_removed
        return self.reading.max_bad_share * num_clips - bad

    def _refuse_bad(self, manifest: Path, assignment: Assignment) -> None:
        if self._bad_clip_budget(assignment) < 0:
            raise TooManyBadClips(
                f"{manifest}: more than max_bad_share = {self.reading.max_bad_share} of its clips "
                f"cannot be read\n{assignment}"
            )

    def _ranks(self) -> tuple[int, int]:
        return data_ranks(self.trainer)

    def _once(self, dataset: Dataset[VideoBatch], batches: Sequence[BatchRequest]) -> DataLoader:
        rank, num_ranks = self._ranks()
        if len(batches) < num_ranks:
            raise ValueError(
                f"{len(batches)} batches for {num_ranks} ranks: every rank needs one; lower "
                "data.batching.pixels_per_batch, give more clips (data.val_manifest where this is "
                "validation), or take fewer devices"
            )
        sampler = FixedBatches(batches, rank, num_ranks)
        return DataLoader(
            dataset, batch_size=None, sampler=sampler, num_workers=self.reading.num_workers
        )

    def _manifests(self) -> list[Path]:
        manifests = [self.manifest, self.val_manifest]
        return list(dict.fromkeys(manifest for manifest in manifests if manifest is not None))

    def _settings(self, rule: SizeRule) -> str:
        sizes = ", ".join(map(str, rule.sizes)) or "their own sizes"
        return f"{sizes} at {self.fps} frames per second"

    def _bad_clips(self, manifests: Sequence[Path] = ()) -> BadClips:
        """Return a list of bad clips limited to the manifests' budgets; unlimited by default."""
        budgets = [self._bad_clip_budget(self._clips[manifest]) for manifest in manifests]
        limit = sum(budgets) if budgets else math.inf
        if self.trainer is None:
            return BadClips(None, limit)
        folder = self.trainer.log_dir or self.trainer.default_root_dir
        return BadClips(Path(folder) / "bad_clips.jsonl", limit)

    def _open_cache(self, root: Path) -> None:
        self._cache = LatentCache.open(root)
        for manifest, assignment in self._clips.items():
            found = find_encoded(assignment, self._key, self._cache)
            kept = found.clips
            missing = assignment.num_clips - kept.num_clips
            if missing > MAX_MISSING * assignment.num_clips:
                raise ValueError(
                    f"{root}: lacks the latents of {missing} of {assignment.num_clips} clips of "
                    f"{manifest} for {self._settings(self.sizes)} and windows_per_clip = "
                    f"{self.batching.windows_per_clip}: encode them, by predict with the same "
                    "settings"
                )
            _refuse_empty(manifest, kept, f"{root}: holds no latents of {manifest}")
            self._encoded[manifest] = found


def _refuse_empty(manifest: Path, assignment: Assignment, problem: str) -> None:
    if not assignment.num_clips:
        raise ValueError(f"{problem}\n{assignment}")
    if assignment.removed:
        log.warning("%s: not every clip takes part:\n%s", manifest, assignment)
