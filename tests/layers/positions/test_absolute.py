import math

import numpy as np
import pytest
import torch

from sora_lightning.layers.packed_sequence import PackedSequence
from sora_lightning.layers.positions.absolute import (
    Fractional,
    Learned,
    Sinusoidal,
    SinusoidalPlane,
    SinusoidalTime,
)
from sora_lightning.layers.positions.rotary import Rotary, rotary_angles, rotary_frequencies, rotate
from sora_lightning.types import TokenGrid

GRIDS = [TokenGrid(2, 3, 4), TokenGrid(1, 4, 2), TokenGrid(3, 2, 2)]


@pytest.mark.parametrize(
    "embedding",
    [Sinusoidal(16), SinusoidalPlane(16), SinusoidalTime(16), Learned(16, (3, 4, 4)),
     Fractional(16)],
    ids=lambda embedding: type(embedding).__name__,
)  # fmt: skip
def test_a_packed_clip_stands_where_it_stands_alone(embedding):
    packed = PackedSequence(GRIDS)
    for part, grid in zip(embedding(packed).split(packed.lengths), GRIDS, strict=True):
        torch.testing.assert_close(part, embedding(PackedSequence([grid])))


def one_axis(width, positions):
    """Sines, then cosines, in float64, as the DiT repository writes its table."""
    angles = np.outer(positions, 10000.0 ** -(np.arange(width // 2) / (width / 2)))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def test_plane_positions_are_the_image_dits():
    row, column = np.divmod(np.arange(16 * 16), 16)
    expected = np.concatenate([one_axis(192, column), one_axis(192, row)], axis=1)
    actual = SinusoidalPlane(384)(PackedSequence([TokenGrid(1, 16, 16)]))
    np.testing.assert_allclose(actual.numpy(), expected, atol=2e-6)


def test_temporal_positions_are_lattes():
    actual = SinusoidalTime(64)(PackedSequence([TokenGrid(16, 1, 1)]))
    np.testing.assert_allclose(actual.numpy(), one_axis(64, np.arange(16)), atol=2e-6)


def test_learned_positions_end_where_their_grid_ends():
    with pytest.raises(ValueError, match=r"w=5\) reaches beyond the learned positions"):
        Learned(8, (4, 4, 4))(PackedSequence([TokenGrid(4, 4, 4), TokenGrid(1, 1, 5)]))


def test_fractional_positions_depend_on_the_share_of_the_extent():
    """The middle of a clip is the middle of any clip; a coarse token stands at the mean of the two
    fine tokens it covers, where both lie on one straight piece of the curve.
    """
    embedding = Fractional(8, num_points=2)
    coarse = embedding(PackedSequence([TokenGrid(1, 1, 3)]))
    fine = embedding(PackedSequence([TokenGrid(1, 1, 6)]))
    torch.testing.assert_close(coarse, (fine[::2] + fine[1::2]) / 2)
    middle = embedding(PackedSequence([TokenGrid(1, 1, 5)]))[2]
    torch.testing.assert_close(coarse[1], middle)
    torch.testing.assert_close(middle, embedding.curves.mean(dim=1).sum(dim=0))


def test_rotary_without_a_trained_length_is_the_plain_rotation():
    sequence = PackedSequence(GRIDS)
    torch.testing.assert_close(
        Rotary().angles(sequence, 24), rotary_angles(sequence.coordinates, 24)
    )


def test_rotary_shows_longer_clips_no_angle_that_training_did_not():
    trained, width = 16, 48
    rotary = Rotary(trained_frames=trained)
    frequencies = rotary_frequencies(16, 100.0, torch.device("cpu"))
    turns_once = frequencies * trained >= 2 * math.pi
    assert turns_once.any()
    assert not turns_once.all()

    def of(frames):
        return rotary.angles(PackedSequence([TokenGrid(frames, 1, 1)]), width)[:, :8]

    short, long = of(trained), of(5 * trained)
    plain = Rotary().angles(PackedSequence([TokenGrid(5 * trained, 1, 1)]), width)[:, :8]
    torch.testing.assert_close(short, plain[:trained])
    assert (long[:, ~turns_once].amax(0) <= frequencies[~turns_once] * trained).all()
    torch.testing.assert_close(long[-1, ~turns_once], short[-1, ~turns_once])
    assert (plain[:, ~turns_once].amax(0) > frequencies[~turns_once] * trained).all()
    assert torch.equal(long[:, turns_once], plain[:, turns_once])


def test_a_longer_clip_in_a_pack_slows_only_itself():
    rotary = Rotary(trained_frames=4)
    grids = [TokenGrid(3, 1, 1), TokenGrid(9, 1, 1)]
    packed = rotary.angles(PackedSequence(grids), 48).split([3, 9])
    for part, grid in zip(packed, grids, strict=True):
        torch.testing.assert_close(part, rotary.angles(PackedSequence([grid]), 48))
    q, k = torch.randn(2, 1, 48)
    # Within a clip, products still depend on displacement alone.
    products = [
        (rotate(q, packed[1][i : i + 1]) * rotate(k, packed[1][i + 2 : i + 3])).sum()
        for i in range(7)
    ]
    torch.testing.assert_close(torch.stack(products), products[0].expand(7), atol=1e-4, rtol=0)
