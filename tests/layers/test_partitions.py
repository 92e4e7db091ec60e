import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from sora_lightning.layers.arrangement import Arrangement
from sora_lightning.layers.attention import SelfAttention
from sora_lightning.layers.partitions import (
    JOINT,
    PER_FRAME,
    PER_POSITION,
    Alternating,
    FactorisedSelfAttention,
    Joint,
    Partition,
)
from sora_lightning.layers.position import grid_coordinates, rotary_angles, rotate
from sora_lightning.types import TokenGrid

GRID = TokenGrid(4, 2, 6)
PARTITIONS = [JOINT, PER_FRAME, PER_POSITION, Partition(2, 1, 3), Partition(columns=2)]


@pytest.mark.parametrize("partition", PARTITIONS, ids=str)
def test_groups_come_back_in_place(partition):
    x = torch.randn(3, GRID.num_tokens, 5)
    assert torch.equal(partition.ungroup(partition.group(x, GRID), GRID), x)


@pytest.mark.parametrize("partition", PARTITIONS, ids=str)
def test_grouped_attention_equals_the_mask_definition_forward_and_backward(partition):
    coordinates = grid_coordinates(GRID, torch.device("cpu"))
    angles = rotary_angles(coordinates, 8)
    layer = SelfAttention(16, 2, partition)
    x = torch.randn(3, GRID.num_tokens, 16, requires_grad=True)

    q, k, v = rearrange(layer.qkv(x), "b n (three k d) -> three b k n d", three=3, k=2)
    q, k = rotate(layer.q_norm(q), angles), rotate(layer.k_norm(k), angles)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=partition.mask(coordinates, GRID))
    expected = layer.out(rearrange(y, "b k n d -> b n (k d)"))
    actual = layer(x, angles, Arrangement([GRID]))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)

    direction = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad((expected * direction).sum(), x)
    (given,) = torch.autograd.grad((actual * direction).sum(), x)
    torch.testing.assert_close(given, wanted, atol=1e-5, rtol=0)


def test_masks_are_what_the_names_say():
    coordinates = grid_coordinates(GRID, torch.device("cpu"))
    frame, row, column = coordinates.unbind(-1)
    same_frame = frame[:, None] == frame
    same_place = (row[:, None] == row) & (column[:, None] == column)
    assert JOINT.mask(coordinates, GRID).all()
    assert torch.equal(PER_FRAME.mask(coordinates, GRID), same_frame)
    assert torch.equal(PER_POSITION.mask(coordinates, GRID), same_place)


def test_a_box_that_does_not_tile_is_refused():
    with pytest.raises(ValueError, match="3 does not divide f = 4"):
        Partition(frames=3).group(torch.zeros(1, GRID.num_tokens, 1), GRID)


def test_layouts_place_their_partitions():
    assert Joint().partitions(7) == (JOINT,)
    assert FactorisedSelfAttention().partitions(0) == (PER_FRAME, PER_POSITION)
    assert [Alternating().partitions(i) for i in range(3)] == [
        (PER_FRAME,),
        (PER_POSITION,),
        (PER_FRAME,),
    ]
