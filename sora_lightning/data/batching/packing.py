"""Plans which clips share a sequence at a token budget: Patch n' Pack (arXiv 2307.06304, section
2), on integers alone.

NaViT packs by first fit. Here a pack begins with the clip that has waited longest and takes the
largest that fit from among those that come next: near to packing the whole set sorted, while the
order stays shuffled.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from array import array
from bisect import bisect_right, insort
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int
from numpy import ndarray

from sora_lightning.data.batching.native_sizes import Packing, shown, smallest_int_dtype
from sora_lightning.data.batching.sampler import CLIPS_AT_ONCE, shuffled
from sora_lightning.types import VideoSize

# Among how many clips the next of a pack is chosen, and among how many packs those of a step.
LOOKAHEAD = 256
WINDOW = 256
WASTE_WARNED_OF = 0.02
# Fewer clips are planned between two steps, which takes less than 0.1 s.
PLANNED_AT_ONCE = 20_000
# Columns over rows of the sizes that packing is compared with.
BUCKET_RATIOS = (9 / 16, 3 / 4, 1.0, 4 / 3, 16 / 9, 21 / 9)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackRequest:
    """The clips of one sequence: their indices, the size that each is shown at, how often it was
    shown before (``repeats``), and how many of its tokens are kept.
    """

    clips: tuple[int, ...]
    sizes: tuple[VideoSize, ...]
    repeats: tuple[int, ...]
    kept: tuple[int, ...]


class Packs(NamedTuple):
    """Clips in the order of their packs: pack ``i`` is ``clips[offsets[i]:offsets[i + 1]]``."""

    clips: Int[ndarray, " n"]
    offsets: Int[ndarray, " m"]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def sums(self, values: ndarray, of: Callable[[ndarray], ndarray] = np.asarray) -> ndarray:
        """Return the sum over each pack of a value of each clip, or of a function ``of`` it; 0 for
        a pack without clips.
        """
        parts = []
        for begin in range(0, max(1, len(self)), WINDOW):
            starts = self.offsets[begin : begin + WINDOW + 1]
            part = of(values[self.clips[starts[0] : starts[-1]]])
            below = np.zeros(len(part) + 1, dtype=np.result_type(part, np.int64))
            np.cumsum(part, dtype=below.dtype, out=below[1:])
            parts.append(np.diff(below[starts - starts[0]]))
        return np.concatenate(parts)

    def reordered(self, order: Int[ndarray, " m"]) -> Packs:
        """Return the packs in another order."""
        lengths = np.diff(self.offsets)[order]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        clips = np.empty_like(self.clips)
        for begin in range(0, len(order), WINDOW):
            part = order[begin : begin + WINDOW]
            new = starts[begin : begin + WINDOW + 1]
            places = np.arange(new[0], new[-1])
            places += np.repeat(self.offsets[:-1][part] - new[:-1], np.diff(new))
            clips[new[0] : new[-1]] = self.clips[places]
        return Packs(clips, starts)


def best_fit(tokens: Int[ndarray, " n"], order: Int[ndarray, " n"], budget: int) -> Packs:
    """Pack clips in their order: oldest first, then the largest that fits of the next
    ``LOOKAHEAD``.

    Raises ``ValueError`` where one clip alone is over the budget.
    """
    if len(tokens) and tokens.max() > budget:
        raise ValueError(f"a clip of {tokens.max()} tokens does not fit a pack of {budget}")
    # Length and place in one integer, so that a sorted list of them answers "the largest within".
    low = (1 << 32) - 1
    coming = _keys(tokens, order)
    waiting = sorted(itertools.islice(coming, LOOKAHEAD))
    taken = bytearray(len(order))
    oldest, places, starts = 0, array("i"), array("i", [0])
    while waiting:
        oldest = taken.index(0, oldest)
        key = waiting.pop(bisect_right(waiting, int(tokens[order[oldest]]) << 32 | oldest) - 1)
        room = (budget << 32) | low
        while True:
            place = key & low
            room -= key - place
            taken[place] = 1
            places.append(place)
            at = bisect_right(waiting, room)
            if not at:
                break
            key = waiting.pop(at - 1)
        for key in itertools.islice(coming, len(places) - starts[-1]):
            insort(waiting, key)
        starts.append(len(places))
    clips = np.frombuffer(places, np.int32)
    for start in range(0, len(clips), CLIPS_AT_ONCE):
        part = slice(start, start + CLIPS_AT_ONCE)
        clips[part] = order[clips[part]]
    return Packs(clips, np.array(starts))


def _keys(tokens: Int[ndarray, " n"], order: Int[ndarray, " n"]) -> Iterator[int]:
    """Tokens and place of each clip, made a few thousand at a time."""
    for start in range(0, len(order), CLIPS_AT_ONCE):
        lengths = tokens[order[start : start + CLIPS_AT_ONCE]].astype(np.int64)
        yield from ((lengths << 32) | np.arange(start, start + len(lengths))).tolist()


def split_to_multiple(packs: Packs, tokens: Int[ndarray, " n"], multiple: int) -> Packs:
    """Divide the fullest of the last packs until their number is a multiple: every rank then has
    equally many.

    Where too few packs hold more than one clip, packs without clips make up the number.
    """
    if not len(packs) % multiple:
        return packs
    begin = max(0, len(packs) - max(WINDOW, multiple))
    tail = [
        packs.clips[a:b].tolist() for a, b in itertools.pairwise(packs.offsets[begin:].tolist())
    ]
    while missing := -(begin + len(tail)) % multiple:
        divisible = [i for i, pack in enumerate(tail) if len(pack) > 1]
        if not divisible:
            tail += [[] for _ in range(missing)]
        divisible.sort(key=lambda i: (-int(tokens[tail[i]].sum()), i))
        for i in divisible[:missing]:
            clips = sorted(tail[i], key=lambda c: (-tokens[c], c))
            tail[i] = clips[::2]
            tail.append(clips[1::2])
    lengths = np.concatenate([np.diff(packs.offsets[: begin + 1]), [len(pack) for pack in tail]])
    last = np.array([clip for pack in tail for clip in pack], dtype=np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return Packs(np.concatenate([packs.clips[: packs.offsets[begin]], last]), starts)


def balanced(
    packs: Packs,
    cost: Float64[ndarray, " m"],
    run_length: int,
    rng: np.random.Generator,
) -> Packs:
    """Sort packs by their cost within windows, cut these into runs, shuffle the runs.

    Ranks whose number divides ``run_length`` then work on packs of like cost in every step.
    """
    window = max(1, WINDOW // run_length) * run_length
    order = []
    for start in range(0, len(packs), window):
        places = start + np.argsort(cost[start : start + window], kind="stable")
        runs = places.reshape(-1, run_length)
        order.append(rng.permutation(runs, axis=0).ravel())
    return packs.reordered(np.concatenate(order))


def clip_costs(tokens: Int[ndarray, " n"], attention_tokens: int) -> Float64[ndarray, " n"]:
    """Return the modelled cost of each clip: linear layers and attention, ``n + n^2 / a``."""
    cost = tokens.astype(np.float64)
    np.square(cost, out=cost)
    cost /= attention_tokens
    cost += tokens
    return cost


def pack_costs(
    packs: Packs, tokens: Int[ndarray, " n"], attention_tokens: int
) -> Float64[ndarray, " m"]:
    """Return the sum of the clips' costs for each pack."""
    return packs.sums(tokens, partial(clip_costs, attention_tokens=attention_tokens))


