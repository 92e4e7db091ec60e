"""Alignment: shapes that a prompt asks for, and whether a video shows them."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.metrics.alignment import ExpectedShape, ShapeAlignment, align, parse_prompt
from evaluation.metrics.shapes import FoundShape
from sora_lightning.data.synthetic.scenes import captions
from tests.evaluation.conftest import Known


def found(colour: str, shape: str | None, direction: str | None) -> FoundShape:
    return FoundShape(colour, shape, direction, 80.0, (0.0, 0.0), 1.0, shape or "circle")


RED = ExpectedShape("circle", "red", "left")
BLUE = ExpectedShape("square", "blue", "up")
A_RED = found("red", "circle", "left")
A_BLUE = found("blue", "square", "up")


def test_every_wording_is_read(known: list[Known]) -> None:
    rng = np.random.default_rng(0)
    for one in known:
        truth = [ExpectedShape(s.shape, s.colour, s.direction) for s in one.scene.shapes]
        for wording in captions(one.scene, rng):
            assert parse_prompt(wording) == truth, wording


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("On a gray background, a large red circle drifts slowly to the left.", [RED]),
        ("On a blue background, a red circle moves leftwards", [RED]),
        ("To the left glides a RED circle", [RED]),
        ("a red circle moves left while a blue square glides upwards", [RED, BLUE]),
    ],
)
def test_free_wordings(prompt: str, expected: list[ExpectedShape]) -> None:
    assert parse_prompt(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "lacks"),
    [
        ("a cat sits", "no shape"),
        ("a circle moves left", "no colour"),
        ("a red circle", "no direction"),
        ("a red circle moves left and a blue square", "the square has no direction"),
        ("on a red background a circle moves left", "no colour"),
    ],
)
def test_incomplete_prompts_are_refused(prompt: str, lacks: str) -> None:
    with pytest.raises(ValueError, match=lacks):
        parse_prompt(prompt)


def test_each_attribute_is_evaluated_by_itself() -> None:
    one = align([found("red", "square", None)], [RED])
    assert (one.colour, one.direction, one.shape) == (True, False, False)
    one = align([found("green", "circle", "left")], [RED])
    assert (one.colour, one.direction, one.shape) == (False, True, True)


def test_a_blunt_outline_is_nearest_to_a_shape_without_being_it() -> None:
    one = align([found("red", None, "left")], [RED])
    assert (one.shape, one.nearest_shape) == (False, True)
    assert align([found("red", "circle", "left")], [RED]).nearest_shape
    assert not align([found("red", "square", "left")], [RED]).nearest_shape
    swapped = [found("red", "square", "left"), found("blue", "circle", "up")]
    assert not align(swapped, [RED, BLUE]).nearest_shape
    assert not align([A_RED, A_BLUE], [RED]).nearest_shape


def test_order_does_not_matter_and_colour_pairs_first() -> None:
    assert all(_flags(align([A_BLUE, A_RED], [RED, BLUE])))
    swapped = [found("red", "square", "up"), found("blue", "circle", "left")]
    assert _flags(align(swapped, [RED, BLUE])) == (True, False, False)


def test_a_missing_shape_is_wrong_in_everything() -> None:
    assert not any(_flags(align([], [RED])))
    assert not any(_flags(align([A_RED], [RED, BLUE])))


def test_a_shape_that_nobody_asked_for_makes_the_video_wrong() -> None:
    one = align([A_RED, A_BLUE], [RED])
    assert not any(_flags(one))
    assert one.num_extra == 1


def _flags(one: object) -> tuple[bool, bool, bool]:
    return one.colour, one.direction, one.shape  # type: ignore[attr-defined]


def test_the_metric_counts_videos_and_keeps_kinds_apart(known: list[Known]) -> None:
    metric = ShapeAlignment()
    single, double = known[:4], known[-2:]
    videos = [one.video for one in single + double]
    prompts = [one.prompt for one in single + double]
    videos[0] = videos[0][::-1]  # moves the wrong way
    metric.update(videos[:3], prompts[:3], ids=[0, 1, 2])
    metric.update(videos[2:], prompts[2:], ids=[2, 3, 4, 5])  # 2 again, as padded samplers do
    scores = metric.compute()
    assert scores["alignment/colour"] == 1
    assert scores["alignment/direction"] == 0.75
    assert scores["alignment/nearest_shape"] == 1
    assert scores["alignment/all"] == 0.75
    assert scores["alignment/two_shapes/all"] == 1


def test_the_wrong_prompt_scores_low(known: list[Known]) -> None:
    metric = ShapeAlignment()
    single = known[:72]
    prompts = [one.prompt for one in single]
    rng = np.random.default_rng(0)
    metric.update([one.video for one in single], rng.permutation(prompts).tolist(), range(72))
    scores = metric.compute()
    assert scores["alignment/colour"] < 0.4
    assert scores["alignment/direction"] < 0.5
    assert scores["alignment/all"] < 0.1
