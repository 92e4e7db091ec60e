import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from sora_lightning.layers.attention import SelfAttention
from sora_lightning.layers.packed_sequence import PackedSequence
from sora_lightning.layers.partitions import (
    JOINT,
    PER_FRAME,
    PER_POSITION,
    Alternating,
    FactorisedDotProduct,
    FactorisedEncoder,
    FactorisedSelfAttention,
    HeadSplit,
    Joint,
    Partition,
    Periodic,
    Skip,
    Skiparse,
    Windows,
)
from sora_lightning.layers.positions.coordinates import grid_coordinates
from sora_lightning.layers.positions.rotary import rotary_angles, rotate
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
    actual = layer(x, angles, PackedSequence([GRID]))
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


def test_schedules_of_a_network():
    spatial, temporal = (PER_FRAME,), (PER_POSITION,)
    assert FactorisedEncoder(2).schedule(3) == [spatial, spatial, temporal]
    assert FactorisedDotProduct().schedule(1) == [(HeadSplit((PER_POSITION, PER_FRAME)),)]
    assert Windows([[1, 4, 4], [2, None, 2]]).schedule(3) == [
        (Partition(1, 4, 4),),
        (Partition(2, None, 2),),
        (Partition(1, 4, 4),),
    ]
    # Open-Sora-Plan 1.3: blocks 2 to 29 of 32 skip, the odd ones in groups.
    schedule = Skiparse().schedule(32)
    assert schedule[:2] == schedule[-2:] == [(JOINT,), (JOINT,)]
    assert schedule[2:30] == [(Skip(4),), (Skip(4, run=4),)] * 14


def test_skips_deal_tokens_and_runs_of_tokens_in_turn():
    grid = TokenGrid(1, 2, 8)
    coordinates = grid_coordinates(grid, torch.device("cpu"))
    assert Skip(4).group_indices(coordinates, grid).tolist() == [0, 1, 2, 3] * 4
    in_runs = Skip(2, run=2).group_indices(coordinates, grid)
    assert in_runs.tolist() == [0, 0, 1, 1] * 4


def test_single_and_group_skips_together_reach_every_token():
    """Two blocks of W = ratio tokens' stride reach all of a clip: what the skips are chosen for."""
    grid = TokenGrid(2, 4, 8)
    coordinates = grid_coordinates(grid, torch.device("cpu"))
    single, group = (skip.mask(coordinates, grid).int() for skip in (Skip(4), Skip(4, run=4)))
    assert not single.all()
    assert not group.all()
    assert (single @ group).all()


def test_tokens_of_images_may_be_kept_apart_in_windows_of_several_frames():
    image, video = TokenGrid(1, 4, 4), TokenGrid(2, 4, 4)
    layout = Windows([[1, None, None], [2, 2, 2]], images_apart=True)
    (spatial,), (spacetime,) = layout.schedule(2)
    coordinates = grid_coordinates(image, torch.device("cpu"))
    assert spatial.mask(coordinates, image).all()
    assert torch.equal(spacetime.mask(coordinates, image), torch.eye(16, dtype=torch.bool))
    coordinates = grid_coordinates(video, torch.device("cpu"))
    expected = Partition(2, 2, 2).mask(coordinates, video)
    assert torch.equal(spacetime.mask(coordinates, video), expected)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: FactorisedEncoder(4).schedule(4), "num_spatial = 4 of 4 blocks"),
        (lambda: Skiparse(num_joint=2).schedule(4), "leaves none that skips"),
        (lambda: Windows([[1, 2]]), "must be three numbers"),
        (lambda: Windows([]), "needs one partition at least"),
        (lambda: Periodic([()]), "needs one partition at least"),
        (lambda: Partition(frames=0), "frames = 0"),
        (lambda: Skip(0), "must be at least 1"),
        (
            lambda: SelfAttention(12, 3, HeadSplit((JOINT, PER_FRAME))),
            "num_heads = 3: must be a mult",
        ),
    ],
)
def test_what_cannot_be_laid_out_is_refused(build, said):
    with pytest.raises(ValueError, match=said):
        build()
