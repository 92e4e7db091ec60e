"""How the tokens of one forward pass stand: a dense batch on one grid, or clips of any grids packed
into one sequence; and their groups under each partition, worked out once for all blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from sora_lightning.layers.groupings import Grouping, Permuted, Whole
from sora_lightning.layers.partitions import TokenPartition
from sora_lightning.layers.position import grid_coordinates
from sora_lightning.types import TokenGrid


class Arrangement:
    """Tokens ``b n d``: of one grid, every row holds a clip on it; of several, the only row (b = 1)
    holds one clip after the other.

    ``num_context`` tokens stand before the grid of each clip, at the coordinates of its first
    token; they are for joint attention alone, and any other partition refuses them.
    """

    def __init__(
        self,
        grids: Sequence[TokenGrid],
        device: torch.device | str = "cpu",
        num_context: int = 0,
    ):
        if not grids:
            raise ValueError("no grids: a sequence holds one clip at least")
        self.grids = tuple(grids)
        self.device = torch.device(device)
        self.num_context = num_context
        self._groupings: dict[TokenPartition, Grouping] = {}

    @property
    def is_packed(self) -> bool:
        """Whether the sequence may hold more than one clip."""
        return len(self.grids) > 1

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each grid's clip, context included."""
        return [self.num_context + grid.num_tokens for grid in self.grids]

    @cached_property
    def clips_by_length(self) -> Int[Tensor, " clips"]:
        """The clips' numbers, the shortest first: the order that ``Permuted`` sorts them in."""
        return torch.argsort(torch.tensor(self.lengths), stable=True).to(self.device)

    @cached_property
    def coordinates(self) -> Int[Tensor, "n 3"]:
        """``(frame, row, column)`` of every token of the sequence."""
        parts = []
        for grid in self.grids:
            parts.append(torch.zeros(self.num_context, 3, dtype=torch.int64, device=self.device))
            parts.append(grid_coordinates(grid, self.device))
        return torch.cat(parts)

    @cached_property
    def extents(self) -> Int[Tensor, "n 3"]:
        """Frames, rows and columns of the grid that each token stands on."""
        rows = torch.tensor([(g.f, g.h, g.w) for g in self.grids], device=self.device)
        return rows[self.clip_of_token]

    @cached_property
    def clip_of_token(self) -> Int[Tensor, " n"]:
        """The number of the grid that each token stands on."""
        lengths = torch.tensor(self.lengths, device=self.device)
        return torch.repeat_interleave(lengths, output_size=sum(self.lengths))

    def grouping(self, partition: TokenPartition) -> Grouping:
        """The groups of this partition, kept for the blocks that follow."""
        if partition not in self._groupings:
            self._groupings[partition] = self._group(partition)
        return self._groupings[partition]

    def _group(self, partition: TokenPartition) -> Grouping:
        whole = all(partition.is_whole(grid) for grid in self.grids)
        if self.num_context and not whole:
            raise ValueError(f"{partition}: context tokens stand in joint attention alone")
        if not self.is_packed:
            (grid,) = self.grids
            if whole:
                return Whole()
            if (regrouping := partition.regrouping(grid)) is not None:
                return regrouping
        return Permuted.of(self._group_numbers(partition), self.device)

    def _group_numbers(self, partition: TokenPartition) -> Int[Tensor, " n"]:
        """The number of each token's group, different in each clip; on the CPU."""
        numbers, first = [], 0
        for grid in self.grids:
            coordinates = grid_coordinates(grid, torch.device("cpu"))
            own = first + partition.group_numbers(coordinates, grid)
            numbers += [torch.full((self.num_context,), first), own]
            first = int(own.max()) + 1
        return torch.cat(numbers)
