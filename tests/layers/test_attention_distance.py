"""Average attention distance against Open-Sora-Plan's formulas, and against all pairs of tokens."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from sora_lightning.layers.attention_distance import attended_share, average_attention_distance
from sora_lightning.layers.partitions import (
    Alternating,
    AttentionLayout,
    FactorisedDotProduct,
    FactorisedEncoder,
    FactorisedSelfAttention,
    Joint,
    Skiparse,
    Windows,
)
from sora_lightning.layers.positions.coordinates import grid_coordinates
from sora_lightning.types import TokenGrid

_GRID = TokenGrid(24, 32, 32)  # Open-Sora-Plan's: 93 x 512 x 512 pixels


def test_full_attention_has_distance_one() -> None:
    assert average_attention_distance(Joint().schedule(4), _GRID) == 1
    assert attended_share(Joint().schedule(4), _GRID) == 1


@pytest.mark.parametrize(
    "layout",
    [Alternating(), FactorisedSelfAttention(), FactorisedDotProduct(), FactorisedEncoder(2)],
    ids=lambda layout: type(layout).__name__,
)
def test_space_and_time_apart_have_the_distance_of_2_plus_1_d(layout: AttentionLayout) -> None:
    """2 - (1/T + 1/HW); the formula counts a token's own place in both, so it is off by 1/N."""
    distance = average_attention_distance(layout.schedule(4), _GRID)
    assert distance == pytest.approx(2 - (1 / 24 + 1 / 1024), abs=1.01 / _GRID.num_tokens)
    assert round(distance, 3) == 1.957
    share = (1 / 24 + 1 / 1024) / 2
    assert attended_share(layout.schedule(4), _GRID) == pytest.approx(share)


@pytest.mark.parametrize(("ratio", "published"), [(2, 1.25), (4, 1.563), (6, 1.694), (8, 1.766)])
def test_skiparse_has_its_published_distance(ratio: int, published: float) -> None:
    """2 - 2/k + 1/k^2, exact where k^2 divides the number of tokens."""
    schedule = Skiparse(ratio, num_joint=0).schedule(4)
    distance = average_attention_distance(schedule, _GRID)
    assert distance == pytest.approx(2 - 2 / ratio + 1 / ratio**2, abs=1e-4)
    assert distance == pytest.approx(published, abs=5e-4)


@pytest.mark.parametrize(
    "layout",
    [
        Joint(),
        Alternating(),
        Skiparse(3, 0),
        Windows([[1, None, None], [None, 2, 2]]),
        Windows([[2, 2, 2], [None, 1, 1], [1, 1, None]]),
    ],
)
def test_distance_and_share_are_those_of_all_pairs(layout: AttentionLayout) -> None:
    grid = TokenGrid(4, 3, 4)
    coordinates = grid_coordinates(grid, torch.device("cpu"))
    schedule = layout.schedule(6)
    masks = [one.mask(coordinates, grid) for block in schedule for one in block]
    edges = torch.stack(masks).any(0)
    distances = torch.where(edges, 1.0, math.inf)
    for via in range(grid.num_tokens):
        distances = torch.minimum(distances, distances[:, via, None] + distances[None, via])
    expected = distances.mean().item()
    assert average_attention_distance(schedule, grid) == pytest.approx(expected, rel=1e-6)
    shares = [mask.double().mean().item() for mask in masks]
    assert attended_share(schedule, grid) == pytest.approx(sum(shares) / len(shares))


def test_tokens_that_never_see_each_other_are_infinitely_far() -> None:
    for layout in (Windows([[1, None, None]]), Windows([[None, 1, None]])):
        assert average_attention_distance(layout.schedule(2), TokenGrid(2, 2, 2)) == math.inf


def test_more_kinds_of_blocks_never_lengthen_the_distance() -> None:
    windows = [[1, None, None], [None, 1, 1], [None, 2, 2]]
    grid = TokenGrid(4, 4, 4)
    for few, more in itertools.pairwise([windows[:2], windows]):
        far, near = (average_attention_distance(Windows(w).schedule(3), grid) for w in (few, more))
        assert near < far
