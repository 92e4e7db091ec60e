"""Every fast path equals the mask definition, on grids of any sizes, dense and packed."""

import random

import pytest
import torch
import torch.nn.functional as F

from sora_lightning.layers.attention import CrossAttention, JointTextAttention, attend
from sora_lightning.layers.groupings import Regrouping, SortedGroups, Whole
from sora_lightning.layers.packed_sequence import PackedSequence
from sora_lightning.layers.partitions import (
    JOINT,
    PER_FRAME,
    PER_POSITION,
    HeadSplit,
    Partition,
    Skip,
)
from sora_lightning.layers.positions.coordinates import grid_coordinates
from sora_lightning.types import TokenGrid

PARTITIONS = [
    JOINT,
    PER_FRAME,
    PER_POSITION,
    Partition(frames=1, rows=2, columns=3),
    Partition(frames=3, rows=2, columns=2),
    Partition(frames=2, images_apart=True),
    Skip(3),
    Skip(2, run=2),
    HeadSplit((PER_POSITION, PER_FRAME)),
]


def random_grids(seed, num_grids):
    draw = random.Random(seed)
    return [TokenGrid(*(draw.randint(1, 5) for _ in range(3))) for _ in range(num_grids)]


def by_mask(q, k, v, partition, grids):
    """Each share of the heads under a mask that is written from the definition, clip by clip."""
    outputs = []
    parts = partition.head_partitions
    for part, *heads in zip(parts, *(x.chunk(len(parts), 1) for x in (q, k, v)), strict=True):
        masks = [part.mask(grid_coordinates(grid, torch.device("cpu")), grid) for grid in grids]
        outputs.append(F.scaled_dot_product_attention(*heads, torch.block_diag(*masks).bool()))
    return torch.cat(outputs, dim=1)


