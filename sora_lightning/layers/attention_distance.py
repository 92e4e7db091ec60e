"""How far apart an attention layout leaves the tokens of a clip, computed from its partitions.

The average attention distance is that of Open-Sora-Plan (arXiv 2412.00131, section 2.2.2): the
mean, over pairs of tokens, of the least number of attentions by which one sees the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sora_lightning.layers.partitions import BlockPartitions, TokenPartition
from sora_lightning.layers.positions.coordinates import grid_coordinates
from sora_lightning.types import TokenGrid

_MOST_SOURCES = 256


def average_attention_distance(schedule: Iterable[BlockPartitions], grid: TokenGrid) -> float:
    """Return the average attention distance of a layout's blocks on one clip.

    Attentions may follow in any order, and a token sees itself by one. The mean is over at most 256
    evenly spaced tokens and all those that they see; infinity if some never see each other.
    """
    groups = _groups(_partitions(schedule), grid)
    frontier = _sources(grid)
    reached = torch.zeros_like(frontier)
    total = num_attentions = 0
    while frontier.any():
        num_attentions += 1
        seen = torch.stack([_in_same_groups(frontier, indices) for indices in groups]).any(0)
        frontier = seen & ~reached
        reached |= frontier
        total += num_attentions * int(frontier.sum())
    return total / reached.numel() if reached.all() else math.inf


def attended_share(schedule: Iterable[BlockPartitions], grid: TokenGrid) -> float:
    """Return the share of a clip's tokens that a token sees in one attention, on average over
    tokens, heads and attentions; 1 for full attention.
    """
    shares = []
    for partition in (one for block in schedule for one in block):
        for part in partition.head_partitions:
            (indices,) = _groups([part], grid)
            sizes = torch.bincount(indices)[indices]
            share = sizes.double().mean().item() / grid.num_tokens
            shares.append(share / len(partition.head_partitions))
    return sum(shares) / sum(len(block) for block in schedule)


def _partitions(schedule: Iterable[BlockPartitions]) -> list[TokenPartition]:
    """Return the different partitions of all blocks and heads."""
    every = (part for block in schedule for one in block for part in one.head_partitions)
    return list(dict.fromkeys(every))


def _groups(partitions: list[TokenPartition], grid: TokenGrid) -> list[Int[Tensor, " n"]]:
    """Return the index of each token's group, counted from 0, for each partition."""
    coordinates = grid_coordinates(grid, torch.device("cpu"))
    found = (partition.group_indices(coordinates, grid) for partition in partitions)
    return [torch.unique(indices, return_inverse=True)[1] for indices in found]


def _sources(grid: TokenGrid) -> Bool[Tensor, "s n"]:
    """Return one row for each token to start from, True at that token."""
    n = grid.num_tokens
    tokens = torch.linspace(0, n - 1, min(n, _MOST_SOURCES)).round().long()
    return torch.nn.functional.one_hot(tokens, n).bool()


def _in_same_groups(tokens: Bool[Tensor, "s n"], indices: Int[Tensor, " n"]) -> Bool[Tensor, "s n"]:
    """Return the tokens that share a group with one of ``tokens``."""
    num_groups = int(indices.max()) + 1
    hit = torch.zeros(len(tokens), num_groups, dtype=torch.int32)
    hit.index_add_(1, indices, tokens.int())
    return hit[:, indices] > 0