class PackPlan:
    """An endless sequence of packs over clips of given largest token grids.

    Every epoch shows each clip once, at a resolution and with a share of its tokens drawn for it,
    in packs of their own. An epoch has a multiple of ``run_length`` packs, so that no rank is left
    with fewer; with fewer clips than a run it repeats each. The pack at a position depends on
    settings and seed alone.

    ``places`` says in which shard each clip lies, to read few shards at a time. ``identity`` names
    the clips behind the indices. For many clips the next epoch is planned in the background
    while one is shown.
    """

    def __init__(
        self,
        grids: Int[ndarray, "n 3"],
        packing: Packing,
        seed: int,
        run_length: int = 8,
        identity: str = "",
        places: Int[ndarray, " n"] | None = None,
    ) -> None:
        self.grids = smallest_int_dtype(grids)
        self.packing = packing
        self.seed = seed
        self.run_length = run_length
        self.identity = identity
        self.places = places
        self.repeats_per_epoch = -(-run_length // len(grids))
        self._starts = [0]
        self._current: tuple[int, Epoch] | None = None
        self._next: tuple[int, Future[Epoch]] | None = None

    @property
    def mixes_sizes(self) -> bool:
        """Return False: ranks need not work on one size in a step."""
        return False

    @property
    def batches_per_epoch(self) -> int:
        """Return the number of packs of the first epoch; others differ by few."""
        return len(self.show(0).packs)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that determines the packs, except the run length."""
        settings = repr(replace(self.packing, patch=tuple(self.packing.patch)))
        content = hashlib.sha256()
        for start in range(0, len(self.grids), CLIPS_AT_ONCE):
            content.update(self.grids[start : start + CLIPS_AT_ONCE].astype(np.int64).tobytes())
        parts = [content.hexdigest(), settings, self.seed, self.identity]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def with_run_length(self, run_length: int) -> PackPlan:
        """Return the plan with another run length, and therefore another order of packs."""
        return PackPlan(self.grids, self.packing, self.seed, run_length, self.identity, self.places)

    def state_dict(self) -> dict[str, list[int]]:
        """Return where the planned epochs begin, so that a resumed run finds its own at once."""
        return {"starts": list(self._starts)}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        self._starts = list(state.get("starts", [0]))

    def batch(self, position: int) -> PackRequest:
        """Return the pack at a position, 0 or greater. Plans the epochs before it if needed."""
        while position >= self._starts[-1]:
            epoch = len(self._starts) - 1
            self._starts.append(self._starts[-1] + len(self.show(epoch).packs))
        epoch = bisect_right(self._starts, position) - 1
        one = self.show(epoch)
        place = position - self._starts[epoch]
        drawn = one.packs.clips[one.packs.offsets[place] : one.packs.offsets[place + 1]]
        repeats, clips = np.divmod(drawn, len(self.grids))
        return PackRequest(
            tuple(clips.tolist()),
            tuple(self.packing.size(grid) for grid in one.grids[drawn].tolist()),
            tuple((epoch * self.repeats_per_epoch + repeats).tolist()),
            tuple(one.tokens[drawn].tolist()),
        )

    def show(self, epoch: int) -> Epoch:
        """Return a whole epoch. The last one is kept, and the next is planned in the background."""
        if self._current is None or self._current[0] != epoch:
            if self._next is not None and self._next[0] == epoch:
                one = self._next[1].result()
            else:
                one = plan_epoch(self, epoch)
            self._current = epoch, one
            if len(self.grids) > PLANNED_AT_ONCE:
                pool = ThreadPoolExecutor(1)
                self._next = epoch + 1, pool.submit(plan_epoch, self, epoch + 1)
                pool.shutdown(wait=False)
            from lightning.pytorch.utilities import rank_zero_info  # takes seconds to import

            rank_zero_info(f"epoch {epoch} over the clips: {one}")
            if one.waste > WASTE_WARNED_OF:
                log.warning(
                    "packs of %d tokens waste %.1f %% of them: a larger budget, smaller clips or, "
                    "for few clips, a shorter run_length than %d waste less",
                    one.budget,
                    100 * one.waste,
                    self.run_length,
                )
        return self._current[1]


class Epoch(NamedTuple):
    """A token grid and a number of kept tokens for each repeat of a clip, and their packs."""

    grids: Int[ndarray, "n 3"]
    tokens: Int[ndarray, " n"]
    packs: Packs
    budget: int

    @property
    def waste(self) -> float:
        """Return the share of the packs' budget that no token fills."""
        return 1 - int(self.tokens.sum()) / (len(self.packs) * self.budget)

    def __str__(self) -> str:
        return (
            f"{len(self.tokens)} clips in {len(self.packs)} packs of {self.budget} tokens; wasted "
            f"{self.waste:.2%}, where padding to the largest of 8 would waste "
            f"{padding_waste(self.grids, self.packs.clips):.1%} and buckets "
            f"{bucket_waste(self.grids):.1%}"
        )


def plan_epoch(plan: PackPlan, epoch: int) -> Epoch:
    """Draw sizes and order of one epoch, and pack it."""
    rng = np.random.default_rng([plan.seed, 3, epoch])
    repeats, num_clips = plan.repeats_per_epoch, len(plan.grids)
    first = epoch * repeats * num_clips
    largest = plan.grids if repeats == 1 else np.tile(plan.grids, (repeats, 1))
    grids, tokens = shown(largest, plan.packing, rng, first)
    order = np.empty((repeats, num_clips), dtype=np.int32)
    for repeat in range(repeats):
        order[repeat] = repeat * num_clips + shuffled(rng, num_clips, plan.places)
    packs = best_fit(tokens, order.ravel(), plan.packing.tokens)
    del order  # as large as the packs
    packs = split_to_multiple(packs, tokens, plan.run_length)
    costs = pack_costs(packs, tokens, plan.packing.attention_tokens)
    ordered = balanced(packs, costs, plan.run_length, rng)
    return Epoch(grids, tokens, ordered, plan.packing.tokens)


def padding_waste(
    grids: Int[ndarray, "n 3"], order: Int[ndarray, " n"] | None = None, num_clips: int = 8
) -> float:
    """Return the share of padding if batches of clips, in their order, are padded to their
    largest frames, rows and columns.
    """
    tokens = padded = 0
    step = CLIPS_AT_ONCE // num_clips * num_clips
    for start in range(0, len(grids), step):
        part = slice(start, start + step)
        of_part = grids[part if order is None else order[part]].astype(np.int64)
        firsts = np.arange(0, len(of_part), num_clips)
        lengths = np.diff(firsts, append=len(of_part))
        tokens += int(of_part.prod(axis=1).sum())
        padded += int((lengths * np.maximum.reduceat(of_part, firsts).prod(axis=1)).sum())
    return 1 - tokens / padded


def bucket_waste(grids: Int[ndarray, "n 3"], num_clips: int = 4096) -> float:
    """Return the share of the clips' tokens that is cropped if each gets the largest of 240 sizes
    that it covers: 8 lengths, 6 aspect ratios, 5 areas. Samples ``num_clips`` clips.
    """
    grids = grids[:: max(1, len(grids) // num_clips)].astype(np.int64)
    lengths = np.unique(np.linspace(1, grids[:, 0].max(), 8).astype(np.int64))
    area = float((grids[:, 1] * grids[:, 2]).max())
    offered = []
    for ratio, halvings, frames in itertools.product(BUCKET_RATIOS, range(5), lengths):
        rows, columns = np.sqrt(area / 2**halvings / ratio), np.sqrt(area / 2**halvings * ratio)
        offered.append((frames, int(rows + 0.5), int(columns + 0.5)))
    sizes = np.array(sorted(set(offered)))
    tokens = sizes.prod(axis=1)
    fits = (sizes[None] <= grids[:, None]).all(axis=2)
    return 1 - int((fits * tokens).max(axis=1).sum()) / int(grids.prod(axis=1).sum())
