"""Plans of batches: an endless order that depends on the seed and one position alone.

Neither workers nor ranks change it, and a run that stops at any batch resumes with the next.
Lightning leaves a ``DistributedSampler`` alone and restores a loader's state. When it resumes with
workers, it sets a sampler's epoch too late; therefore the position, and not the epoch, decides.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Any, Protocol, overload

import numpy as np
from jaxtyping import Int
from numpy import ndarray
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from sora_lightning.types import VideoSize

log = logging.getLogger(__name__)


# Clips are shuffled among so many shards, read side by side.
SHARDS_AT_ONCE = 8
# Planning looks at so many clips at a time, so that what is computed of them takes little memory.
CLIPS_AT_ONCE = 2**14


class Plan(Protocol):
    """An endless sequence of requests for batches, each a function of its position."""

    run_length: int

    @property
    def mixes_sizes(self) -> bool:
        """True if ranks work on one size in a step only where they share a run."""

    @property
    def batches_per_epoch(self) -> int:
        """Return the number of batches that show every clip once."""

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes what batches show, but for the length of runs."""

    def with_run_length(self, run_length: int) -> Plan:
        """Return a plan of the same clips and seed with other runs."""

    def batch(self, position: int) -> Any:
        """Return the request for a dataset at a position."""

    def state_dict(self) -> dict[str, Any]:
        """Return what lets a resumed run find its position faster; it decides nothing."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of an equal plan."""


def shuffled(
    rng: np.random.Generator, num_clips: int, places: Int[ndarray, " n"] | None = None
) -> Int[ndarray, " n"]:
    """Return the indices of clips in random order.

    Where ``places`` holds the index of each clip's shard, the shards are shuffled, and clips within
    a few shards: a reader then has few of them open.
    """
    order = np.arange(num_clips, dtype=np.int32)
    if places is None:
        rng.shuffle(order)
        return order
    groups = rng.permutation(int(places.max()) + 1) // SHARDS_AT_ONCE
    rng.shuffle(order)
    if not groups.any():
        return order
    return _sorted_by(groups, places, order)


def _sorted_by(
    groups: Int[ndarray, " s"], places: Int[ndarray, " n"], order: Int[ndarray, " n"]
) -> Int[ndarray, " n"]:
    """Return ``order[argsort(groups[places[order]])]``, stable, in little more memory."""
    parts = range(0, len(order), CLIPS_AT_ONCE)
    num_groups = int(groups.max()) + 1
    counts = np.zeros(num_groups, dtype=np.int64)
    for start in parts:
        of_clips = groups[places[start : start + CLIPS_AT_ONCE]]
        counts += np.bincount(of_clips, minlength=num_groups)
    begins = np.cumsum(counts) - counts
    result = np.empty_like(order)
    for start in parts:
        part = order[start : start + CLIPS_AT_ONCE]
        of_clips = groups[places[part]]
        counts = np.bincount(of_clips, minlength=num_groups)
        shift = begins - (np.cumsum(counts) - counts)
        by_group = np.argsort(of_clips, kind="stable")
        result[np.arange(len(part)) + shift[of_clips[by_group]]] = part[by_group]
        begins += counts
    return result


@dataclass(frozen=True)
class BatchRequest:
    """The clips of one batch: their size, their indices within it, and how often each was shown
    before (``repeats``).
    """

    size: VideoSize
    clips: tuple[int, ...]
    repeats: tuple[int, ...]