def assert_equals_mask(partition, grids, b):
    n = sum(grid.num_tokens for grid in grids)
    tensors = [torch.randn(b, 4, n, 8, requires_grad=True) for _ in range(3)]
    direction = torch.randn(b, 4, n, 8)
    actual = attend(*tensors, partition, PackedSequence(grids))
    expected = by_mask(*tensors, partition, grids)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    given = torch.autograd.grad((actual * direction).sum(), tensors)
    wanted = torch.autograd.grad((expected * direction).sum(), tensors)
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("partition", PARTITIONS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_packed_attention_equals_the_mask_definition(partition, seed):
    assert_equals_mask(partition, random_grids(seed, 2 + 2 * seed), b=1)


@pytest.mark.parametrize("partition", PARTITIONS, ids=str)
@pytest.mark.parametrize("grid", [TokenGrid(4, 4, 6), TokenGrid(1, 3, 4), TokenGrid(5, 3, 5)])
def test_dense_attention_equals_the_mask_definition(partition, grid):
    assert_equals_mask(partition, [grid], b=3)


def test_even_grids_are_reshaped_and_only_others_permuted():
    even, uneven = PackedSequence([TokenGrid(4, 4, 6)]), PackedSequence([TokenGrid(5, 3, 5)])
    assert isinstance(even.grouping(JOINT), Whole)
    assert isinstance(uneven.grouping(JOINT), Whole)
    for partition in (PER_FRAME, PER_POSITION):
        assert isinstance(even.grouping(partition), Regrouping)
        assert isinstance(uneven.grouping(partition), Regrouping)
    for partition in (Partition(2, 2, 3), Skip(4), Skip(4, run=4)):
        assert isinstance(even.grouping(partition), Regrouping)
        assert isinstance(uneven.grouping(partition), SortedGroups)


def test_a_grouping_is_worked_out_once_for_all_blocks():
    sequence = PackedSequence(random_grids(0, 3))
    assert sequence.grouping(PER_FRAME) is sequence.grouping(Partition(frames=1))


def test_groups_of_one_length_share_a_batch_and_come_back_in_place():
    sequence = PackedSequence([TokenGrid(2, 2, 2), TokenGrid(3, 1, 4), TokenGrid(4, 3, 1)])
    grouping = sequence.grouping(PER_FRAME)
    assert grouping.runs == ((4, 3), (5, 4))  # four frames of 3 tokens, two and three of 4
    assert grouping.cu_seqlens.tolist() == [0, 3, 6, 9, 12, 16, 20, 24, 28, 32]
    assert grouping.longest == 4
    x = torch.randn(1, 2, 32, 5)
    assert torch.equal(grouping.ungroup(grouping.group(x)), x)


def test_what_one_clip_holds_does_not_reach_another():
    grids = random_grids(7, 4)
    sequence = PackedSequence(grids)
    n = sum(sequence.lengths)
    q, k, v = torch.randn(3, 1, 4, n, 8)
    first = sequence.lengths[0]
    changed = [torch.cat([torch.randn(1, 4, first, 8), x[:, :, first:]], 2) for x in (q, k, v)]
    for partition in PARTITIONS:
        base, other = (attend(*x, partition, sequence) for x in ((q, k, v), changed))
        assert torch.equal(base[:, :, first:], other[:, :, first:])


@pytest.mark.parametrize("kind", [CrossAttention, JointTextAttention])
def test_text_of_a_packed_clip_is_its_own(kind):
    grids = random_grids(3, 5)
    layer = kind(16, 2)
    text, mask = torch.randn(5, 4, 16), torch.rand(5, 4) < 0.6
    mask[:, 0] = True
    sequence = PackedSequence(grids)
    x = torch.randn(1, sum(sequence.lengths), 16)
    packed = layer(x, text, mask, sequence).split(sequence.lengths, dim=1)
    for i, (part, clip) in enumerate(zip(packed, x.split(sequence.lengths, dim=1), strict=True)):
        alone = layer(clip, text[i : i + 1], mask[i : i + 1], PackedSequence(grids[i : i + 1]))
        torch.testing.assert_close(part, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", [(1, None, None), (2, 2, 2)])
def test_text_joins_the_keys_of_every_window(window):
    grid, layer = TokenGrid(3, 4, 2), JointTextAttention(16, 2, window=window)
    x, text = torch.randn(2, grid.num_tokens, 16), torch.randn(2, 5, 16)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    of_window = Partition(*window).mask(grid_coordinates(grid, torch.device("cpu")), grid)
    for i in range(2):
        keys = torch.cat([x[i], text[i]])
        seen = torch.cat([of_window, mask[i].expand(grid.num_tokens, -1)], dim=1)
        q = layer.q_norm(layer.q(x[i]).unflatten(-1, (2, 8)).transpose(0, 1))
        k, v = (part.unflatten(-1, (2, 8)).transpose(0, 1) for part in layer.kv(keys).chunk(2, -1))
        y = F.scaled_dot_product_attention(q, layer.k_norm(k), v, attn_mask=seen)
        expected = layer.out(y.transpose(0, 1).flatten(1))
        actual = layer(x, text, mask, PackedSequence([grid]))[i]
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_a_window_of_another_number_of_axes_is_refused():
    with pytest.raises(ValueError, match=r"window = \[1, 2\] must be three"):
        JointTextAttention(16, 2, window=(1, 2))


def test_coordinates_extents_and_context_stand_in_order():
    grids = [TokenGrid(1, 2, 1), TokenGrid(2, 1, 1)]
    sequence = PackedSequence(grids, num_context=1)
    assert sequence.lengths == [3, 3]
    expected = [[0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]]
    assert sequence.coordinates.tolist() == expected
    assert sequence.extents.tolist() == [[1, 2, 1]] * 3 + [[2, 1, 1]] * 3
    assert sequence.clip_of_token.tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="context tokens need joint attention"):
        sequence.grouping(PER_FRAME)


def test_an_arrangement_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no grids"):
        PackedSequence([])
