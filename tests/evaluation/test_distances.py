"""Distances beside their floors, which stand at the score's own numbers where there are real videos
enough.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from evaluation.distances import FeatureSets, frechet_scores
from evaluation.metrics import frechet_distance
from evaluation.metrics.frechet import (
    distance_beside_others,
)
from evaluation.protocol import ScoreSpec

SPEC = ScoreSpec(alignment=False, least_videos=8, jackknife_groups=8, seed=0)
NAMES = ("fvd-x", "kvd-x")


def normal(n: int, d: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=draw, dtype=torch.float64)


def test_two_real_sets_apart_and_a_set_in_the_place_of_one() -> None:
    """Moved by 2 in each of 6 features, a set is farther by their squares than the floor is."""
    pool = normal(900, 6, 0)
    floor = distance_beside_others(None, pool, (300, 400))
    assert 0 < floor < 0.3
    moved = distance_beside_others(2 + normal(300, 6, 1), pool, (300, 400))
    assert moved == pytest.approx(24 + floor, rel=0.15)
    kept = distance_beside_others(None, pool, (300, 400), repeats=0)
    assert kept == pytest.approx(float(frechet_distance(pool[:300], pool[300:700])), rel=1e-7)
    with pytest.raises(ValueError, match="two sets apart of 500 and 401 need 901"):
        distance_beside_others(None, pool, (500, 401))


def test_the_floor_stands_at_the_scores_numbers_where_real_videos_suffice() -> None:
    """A floor at half of the videos is about twice as high: the bias goes with 1 / n."""
    generated, reference, spare = normal(200, 10, 0), normal(200, 10, 1), normal(200, 10, 2)
    few = frechet_scores(FeatureSets(generated, reference), SPEC, NAMES)
    many = frechet_scores(FeatureSets(generated, reference, spare), SPEC, NAMES)
    assert {"fvd-x/half", "fvd-x/floor"} <= few.keys()
    assert "fvd-x/apart" not in few
    assert {"fvd-x/apart", "fvd-x/floor"} <= many.keys()
    assert "fvd-x/half" not in many
    assert few["fvd-x/floor"].n == 100
    assert many["fvd-x/floor"].n == many["fvd-x"].n == 200
    assert "not twice as many" in few["fvd-x/floor"].meaning
    assert "200 real videos and 200 others" in many["fvd-x/floor"].meaning
    assert few["fvd-x"] == many["fvd-x"]  # further real videos move no score
    assert few["kvd-x"] == many["kvd-x"]
    ratio = few["fvd-x/floor"].value / many["fvd-x/floor"].value
    assert 1.6 < ratio < 2.6
    # What is no different lies at the floor.
    assert many["fvd-x"].value == pytest.approx(many["fvd-x/floor"].value, rel=0.3)


def test_a_reference_twice_as_large_as_what_is_evaluated_needs_no_spare() -> None:
    """All of it makes the score, so the pair beside each other is of a part of it."""
    sets = FeatureSets(normal(100, 5, 0), normal(250, 5, 1))
    assert sets.beside == (100, 150)
    scores = frechet_scores(sets, SPEC, NAMES)
    assert scores["fvd-x/floor"].n == 100
    assert "100 real videos and 150 others" in scores["fvd-x/floor"].meaning
    assert FeatureSets(normal(100, 5, 0), normal(199, 5, 1)).beside is None


def test_paired_videos_meet_no_clip_of_their_own_prompt() -> None:
    """Copies of the first real videos are at no distance from them, and at the floor's from
    others.
    """
    pool = normal(300, 5, 0)
    sets = FeatureSets(pool[:100].clone(), pool[:100], pool[100:200], paired=True)
    scores = frechet_scores(sets, SPEC, NAMES)
    assert scores["fvd-x"].value == pytest.approx(0, abs=1e-9)
    assert scores["fvd-x/apart"].value == scores["fvd-x/floor"].value > 0.01
    assert "without common prompts" in scores["fvd-x/apart"].meaning
    unpaired = frechet_scores(replace(sets, paired=False), SPEC, NAMES)
    assert unpaired["fvd-x/apart"].value < scores["fvd-x/apart"].value


def test_frames_of_one_video_stay_together() -> None:
    frames = normal(120, 4, 0).repeat_interleave(4, dim=0)
    spare = normal(120, 4, 1).repeat_interleave(4, dim=0)
    sets = FeatureSets(frames, frames.clone(), spare, rows_per_video=4)
    assert sets.beside == (120, 120)
    scores = frechet_scores(sets, SPEC, NAMES)
    whole = FeatureSets(frames[::4], frames[::4].clone(), spare[::4])
    expected = frechet_scores(whole, SPEC, NAMES)["fvd-x/floor"].value
    assert scores["fvd-x/floor"].value == pytest.approx(expected, rel=0.1)