class BatchPlan:
    """An endless sequence of full batches over clips sorted by size.

    Within a size the clips are shuffled anew for every epoch, and batches are cut from the epochs
    laid end to end: no clip is left out or seen twice within an epoch, a batch is never short, and
    a size with fewer clips than a batch shows some of them twice in it. The sizes alternate in
    proportion to their clips, with ``run_length`` batches of one size in a row, so that as many
    ranks (or a divisor) always work on the same size in the same step.

    ``identity`` names the clips behind the indices; ``places`` may say in which shard each
    clip lies. Raises ``ValueError`` where ``run_length`` is not positive.
    """

    def __init__(
        self,
        num_clips: Mapping[VideoSize, int],
        batch_sizes: Mapping[VideoSize, int],
        seed: int,
        run_length: int = 1,
        identity: str = "",
        places: Mapping[VideoSize, Int[ndarray, " n"] | None] | None = None,
    ) -> None:
        self.sizes = tuple(size for size, count in num_clips.items() if count)
        self.num_clips = tuple(num_clips[size] for size in self.sizes)
        self.batch_sizes = tuple(batch_sizes[size] for size in self.sizes)
        self.seed = seed
        self.run_length = run_length
        self.identity = identity
        self.places = places
        self._clips_per_run = tuple(run_length * batch for batch in self.batch_sizes)
        # Each size starts its first run at another moment of the epoch, else all would start
        # together.
        rng = np.random.default_rng([seed, 0])
        self._phases = tuple(int(rng.integers(clips)) for clips in self._clips_per_run)
        self._schedules: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    @property
    def mixes_sizes(self) -> bool:
        return len(self.sizes) > 1

    @property
    def batches_per_epoch(self) -> int:
        """Return the number of batches that show every clip once, rounded up."""
        return math.ceil(sum(map(Fraction, self.num_clips, self.batch_sizes)))

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes what batches show, but for the length of runs."""
        sizes = [str(size) for size in self.sizes]
        parts = [sizes, self.num_clips, self.batch_sizes, self.seed, self.identity]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def with_run_length(self, run_length: int) -> BatchPlan:
        """Return a plan of the same clips and seed with other runs, which has another order unless
        there is but one size.
        """
        num_clips = dict(zip(self.sizes, self.num_clips, strict=True))
        batch_sizes = dict(zip(self.sizes, self.batch_sizes, strict=True))
        return BatchPlan(num_clips, batch_sizes, self.seed, run_length, self.identity, self.places)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: any position is found at once."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing."""

    def batch(self, position: int) -> BatchRequest:
        """Return the batch at a position, 0 or greater, without visiting those before it."""
        run, offset = divmod(position, self.run_length)
        bucket, bucket_run = self._run(run)
        batch_size, num_clips = self.batch_sizes[bucket], self.num_clips[bucket]
        first = (bucket_run * self.run_length + offset) * batch_size
        repeats, places = np.divmod(np.arange(first, first + batch_size), num_clips)
        orders = {repeat: self._order(bucket, repeat) for repeat in np.unique(repeats).tolist()}
        pairs = zip(repeats.tolist(), places.tolist(), strict=True)
        clips = tuple(int(orders[repeat][place]) for repeat, place in pairs)
        return BatchRequest(self.sizes[bucket], clips, tuple(repeats.tolist()))

    def _runs_before(self, epoch: int) -> list[int]:
        """Return the runs of each size that begin before an epoch, in proportion to its clips."""
        counts = zip(self.num_clips, self._phases, self._clips_per_run, strict=True)
        return [max(0, -((phase - epoch * clips) // per_run)) for clips, phase, per_run in counts]

    def _run(self, run: int) -> tuple[int, int]:
        """Return the index of the size, and the index among the runs of that size."""
        last = 1
        while sum(self._runs_before(last)) <= run:
            last *= 2
        epoch = bisect.bisect_right(range(last), run, key=lambda n: sum(self._runs_before(n))) - 1
        buckets, run_indices = self._schedule(epoch)
        place = run - sum(self._runs_before(epoch))
        return int(buckets[place]), int(run_indices[place])

    def _schedule(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the runs of one epoch in their order."""
        if epoch not in self._schedules:
            begin, end = self._runs_before(epoch), self._runs_before(epoch + 1)
            counts = np.array(end) - np.array(begin)
            buckets = np.repeat(np.arange(len(counts)), counts)
            np.random.default_rng([self.seed, 1, epoch]).shuffle(buckets)
            run_indices = np.empty_like(buckets)
            for bucket in range(len(counts)):
                run_indices[buckets == bucket] = np.arange(begin[bucket], end[bucket])
            self._schedules.clear()
            self._schedules[epoch] = buckets, run_indices
        return self._schedules[epoch]

    def _order(self, bucket: int, epoch: int) -> np.ndarray:
        """Return the order of a size's clips in one epoch. The last two of each size are kept."""
        if (bucket, epoch) not in self._orders:
            rng = np.random.default_rng([self.seed, 2, bucket, epoch])
            self._orders = {
                k: v for k, v in self._orders.items() if k[0] != bucket or k[1] == epoch - 1
            }
            places = None if self.places is None else self.places[self.sizes[bucket]]
            order = shuffled(rng, self.num_clips[bucket], places)
            self._orders[bucket, epoch] = order
        return self._orders[bucket, epoch]


class BatchStream(DistributedSampler):
    """One rank's share of a plan: at every step the ranks take one batch each, side by side.

    Endless: ``len`` is the steps of an epoch, and a loader stops there. ``position`` counts the
    batches that all ranks together have used up. Raises ``ValueError`` where runs of one size do
    not divide evenly among the ranks.
    """

    def __init__(self, plan: Plan, rank: int, num_ranks: int, steps_per_epoch: int | None) -> None:
        if plan.mixes_sizes and plan.run_length % num_ranks:
            raise ValueError(
                f"run_length = {plan.run_length}: must be a multiple of the {num_ranks} ranks, "
                "so that all of them work on one size at a time"
            )
        self.plan = plan
        self.steps = steps_per_epoch or -(-plan.batches_per_epoch // num_ranks)
        self.position = 0
        super().__init__(range(self.steps), num_replicas=num_ranks, rank=rank, shuffle=False)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        for position in itertools.count(self.position + self.rank, self.num_replicas):
            yield self.plan.batch(position)

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the position decides the order."""


class WindowBatches(Sequence[BatchRequest]):
    """Windows of clips, as many of one size to a batch as ``batch_sizes`` says; a batch is made
    when it is asked for. Window ``w`` of clip ``n`` has the index ``n * num_windows + w``.
    """

    def __init__(
        self,
        windows: Mapping[VideoSize, Int[ndarray, " _n"]],
        batch_sizes: Mapping[VideoSize, int],
        num_windows: int,
    ) -> None:
        self.windows = windows
        self.batch_sizes = batch_sizes
        self.num_windows = num_windows
        counts = [-(-len(indices) // batch_sizes[size]) for size, indices in windows.items()]
        self._ends = list(itertools.accumulate(counts))
        self._sizes = list(windows)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> BatchRequest: ...
    @overload
    def __getitem__(self, index: slice) -> list[BatchRequest]: ...
    def __getitem__(self, index: int | slice) -> BatchRequest | list[BatchRequest]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        place = bisect.bisect_right(self._ends, index)
        size = self._sizes[place]
        start = (index - ([0, *self._ends])[place]) * self.batch_sizes[size]
        indices = self.windows[size][start : start + self.batch_sizes[size]]
        clips, windows = np.divmod(indices, self.num_windows)
        return BatchRequest(size, tuple(clips.tolist()), tuple(windows.tolist()))


class FixedBatches(DistributedSampler):
    """Given batches once, in order, distributed over the ranks; some may have one fewer."""

    def __init__(self, batches: Sequence[BatchRequest], rank: int, num_ranks: int) -> None:
        super().__init__(batches, num_replicas=num_ranks, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.batches = batches
        self.indices = range(rank, len(batches), num_ranks)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[BatchRequest]:
        return (self.batches[index] for index in self.indices)


class StreamLoader(DataLoader):
    """Loads a ``BatchStream``, and keeps the position up to date by the batches that it has given
    out.

    What workers have prefetched does not count: it is the next epoch's, whose first step then does
    not wait for them. The state is the same on every rank, since one rank writes it. ``waited_s``
    sums the seconds in which the training waited for its next batch; ``is_waiting`` is True
    meanwhile. ``settings`` are those that decide what is served beside the order, by their keys.
    """

    sampler: BatchStream

    def __init__(
        self,
        dataset: Dataset,
        sampler: BatchStream,
        num_workers: int,
        settings: Mapping[str, Any] = MappingProxyType({}),
        **options: Any,
    ) -> None:
        super().__init__(
            dataset, batch_size=None, sampler=sampler, num_workers=num_workers, **options
        )
        self.settings = {key: str(value) for key, value in settings.items()}
        self.waited_s = 0.0
        self.is_waiting = False
        self._ahead_of: int | None = None  # the position that what is prefetched follows

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        goes_on = self._iterator is not None and self._ahead_of == self.sampler.position
        batches = self._iterator if goes_on else super().__iter__()
        assert batches is not None
        for _ in range(len(self.sampler)):
            self._ahead_of = None  # unless the batch comes: a worker may raise
            asked_s, self.is_waiting = time.perf_counter(), True
            batch = next(batches)
            self.is_waiting = False
            self.waited_s += time.perf_counter() - asked_s
            self.sampler.position += self.sampler.num_replicas
            self._ahead_of = self.sampler.position
            yield batch

    def named(self, position: int) -> list[str]:
        """Return file and size of each clip of the batch at a position."""
        return self.dataset.named(self.sampler.plan.batch(position))  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        plan = self.sampler.plan
        return {
            "position": self.sampler.position,
            "run_length": plan.run_length,
            "plan": plan.fingerprint,
            "epochs": plan.state_dict(),
            "settings": self.settings,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume at the saved position. With another number of ranks, up to that many batches are
        repeated.

        Raises ``ValueError`` where other clips, sizes, batches or another seed made the saved
        order, and for another of the ``settings``.
        """
        sampler = self.sampler
        for key, was in state.get("settings", {}).items():
            if (given := self.settings.get(key, was)) != was:
                raise ValueError(
                    f"{key} = {given}: the checkpoint was trained with {was}. Leave it as it "
                    "was, or start a new run from these weights with --checkpoint.start_from"
                )
        self._ahead_of = None
        if state["plan"] != sampler.plan.fingerprint:
            raise ValueError(
                "the checkpoint's order of clips was made from other clips, sizes, "
                "pixels_per_batch or seed: resume with the same data, or start a new run from "
                "the checkpoint's weights"
            )
        if state["run_length"] % sampler.num_replicas == 0:
            sampler.plan = sampler.plan.with_run_length(state["run_length"])
        elif sampler.plan.mixes_sizes:
            log.warning(
                "%d ranks cannot share runs of %d batches: the order of clips changes from here on",
                sampler.num_replicas,
                state["run_length"],
            )
        if sampler.plan.run_length == state["run_length"]:
            sampler.plan.load_state_dict(state.get("epochs", {}))
        sampler.position = state["position"] // sampler.num_replicas * sampler.num_replicas
