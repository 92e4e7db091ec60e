"""Where a shape is in each frame, and how a seam shows: on rendered clips whose truth is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from evaluation.metrics.alignment import ExpectedShape
from evaluation.metrics.tracks import centres, distance_of_tracks, seam_ratio, steps
from evaluation.models.frame_tasks.cases import in_colour, pairs_to_connect
from evaluation.models.frame_tasks.rules import (
    LONGEST_STEP,
    Mean,
    Rate,
    follows,
    gap_row,
    keeps_colour,
    moves,
    moves_evenly,
    shows,
)
from sora_lightning.data.synthetic.scenes import DIRECTIONS
from tests.evaluation.conftest import SIZES, Known
from tests.evaluation.drawing import BLUE, RED, YELLOW, drawn, polygon, regular


@pytest.fixture(scope="module")
def single(known: list[Known]) -> list[Known]:
    return [one for one in known if len(one.scene.shapes) == 1]


def test_the_centre_moves_as_the_scene_says(single: list[Known]) -> None:
    for one in single:
        shape = one.scene.shapes[0]
        found = centres(one.video)
        assert np.isfinite(found).all()
        way = np.array(DIRECTIONS[shape.direction]) * shape.rate * 2
        np.testing.assert_allclose(found[-1] - found[0], way, atol=0.04)
        # Where the clip's rate is no multiple of 8, steps take in unequally many of its own frames.
        between = np.diff((np.arange(17) * one.scene.fps / 8).astype(int)).max()
        longest = shape.rate * between / one.scene.fps
        assert steps(found).max() < max(LONGEST_STEP / 2, longest + 0.01) < LONGEST_STEP


def test_a_frame_without_the_shape_has_no_centre(single: list[Known]) -> None:
    video = single[0].video.copy()
    video[5] = video[5, 0, 0]
    found = centres(video)
    assert np.isnan(found[5]).all()
    assert np.isfinite(np.delete(found, 5, axis=0)).all()
    assert not moves_evenly(video)
    assert not np.isfinite(centres(np.full_like(video, 128))).any()


def test_a_jump_and_an_open_circle_are_seen(single: list[Known]) -> None:
    for one in single[:12]:
        assert moves_evenly(one.video)
        assert not moves_evenly(one.video, closed=True)
        there_and_back = np.concatenate([one.video, one.video[-2:0:-1]])
        assert moves_evenly(there_and_back, closed=True)
        cut = np.concatenate([one.video[:4], one.video[-4:]])
        assert not moves_evenly(cut)


def test_one_shape_without_a_jump_is_one_shape_of_one_colour_that_moves() -> None:
    circle = regular(60, 6)

    def high(frame: int) -> tuple[float, float]:
        return 22 - 0.6 * frame, 10.0

    alone = drawn(circle, high)
    assert moves_evenly(alone)
    second = alone.astype(float)
    for frame in range(len(second)):
        cover = polygon(regular(4, 4, 45), 6 if frame % 2 else 26, 26)[..., None]
        second[frame] += cover * (BLUE - second[frame])
    assert not moves_evenly(second.clip(0, 255).astype(np.uint8))
    assert not moves_evenly(drawn(circle, high, lambda frame: (RED, BLUE, YELLOW)[frame % 3]))
    assert not moves_evenly(drawn(circle, high, lambda frame: RED if frame < 9 else BLUE))
    assert not moves_evenly(drawn(circle, lambda frame: (16.0, 16.0)), closed=True)


def test_tracks_are_compared_where_both_are_seen(single: list[Known]) -> None:
    video = single[0].video
    track = centres(video)
    assert distance_of_tracks(track, track) == 0
    assert distance_of_tracks(track, track + np.array([0.3, 0.4])) == pytest.approx(0.5)
    lost = np.full_like(track, np.nan)
    assert distance_of_tracks(track, lost) == np.inf
    assert follows(video, video)
    assert not follows(video, video[::-1]) or single[0].scene.shapes[0].speed == "slowly"


def test_a_seam_is_measured_against_the_rest() -> None:
    steady = np.zeros((9, 8, 8, 3), np.uint8)
    for i in range(9):
        steady[i] = 10 * i
    assert seam_ratio(steady, [4]) == 1
    jump = steady.copy()
    jump[4:] += 20
    assert seam_ratio(jump, [4]) == 3
    assert seam_ratio(jump, [6]) == 1
    assert seam_ratio(steady, [4], closed=True) == 8
    assert seam_ratio(np.zeros_like(steady), [4]) == np.inf


def test_rules_read_the_attributes_that_they_name(single: list[Known]) -> None:
    one = single[0]
    truth = one.scene.shapes[0]
    expected = ExpectedShape(truth.shape, truth.colour, truth.direction)
    wrong = replace(expected, colour="cyan" if truth.colour != "cyan" else "red")
    assert shows(one.video, expected, ("colour", "direction", "shape"))
    assert not shows(one.video, wrong, ("colour",))
    assert shows(one.video, wrong, ("direction",))
    assert moves(one.video, truth.direction)
    assert not moves(one.video, "left" if truth.direction != "left" else "right")
    assert keeps_colour(one.video, expected, 2)
    grey = np.concatenate([one.video, np.full_like(one.video, 128)])
    assert not keeps_colour(grey, expected, 2)


def test_pairs_are_of_one_shape_and_leave_the_way_of_the_gap_open() -> None:
    cases = pairs_to_connect(24, num_frames=9, gap=7, fps=8, sizes=SIZES)
    directions = set()
    for case in cases:
        assert case.second_video is not None
        assert case.video.shape == case.second_video.shape
        assert shows(case.video, case.expected, ("colour", "direction", "shape"))
        assert shows(case.second_video, case.expected, ("colour",))
        end, start = centres(case.video)[-1], centres(case.second_video)[0]
        # Eight steps at the data's speeds, and never so little that a cut would pass.
        assert LONGEST_STEP < np.linalg.norm(start - end) < 0.25
        turned = [name for name in DIRECTIONS if moves(case.second_video, name)]
        directions.update("on" if name == case.expected.direction else "turned" for name in turned)
    assert directions == {"on", "turned"}
    again = pairs_to_connect(24, num_frames=9, gap=7, fps=8, sizes=SIZES)
    assert all(np.array_equal(a.video, b.video) for a, b in zip(cases, again, strict=True))
    other = in_colour(cases[0], "purple")
    assert "purple" in other.prompt
    assert other.expected.colour == "purple"
    assert cases[0].expected.colour not in other.prompt


def test_rows_say_whether_a_goal_is_met() -> None:
    row = Rate((True, True, True, False), "what", 0.7).row()
    assert (row["value"], row["n"], row["goal"], row["met"]) == (0.75, 4, 0.7, True)
    assert row["low"] < 0.75 < row["high"]
    assert Rate((True, False), "what", 0.7).row()["met"] is False
    assert Rate((True,), "what").row()["met"] is None
    assert Mean((1.0, 3.0), "what", "dB").row()["value"] == 2
    seen, unseen = (Rate((True,) * n + (False,) * (10 - n), "").row() for n in (9, 8))
    assert gap_row(seen, unseen, 0.15, "")["met"]
    assert not gap_row(seen, Rate((True, False), "").row(), 0.15, "")["met"]
