"""The tokens of one forward pass: a dense batch on one grid, or clips of any grids packed into one
sequence, and their groups under each partition.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from sora_lightning.layers.context_parallel import TokenShards
from sora_lightning.layers.groupings import Grouping, SortedGroups, Whole
from sora_lightning.layers.partitions import TokenPartition
from sora_lightning.layers.positions.coordinates import grid_coordinates
from sora_lightning.types import TokenGrid


class PackedSequence:
    """Describes tokens ``b n d``. On one grid each row holds a clip; on several the only row (b =
    1) holds one clip after the other.

    ``num_context`` tokens precede each clip's own, at the coordinates of its first token. Only
    joint attention takes them. ``kept`` holds the indices (frame-major, increasing, at least one)
    of each clip's tokens that are in the sequence; the others are dropped. ``None`` keeps all.

    ``coordinates`` are ``(frame, row, column)`` of every token. ``clips_by_length`` holds the
    indices of the clips of a packed sequence as ``SortedGroups`` sorts them, the shortest first.

    ``shards`` divide the tokens over ranks. All else then still describes all tokens, and tensors
    hold those of this rank.
    """

    def __init__(
        self,
        grids: Sequence[TokenGrid],
        device: torch.device | str = "cpu",
        num_context: int = 0,
        kept: Sequence[Int[Tensor, " _n"]] | None = None,
    ):
        if not grids:
            raise ValueError("no grids: a sequence holds one clip at least")
        self.grids = tuple(grids)
        self.device = torch.device(device)
        self.num_context = num_context
        self.kept = None if kept is None else tuple(kept)
        self.coordinates = self._all_coordinates()
        self.clips_by_length = self._sorted_clips()
        self.shards: TokenShards | None = None
        self._groupings: dict[TokenPartition, Grouping] = {}

    @property
    def is_packed(self) -> bool:
        """Return True if the sequence may hold more than one clip."""
        return len(self.grids) > 1

    def num_clips(self, x: Float[Tensor, "b n d"]) -> int:
        """Return the number of clips in tokens of this sequence."""
        return len(self.grids) if self.is_packed else x.shape[0]

    @property
    def num_tokens(self) -> list[int]:
        """Number of tokens of each clip, without context tokens."""
        if self.kept is None:
            return [grid.num_tokens for grid in self.grids]
        return [len(kept) for kept in self.kept]

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each clip, including context tokens."""
        return [self.num_context + count for count in self.num_tokens]

    @property
    def clip_of_token(self) -> Int[Tensor, " n"]:
        """Index of the clip of each token."""
        lengths = torch.tensor(self.lengths, device=self.device)
        return torch.repeat_interleave(lengths, output_size=sum(self.lengths))

    @property
    def extents(self) -> Int[Tensor, "n 3"]:
        """Frames, rows and columns of the grid of each token."""
        rows = torch.tensor([(g.f, g.h, g.w) for g in self.grids], device=self.device)
        return rows[self.clip_of_token]

    def _sorted_clips(self) -> Int[Tensor, " clips"] | None:
        if not self.is_packed:
            return None
        return torch.argsort(torch.tensor(self.lengths), stable=True).to(self.device)

    def _all_coordinates(self) -> Int[Tensor, "n 3"]:
        if not (self.is_packed or self.num_context):
            return self._coordinates(0, self.device)
        parts = []
        for number in range(len(self.grids)):
            parts.append(torch.zeros(self.num_context, 3, dtype=torch.int64, device=self.device))
            parts.append(self._coordinates(number, self.device))
        return torch.cat(parts)

    def _coordinates(self, number: int, device: torch.device) -> Int[Tensor, "n 3"]:
        """Return the coordinates of the kept tokens of one grid."""
        coordinates = grid_coordinates(self.grids[number], device)
        return coordinates if self.kept is None else coordinates[self.kept[number].to(device)]

    def insert_context(
        self, x: Float[Tensor, "b n d"], context: Float[Tensor, "clips m d"]
    ) -> Float[Tensor, "b all d"]:
        """Return the tokens with each clip's ``num_context`` tokens before its own."""
        if not self.is_packed:
            return torch.cat([context, x], dim=1)
        clips = x.split(self.num_tokens, dim=1)
        pairs = zip(context.split(1), clips, strict=True)
        return torch.cat([part for pair in pairs for part in pair], dim=1)

    def remove_context(self, x: Float[Tensor, "b m d"]) -> Float[Tensor, "b n d"]:
        """Return the tokens without context tokens."""
        if not self.num_context:
            return x
        clips = x.split(self.lengths, dim=1)
        return torch.cat([clip[:, self.num_context :] for clip in clips], dim=1)

    def divided(self, shards: TokenShards) -> PackedSequence:
        """Return the sequence with its tokens divided over ranks."""
        divided = copy(self)
        divided.shards = shards
        return divided

    def own_tokens(self, x: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "own ..."]:
        """Return this rank's rows of what has one for each token."""
        return x if self.shards is None else x[self.shards.own]

    def all_tokens(self, x: Float[Tensor, "b own d"]) -> Float[Tensor, "b n d"]:
        """Return the tokens of all ranks from those of each."""
        return x if self.shards is None else self.shards.gather(x)

    def select(self, clips: Sequence[Float[Tensor, "b _n d"]]) -> list[Float[Tensor, "b _k d"]]:
        """Return the kept tokens of each clip from all of its tokens."""
        if self.kept is None:
            return list(clips)
        return [clip[:, kept] for clip, kept in zip(clips, self.kept, strict=True)]

    def scatter(self, clips: Sequence[Float[Tensor, "b _k d"]]) -> list[Float[Tensor, "b _n d"]]:
        """Return all tokens of each clip from the kept ones, with zeros for the others."""
        if self.kept is None:
            return list(clips)
        return [
            clip.new_zeros(len(clip), grid.num_tokens, clip.shape[2]).index_copy(1, kept, clip)
            for clip, kept, grid in zip(clips, self.kept, self.grids, strict=True)
        ]

    def times(self, t: Float[Tensor, " times"]) -> Float[Tensor, "*times"]:
        """Return a pack's times of clips, or of all tokens, without those of dropped tokens."""
        if self.kept is not None and len(t) != len(self.grids):
            clips = t.split([grid.num_tokens for grid in self.grids])
            t = torch.cat(self.select([clip[None, :, None] for clip in clips]), dim=1)[0, :, 0]
        return t if self.is_packed or len(t) == 1 else t[None]

    def grouping(self, partition: TokenPartition) -> Grouping:
        """Return the groups of this partition, computed once for all blocks."""
        if partition not in self._groupings:
            self._groupings[partition] = self._group(partition)
        return self._groupings[partition]

    def _group(self, partition: TokenPartition) -> Grouping:
        whole = all(partition.is_whole(grid) for grid in self.grids)
        if self.num_context and not whole:
            raise ValueError(f"{partition}: context tokens need joint attention")
        if not self.is_packed:
            (grid,) = self.grids
            if whole:
                return Whole()
            if self.kept is None and (regrouping := partition.regrouping(grid)) is not None:
                return regrouping
        return SortedGroups.of(self._group_indices(partition), self.device)

    def _group_indices(self, partition: TokenPartition) -> Int[Tensor, " n"]:
        """Return the index of each token's group, on the CPU. No group is shared among clips."""
        indices, first = [], 0
        for number, grid in enumerate(self.grids):
            coordinates = self._coordinates(number, torch.device("cpu"))
            own = first + partition.group_indices(coordinates, grid)
            indices += [torch.full((self.num_context,), first), own]
            first = int(own.max()) + 1
        return torch.cat(indices)
