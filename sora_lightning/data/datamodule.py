"""The one DataModule of every system: a manifest and sizes go in, batches of clips or of cached
latents come out.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
from array import array
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import numpy as np
from torch.utils.data import DataLoader, Dataset

from sora_lightning.data.batching.buckets import (
    Assignment,
    Buckets,
    Removal,
    SizeFamily,
    SizeRule,
)
from sora_lightning.data.batching.clips import (
    Chooser,
    ClipReader,
    ClipsBySize,
    EvenChoice,
    FixedWindows,
    LatentClips,
    Namer,
    PixelClips,
    RandomChoice,
    WindowReader,
)
from sora_lightning.data.batching.native_sizes import NativeSizes, Packing, narrowed
from sora_lightning.data.batching.packed import KeptTokens, PackedCache, PackedPixels
from sora_lightning.data.batching.packing import PackPlan
from sora_lightning.data.batching.sampler import (
    BatchPlan,
    BatchRequest,
    BatchStream,
    FixedBatches,
    Plan,
    StreamLoader,
    WindowBatches,
)
from sora_lightning.data.batching.size_assignment import (
    Encoded,
    LatentKeys,
    encoded,
    require_contents,
    survey,
)
from sora_lightning.data.batching.sources import PairKeys, SourceReader, require_sources
from sora_lightning.data.decoding.bad_clips import BadClips, TooManyBadClips
from sora_lightning.data.decoding.checksums import Contents
from sora_lightning.data.decoding.readers import Reader, default_reader
from sora_lightning.data.decoding.subprocess_decoding import CAN_FORK, GuardedReader
from sora_lightning.data.latents import INDEX, LatentCache
from sora_lightning.data.manifest.filters import Filter
from sora_lightning.data.manifest.memory_mapped import cells, clip_ids, joined, open_manifest
from sora_lightning.data.manifest.records import ClipRecord
from sora_lightning.data.spec import DataSpec
from sora_lightning.types import PackedBatch, VideoBatch, VideoSize

# The share of clips that a latent cache may lack, since some cannot be read.
MAX_MISSING = 0.05
# Batches of one size, or packs of like cost, that come in a row: 1, 2, 4 or 8 ranks share them.
RUN_LENGTH = 8

log = logging.getLogger(__name__)


class VideoDataModule(L.LightningDataModule):
    """Clips of a manifest as ``VideoBatch``, each at the nearest of several sizes; or, by
    ``packing``, as ``PackedBatch``, each at its own size and several to a sequence.

    Args:
        manifest: JSONL, CSV, Parquet, a folder, or Arrow, whose rows stay in the file; the columns
            stand at ``read_manifest``.
        sizes: ``frames x rows x columns``, say ``["17x32x32", "17x24x40"]``, or a ``SizeFamily``
            that makes such a list. A clip goes to the one that keeps most of it; it is scaled down
            and cut, never scaled up or distorted.
        fps: Frames per second that the clips are read at, whatever their own rate is.
        pixels_per_batch: A batch holds one size and as many clips as this number of frames x rows x
            columns allows.
        packing: In place of ``sizes`` and ``pixels_per_batch``: the budget of a sequence, and how
            large a clip may be. Validation and ``predict`` then see batches of one size at a time.
        val_manifest: Clips to validate on: the middle of each, once. Without it nothing is
            validated.
        latents: A ``LatentCache`` written by ``predict`` on the same clips, sizes and fps; it is
            served in place of pixels.
        windows_per_clip: How many evenly placed windows of each clip ``predict`` encodes, and a
            cache is read for. Training on pixels draws from all windows.
        fixed_windows: Training on pixels, too, draws from these windows alone: it then sees what a
            training from the cache sees.
        num_workers: Processes that decode; 0 decodes in the training process. The command line
            leaves each of them a core, unless OMP_NUM_THREADS sets the threads of torch: the
            batches are the same for any number, the weights to the last bit for the same threads.
        reader: Decodes the files; by default decord, with PyAV for what decord cannot be trusted
            with.
        decode_timeout_s: Seconds that one clip may take to decode. Decoding runs in a child of each
            worker, which is stopped then, and the clip counts as bad. Null decodes without one,
            as do systems that cannot fork.
        max_bad_share: The run stops when more than this share of a manifest's clips cannot be read.
        filters: Rules over any column of the manifests, such as ``motion > 0.2``; a clip takes part
            where all hold.
        seed: Draws the order, the windows and the wordings.
        steps_per_epoch: Batches on each rank that Lightning counts as an epoch; by default one pass
            over the clips. The order does not depend on it.
        run_length: How many batches of one size, or packs of like cost, come in a row. Numbers of
            ranks that divide it see the same order; by default it is 8, and for a number of ranks
            that does not divide 8 their least common multiple.
        sources: Serve with each clip the one that the manifest's ``source`` names, for systems that
            learn instructions; ``predict`` then encodes those too.
        verify_content: Hash every file whole before its first frame is served, once in each
            worker, and leave out those that are not what was indexed, damaged ones of the same size
            and time too. Every row needs the ``content`` that ``index`` writes. Else a file is
            hashed only where its size or time is another than recorded.

    Training batches follow ``BatchPlan`` or ``PackPlan``; a run that resumes goes on with the next
    batch. Clips that cannot be read, or have changed since they were indexed, are left out, and
    named in ``bad_clips.jsonl`` in the folder that the trainer logs to. Raises ``ValueError``
    at construction for settings that cannot work, in ``setup`` for manifests that cannot.
    """

    def __init__(
        self,
        manifest: Path,
        sizes: list[str] | SizeFamily | None = None,
        fps: float = 8.0,
        pixels_per_batch: int | None = None,
        packing: Packing | None = None,
        val_manifest: Path | None = None,
        latents: Path | None = None,
        windows_per_clip: int = 1,
        fixed_windows: bool = False,
        num_workers: int = 0,
        reader: Reader | None = None,
        decode_timeout_s: float | None = 30.0,
        max_bad_share: float = 0.05,
        filters: list[str] | None = None,
        seed: int = 0,
        steps_per_epoch: int | None = None,
        run_length: int | None = None,
        sources: bool = False,
        verify_content: bool = False,
    ) -> None:
        super().__init__()
        if windows_per_clip < 1:
            raise ValueError(f"windows_per_clip = {windows_per_clip}: must be at least 1")
        if seed < 0:
            raise ValueError(f"seed = {seed}: must not be negative")
        if run_length is not None and run_length < 1:
            raise ValueError(f"run_length = {run_length}: must be at least 1")
        if packing is not None and packing.resolution is not None and latents is not None:
            raise ValueError(
                "packing.resolution draws another size for each pass, and data.latents holds one: "
                "leave one of them out"
            )
        if packing is not None and sources:
            raise ValueError(
                "packing and sources are both given: clips with their sources are served in "
                "batches of one size"
            )
        if verify_content and sources:
            raise ValueError(
                "verify_content and sources are both given: a row records what its clip holds, and "
                "not what its source does"
            )
        self.sizes = _size_rule(sizes, fps, pixels_per_batch, packing)
        self.packing = packing
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"max_bad_share = {max_bad_share}: must be from 0 to 1")
        self.manifest = Path(manifest)
        self.val_manifest = None if val_manifest is None else Path(val_manifest)
        self.fps = fps
        self.latents = None if latents is None else Path(latents)
        self.windows_per_clip = windows_per_clip
        self.fixed_windows = fixed_windows
        self.num_workers = num_workers
        self.reader = reader or default_reader()
        if decode_timeout_s is not None and CAN_FORK:
            self.reader = GuardedReader(self.reader, decode_timeout_s)
        self.max_bad_share = max_bad_share
        self.filters = [Filter.parse(text) for text in filters or ()]
        self.seed = seed
        self.steps_per_epoch = steps_per_epoch
        self.run_length = run_length
        self.sources = sources
        self._contents = Contents(verify_content)
        self._key = (PairKeys if sources else LatentKeys)(fps, windows_per_clip, self._contents)
        self._clips: dict[Path, Assignment] = {}
        self._encoded: dict[Path, Encoded] = {}
        self._cache: LatentCache | None = None

    def setup(self, stage: str) -> None:
        """Read the manifests, give every clip its size, and open the latent cache where one is
        served.
        """
        if stage == "validate" and self.val_manifest is None:
            raise ValueError("val_manifest is not set: there is nothing to validate on")
        for manifest, assignment in self.check().items():
            self._refuse_bad(manifest, assignment)
        if stage != "predict" and self.latents is not None and self._cache is None:
            self._open_cache(self.latents)

    def check(self) -> dict[Path, Assignment]:
        """Which clips of each manifest go to which size, and which are left out and why; ``str`` of
        it is a table.

        Decodes one frame of every file of which the manifest does not say frames, rate and size.
        Raises ``ValueError`` with that table where no clip is left.
        """
        for manifest in self._manifests():
            if manifest not in self._clips:
                records = open_manifest(manifest)
                assignment = survey(records, self.sizes, self._bad_clips(), self.filters)
                _refuse_empty(assignment, f"{manifest}: no clip is left for {self._settings()}")
                if self.sources:
                    require_sources(manifest, assignment)
                if self._contents.verify:
                    require_contents(manifest, assignment)
                self._clips[manifest] = assignment
        return dict(self._clips)

    @property
    def spec(self) -> DataSpec:
        """What is served. The tokenizer of cached latents is known after ``setup``."""
        return DataSpec(
            fps=self.fps,
            validates=self.val_manifest is not None,
            sizes=tuple(self.sizes.sizes),
            sources=self.sources,
            packing=self.packing,
            latents=self.latents,
            tokenizer_fingerprint=None if self._cache is None else self._cache.tokenizer,
        )

    def train_dataloader(self) -> StreamLoader:
        rank, num_ranks = self._ranks()
        run_length = self.run_length or math.lcm(RUN_LENGTH, num_ranks)
        clips = self._served(self.manifest).clips
        choose: Chooser = RandomChoice(self.seed)
        if self.fixed_windows:
            choose = FixedWindows(choose, self.windows_per_clip)
        plan: Plan
        dataset: Dataset[PackedBatch] | Dataset[VideoBatch]
        if self.packing is None:
            plan = self._batch_plan(clips, run_length)
            dataset = self._dataset(self.manifest, choose)
        else:
            plan = self._pack_plan(self.packing, clips, run_length)
            dataset = self._packed(self.packing, clips, choose)
        stream = BatchStream(plan, rank, num_ranks, self.steps_per_epoch)
        return StreamLoader(
            dataset, stream, self.num_workers, persistent_workers=self.num_workers > 0
        )

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        if self.val_manifest is None:
            return []
        dataset = self._dataset(self.val_manifest, EvenChoice(1))
        clips = self._served(self.val_manifest).clips
        return self._once(dataset, self._batches(clips, 1, _clip_id))

    def predict_dataloader(self) -> DataLoader | list[DataLoader]:
        """Every window of every clip once, training manifest first; ``clip_ids`` are keys of the
        latent cache. What the cache of a callback with a ``root`` holds already is left out; the
        first batch of a whole one is made again, to see that the tokenizer is still the same. With
        ``sources`` a second loader gives theirs.
        """
        of_manifests = [self._clips[manifest].clips for manifest in self._manifests()]
        sizes = dict.fromkeys(itertools.chain(self.sizes.sizes, *of_manifests))
        clips = {size: joined(one.get(size, ()) for one in of_manifests) for size in sizes}
        reader = ClipReader(self.reader, self.fps, self._contents)
        loader = self._encoding(clips, reader, self._key)
        if not isinstance(self._key, PairKeys):
            return loader
        return [loader, self._encoding(clips, SourceReader(reader), self._key.of_source)]

    def _encoding(self, clips: ClipsBySize, reader: WindowReader, key: Namer) -> DataLoader:
        choose = EvenChoice(self.windows_per_clip)
        dataset = self._pixels(clips, reader, choose, key, self._manifests())
        batches = self._batches(clips, self.windows_per_clip, key, self._encoded_before())
        batches = batches or self._batches(clips, self.windows_per_clip, key)[: self._ranks()[1]]
        return self._once(dataset, batches)

    def _encoded_before(self) -> LatentCache | None:
        """The cache that ``predict`` goes on with, if there is one."""
        callbacks = getattr(self.trainer, "callbacks", ())
        roots = [getattr(callback, "root", None) for callback in callbacks]
        begun = [root for root in roots if root is not None and (Path(root) / INDEX).is_file()]
        return LatentCache.open(begun[0]) if begun else None

    def _served(self, manifest: Path) -> Assignment:
        return self._clips[manifest] if self._cache is None else self._encoded[manifest].clips

    def _dataset(self, manifest: Path, choose: Chooser) -> Dataset[VideoBatch]:
        clips = self._served(manifest).clips
        if self._cache is None:
            reader = ClipReader(self.reader, self.fps, self._contents)
            sources = SourceReader(reader) if self.sources else None
            return self._pixels(clips, reader, choose, _clip_id, [manifest], sources)
        _, numbers, of_sources = self._encoded[manifest]
        return LatentClips(clips, numbers, self._cache, choose, self.fps, of_sources)

    def _batch_plan(self, clips: ClipsBySize, run_length: int) -> BatchPlan:
        num_clips = {size: len(of_size) for size, of_size in clips.items()}
        batch_sizes = {size: self.sizes.batch_size(size) for size in clips}
        places = {size: _shards(of_size) for size, of_size in clips.items()}
        return BatchPlan(
            num_clips, batch_sizes, self.seed, run_length, _identity(clips), places=places
        )

    def _pack_plan(self, packing: Packing, clips: ClipsBySize, run_length: int) -> PackPlan:
        sizes = [(size, len(of_size)) for size, of_size in clips.items()]
        grids = [packing.grid(s.num_frames, s.height, s.width) for s, _ in sizes]
        repeated = np.repeat(narrowed(np.array(grids)), [count for _, count in sizes], axis=0)
        places = _shards(joined(clips.values()))
        return PackPlan(repeated, packing, self.seed, run_length, _identity(clips), places)

    def _packed(
        self, packing: Packing, clips: ClipsBySize, choose: Chooser
    ) -> Dataset[PackedBatch]:
        records = joined(clips.values())
        kept = KeptTokens(packing, self.seed)
        if self._cache is None:
            reader = ClipReader(self.reader, self.fps, self._contents)
            limit = self._bearable(self._clips[self.manifest])
            return PackedPixels(records, reader, choose, kept, self._bad_clips(limit))
        numbers = np.concatenate(list(self._encoded[self.manifest].numbers.values()))
        return PackedCache(records, numbers, self._cache, choose, kept, self.fps)

    def _pixels(
        self,
        clips: ClipsBySize,
        reader: WindowReader,
        choose: Chooser,
        name: Namer,
        manifests: Sequence[Path],
        source_reader: WindowReader | None = None,
    ) -> PixelClips:
        limit = sum(self._bearable(self._clips[manifest]) for manifest in manifests)
        return PixelClips(clips, reader, choose, name, self._bad_clips(limit), source_reader)

    def _bearable(self, assignment: Assignment) -> float:
        """How many more clips of a manifest may turn out to be bad."""
        bad = len(assignment.removed.get(Removal.UNREADABLE, ()))
        return self.max_bad_share * (assignment.num_clips + assignment.num_removed) - bad

    def _refuse_bad(self, manifest: Path, assignment: Assignment) -> None:
        if self._bearable(assignment) < 0:
            raise TooManyBadClips(
                f"{manifest}: more than max_bad_share = {self.max_bad_share} of its clips cannot "
                f"be read\n{assignment}"
            )

    def _once(self, dataset: Dataset[VideoBatch], batches: Sequence[BatchRequest]) -> DataLoader:
        sampler = FixedBatches(batches, *self._ranks())
        return DataLoader(dataset, batch_size=None, sampler=sampler, num_workers=self.num_workers)

    def _batches(
        self, clips: ClipsBySize, num_windows: int, key: Namer, done: LatentCache | None = None
    ) -> Sequence[BatchRequest]:
        windows = {}
        for size, of_size in clips.items():
            numbers = np.arange(len(of_size) * num_windows, dtype=np.int32)
            if done is not None:
                of_windows = itertools.product(of_size, range(num_windows))
                missing = (key(record, size, w) not in done for record, w in of_windows)
                numbers = numbers[np.fromiter(missing, bool, len(numbers))]
            windows[size] = numbers
        batch_sizes = {size: self.sizes.batch_size(size) for size in clips}
        return WindowBatches(windows, batch_sizes, num_windows)

    def _manifests(self) -> list[Path]:
        manifests = [self.manifest, self.val_manifest]
        return list(dict.fromkeys(manifest for manifest in manifests if manifest is not None))

    def _settings(self) -> str:
        sizes = ", ".join(map(str, self.sizes.sizes)) or "their own sizes"
        return f"{sizes} at {self.fps} frames per second"

    def _ranks(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def _bad_clips(self, limit: float = math.inf) -> BadClips:
        if self.trainer is None:
            return BadClips(None, limit)
        folder = self.trainer.log_dir or self.trainer.default_root_dir
        return BadClips(Path(folder) / "bad_clips.jsonl", limit)

    def _open_cache(self, root: Path) -> None:
        self._cache = LatentCache.open(root)
        for manifest, assignment in self._clips.items():
            found = encoded(assignment, self._key, self._cache)
            kept = found.clips
            missing = assignment.num_clips - kept.num_clips
            if missing > MAX_MISSING * assignment.num_clips:
                raise ValueError(
                    f"{root}: lacks the latents of {missing} of {assignment.num_clips} clips of "
                    f"{manifest} for {self._settings()} and windows_per_clip = "
                    f"{self.windows_per_clip}: encode them, by predict with the same settings"
                )
            _refuse_empty(kept, f"{root}: holds no latents of {manifest}")
            self._encoded[manifest] = found


def _refuse_empty(assignment: Assignment, problem: str) -> None:
    if not assignment.num_clips:
        raise ValueError(f"{problem}\n{assignment}")
    if assignment.removed:
        log.warning("not every clip takes part:\n%s", assignment)


def _clip_id(record: ClipRecord, size: VideoSize, turn: int) -> str:
    return record.clip_id


def _shards(records: Sequence[ClipRecord]) -> np.ndarray | None:
    """In which shard each clip lies; None where some lie in none."""
    numbers: dict[str, int] = {}
    places = array("i")
    for shard in cells(records, "shard"):
        if shard is None:
            return None
        places.append(numbers.setdefault(shard, len(numbers)))
    return narrowed(np.frombuffer(places, np.int32))


def _identity(clips: ClipsBySize) -> str:
    identity = hashlib.sha256()
    separator = ""
    for clip_id in itertools.chain.from_iterable(map(clip_ids, clips.values())):
        identity.update(f"{separator}{clip_id}".encode())
        separator = "\n"
    return identity.hexdigest()


def _size_rule(
    sizes: list[str] | SizeFamily | None,
    fps: float,
    pixels_per_batch: int | None,
    packing: Packing | None,
) -> SizeRule:
    given = {"sizes": sizes, "pixels_per_batch": pixels_per_batch}
    if packing is not None:
        if wrong := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{wrong[0]} and packing are both given: packing has sizes of its own")
        return NativeSizes(packing, fps)
    for name, value in given.items():
        if value is None:
            raise ValueError(f"{name} is missing: batches need it where there is no packing")
    assert sizes is not None
    assert pixels_per_batch is not None
    if isinstance(sizes, SizeFamily):
        return Buckets(sizes.sizes(), fps, pixels_per_batch)
    return Buckets([VideoSize.parse(size) for size in sizes], fps, pixels_per_batch)
