"""Attention with relative positions equals its definition, clip by clip and dense or packed."""

import pytest
import torch
import torch.nn.functional as F

from sora_lightning.layers.packed_sequence import PackedSequence
from sora_lightning.layers.partitions import PER_FRAME, HeadSplit, Partition, Skip
from sora_lightning.layers.positions.coordinates import grid_coordinates
from sora_lightning.layers.positions.relative import RelativeSelfAttention
from sora_lightning.types import TokenGrid

GRIDS = [TokenGrid(4, 4, 2), TokenGrid(3, 2, 5), TokenGrid(1, 3, 3)]
REACH = (1, 2, 1)


def by_definition(layer, x, grid):
    """One clip ``n d``, with the bias of every pair looked up by itself."""
    places = grid_coordinates(grid, torch.device("cpu"))
    n = len(places)
    seen = layer.partition.mask(places, grid)
    bias = torch.full((2, n, n), -torch.inf)
    for i in range(n):
        for j in range(n):
            if seen[i, j]:
                index = [
                    max(-reach, min(reach, int(a - b))) + reach
                    for a, b, reach in zip(places[i], places[j], REACH, strict=True)
                ]
                bias[:, i, j] = layer.table[(slice(None), *index)]
    q, k, v = (part.unflatten(-1, (2, 8)).transpose(0, 1) for part in layer.qkv(x).chunk(3, -1))
    y = F.scaled_dot_product_attention(layer.q_norm(q), layer.k_norm(k), v, attn_mask=bias)
    return layer.out(y.transpose(0, 1).flatten(1))


@pytest.mark.parametrize("partition", [PER_FRAME, Partition(2, 2, 2), Partition(), Skip(2)])
def test_every_arrangement_equals_the_definition(partition):
    layer = RelativeSelfAttention(16, 2, partition, reach=REACH)
    torch.nn.init.normal_(layer.table)
    clips = [torch.randn(2, grid.num_tokens, 16) for grid in GRIDS]
    for grid, clip in zip(GRIDS, clips, strict=True):
        dense = layer(clip, None, PackedSequence([grid]))
        for i in range(2):
            torch.testing.assert_close(
                dense[i], by_definition(layer, clip[i], grid), atol=1e-5, rtol=0
            )
    packed = layer(torch.cat(clips, dim=1)[:1], None, PackedSequence(GRIDS))
    alone = [by_definition(layer, clip[0], grid) for grid, clip in zip(GRIDS, clips, strict=True)]
    torch.testing.assert_close(packed[0], torch.cat(alone), atol=1e-5, rtol=0)
    packed.square().sum().backward()
    assert layer.table.grad.abs().max() > 0


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"reach = \[1, 2\] must be three"):
        RelativeSelfAttention(16, 2, reach=(1, 2))
    with pytest.raises(ValueError, match="heads share one partition"):
        RelativeSelfAttention(16, 2, HeadSplit((PER_FRAME, Partition())))
