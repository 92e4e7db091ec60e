"""The reader of pixels: right on rendered clips and on flawed ones, not fooled by wrong ones."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from evaluation.metrics.alignment import align, parse_prompt
from evaluation.metrics.shapes import (
    AMBIGUOUS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    find_shapes,
    is_cut,
)
from sora_lightning.data.synthetic import scenes
from sora_lightning.data.synthetic.scenes import Triple
from tests.evaluation.conftest import Known, draw
from tests.evaluation.drawing import BLUE, RED, Outline, drawn, regular, to_left


def blurred(video: np.ndarray) -> np.ndarray:
    return ndimage.gaussian_filter(video.astype(float), (0, 0.7, 0.7, 0)).round().astype(np.uint8)


def rounded(video: np.ndarray) -> np.ndarray:
    """Without the tips of its corners, and blurred, as a coarse decoder leaves it."""
    return blurred(ndimage.median_filter(video, (1, 3, 3, 1)))


def noisy(video: np.ndarray, deviation: float = 0.05) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, deviation * 255, video.shape)
    return (video + noise).clip(0, 255).astype(np.uint8)


def very_noisy(video: np.ndarray) -> np.ndarray:
    return noisy(video, 0.1)


def compressed(video: np.ndarray) -> np.ndarray:
    def through_jpeg(frame: np.ndarray) -> np.ndarray:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=60, subsampling=0)
        return np.array(Image.open(buffer))

    return np.stack([through_jpeg(frame) for frame in video])


def tinted(video: np.ndarray) -> np.ndarray:
    """A cast of colour, as an imperfect decoder leaves it: shapes and background alike."""
    return (video * [0.92, 1.0, 0.95] + [10, 0, 6]).clip(0, 255).astype(np.uint8)


def part_right(known: list[Known], flaw: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    evaluated = [align(find_shapes(flaw(k.video)), parse_prompt(k.prompt)) for k in known]
    return np.mean([(one.colour, one.direction, one.shape) for one in evaluated], axis=0)


def test_rendered_clips_are_read_right(known: list[Known]) -> None:
    assert (part_right(known, lambda video: video) >= 0.99).all()


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("flaw", [blurred, noisy, very_noisy, compressed, tinted])
def test_flawed_clips_are_read_right(
    known: list[Known], flaw: Callable[[np.ndarray], np.ndarray], step: int
) -> None:
    assert (part_right(known[::step], flaw) >= 0.97).all()


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_square_without_corners_is_ambiguous_and_never_another_shape(
    known: list[Known], step: int
) -> None:
    known = known[::step]
    colour, direction, shape = part_right(known, rounded)
    assert min(colour, direction) >= 0.97
    assert 0.6 < shape < 0.97
    for one in known:
        shown = {scene.shape for scene in one.scene.shapes}
        assert {found.shape for found in find_shapes(rounded(one.video))} <= {
            *shown,
            AMBIGUOUS,
            None,
        }


CIRCLE, SQUARE = regular(60, 6), regular(4, 7.2, 45)
TRIANGLE = regular(3, 7.2, -90)


@pytest.mark.parametrize(
    ("outline", "shape"), [(CIRCLE, "circle"), (SQUARE, "square"), (TRIANGLE, "triangle")]
)
def test_shapes_by_another_rule_of_drawing_are_read_right(outline: Outline, shape: str) -> None:
    (found,) = find_shapes(drawn(outline))
    assert (found.colour, found.shape, found.direction) == ("red", shape, "left")


HALF_A_PLUS = [(-7, -2), (-2, -2), (-2, -7), (2, -7), (2, -2), (7, -2)]
IMPOSTORS: dict[str, Outline | Callable[[int], Outline]] = {
    "diamond": regular(4, 7.2),
    "square by 20": regular(4, 7.2, 65),
    "triangle upside down": regular(3, 7.2, 90),
    "triangle to the right": regular(3, 7.2),
    "triangle by 20": regular(3, 7.2, -70),
    "pentagon": regular(5, 6.6, -90),
    "pentagon by 10": regular(5, 6.6, -80),
    "hexagon": regular(6, 6.6),
    "hexagon upright": regular(6, 6.6, 30),
    "heptagon": regular(7, 6.8, -90),
    "octagon": regular(8, 6.6),
    "octagon upright": regular(8, 6.6, 22.5),
    "star of five": regular(10, 7.8, -90, inner=0.5),
    "star of four": regular(8, 7.8, 0, inner=0.6),
    "plus": [(side * x, side * y) for side in (1, -1) for x, y in HALF_A_PLUS],
    "rectangle": [(-7, -5.4), (7, -5.4), (7, 5.4), (-7, 5.4)],
    "trapezium": [(-4, -6), (4, -6), (7, 6), (-7, 6)],
    "ellipse": [(7.2 * x / 6, 5.2 * y / 6) for x, y in CIRCLE],
    "arrow": [(-7, 0), (0, -7), (0, -3), (7, -3), (7, 3), (0, 3), (0, 7)],
    "crescent": [(x, y) for x, y in CIRCLE if x < 2] + [(-2.0, 3.0), (-3.0, 0.0), (-2.0, -3.0)],
    "heart": [(0, 7), (-7, -1), (-6, -5), (-3, -6), (0, -3), (3, -6), (6, -5), (7, -1)],
    "square that spins": lambda frame: regular(4, 7.2, 45 + 90 * frame / 16),
    "square, then circle": lambda frame: SQUARE if frame < 9 else CIRCLE,
    "circle, now and then a triangle": lambda frame: CIRCLE if frame % 5 else TRIANGLE,
}


@pytest.mark.parametrize("name", IMPOSTORS)
def test_impostors_are_none_of_the_shapes(name: str) -> None:
    for path in (to_left, lambda frame: (16.0, 22 - 0.6 * frame)):
        for found in find_shapes(drawn(IMPOSTORS[name], path)):
            assert found.shape in (None, AMBIGUOUS)


def test_a_colour_that_changes_is_ambiguous() -> None:
    (found,) = find_shapes(drawn(CIRCLE, colour=lambda frame: RED if frame < 12 else BLUE))
    assert (found.colour, found.shape) == (AMBIGUOUS, "circle")


def test_vocabulary_is_that_of_the_clips() -> None:
    assert set(SHAPES) == set(scenes.SHAPES)
    assert set(COLOURS) == set(scenes.COLOURS)
    assert set(DIRECTIONS) == set(scenes.DIRECTIONS)


def test_travel_is_measured_in_pixels(known: list[Known]) -> None:
    """Over 2 s at a known rate, within half a pixel."""
    for one in known[:24]:
        (shape,), (found,) = one.scene.shapes, find_shapes(one.video)
        expected = 2 * shape.rate * min(one.video.shape[1:3])
        assert np.abs(found.travel).max() == pytest.approx(expected, abs=0.5)


@pytest.mark.parametrize("background", [0, 128, 255])
def test_nothing_is_found_where_nothing_is(background: int) -> None:
    video = np.full((17, 32, 32, 3), background, np.uint8)
    assert find_shapes(video) == []
    assert find_shapes(noisy(video)) == []


def test_pure_colour_noise_is_no_shape() -> None:
    video = np.random.default_rng(0).integers(0, 256, (17, 32, 32, 3), dtype=np.uint8)
    assert all(found.shape is None or found.direction is None for found in find_shapes(video))


def test_a_still_shape_has_no_direction(known: list[Known]) -> None:
    still = np.repeat(known[0].video[:1], 17, axis=0)
    (found,) = find_shapes(still)
    assert found.direction is None
    assert found.shape == known[0].scene.shapes[0].shape


@pytest.mark.parametrize(
    "x_of",
    [
        lambda frame: 22 - 0.9 * frame if frame < 11 else 12.1 + 0.9 * (frame - 11),
        lambda frame: 22 - 1.2 * min(frame, 10),
        lambda frame: 10 + 0.8 * max(frame - 7, 0),
    ],
    ids=["there and half back", "stops", "starts late"],
)
def test_motion_that_does_not_last_has_no_direction(x_of: Callable[[int], float]) -> None:
    (found,) = find_shapes(drawn(CIRCLE, lambda frame: (x_of(frame), 16.0)))
    assert (found.shape, found.direction) == ("circle", None)
    assert abs(found.travel[0]) > 3


def test_reversing_a_video_reverses_its_direction(known: list[Known]) -> None:
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    for one in known[:24]:
        (found,) = find_shapes(one.video[::-1])
        assert found.direction == opposite[one.scene.shapes[0].direction]


def smear(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (np.abs(x) < 6) & (np.abs(y) < 3)


def ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (np.hypot(x, y) < 8) & (np.hypot(x, y) > 5)


@pytest.mark.parametrize("outline", [smear, ring])
def test_other_blobs_are_none_of_the_shapes(outline: Callable[..., np.ndarray]) -> None:
    video = np.full((17, 32, 32, 3), 128, np.uint8)
    rows, columns = np.mgrid[:32, :32]
    for frame in range(17):
        video[frame, outline(columns - 9 - frame * 0.7, rows - 15.5)] = (225, 30, 30)
    (found,) = find_shapes(video)
    assert (found.colour, found.shape, found.direction) == ("red", None, "right")


@pytest.mark.parametrize(("x", "cut"), [(16.0, False), (7.0, False), (4.0, True), (27.0, True)])
def test_a_shape_is_cut_once_it_crosses_the_border(x: float, cut: bool) -> None:
    video = drawn(regular(40, 6.4), lambda frame: (x, 16.0 - 0.2 * frame))
    assert is_cut(video) is cut
    assert is_cut(noisy(video)) is cut
    assert is_cut(blurred(video)) is cut
    assert not is_cut(np.full_like(video, 128))


def test_a_shape_almost_without_colour_is_not_found(known: list[Known]) -> None:
    faded = known[0].video.mean(axis=-1, keepdims=True) * 0.85 + known[0].video * 0.15
    assert find_shapes(faded.astype(np.uint8)) == []


def test_a_fringe_is_no_shape_of_its_own() -> None:
    """A faint rim of another colour, as chroma that bleeds leaves it."""
    video = np.full((17, 32, 32, 3), 16, np.uint8)
    rows, columns = np.mgrid[:32, :32]
    for frame in range(17):
        radius = np.hypot(columns - 9 - frame * 0.7, rows - 15.5)
        video[frame, radius < 7] = (110, 110, 16)
        video[frame, radius < 6] = (225, 16, 16)
    (found,) = find_shapes(video)
    assert (found.colour, found.shape, found.direction) == ("red", "circle", "right")


def test_frames_in_which_another_shape_hides_all_of_it_do_not_count() -> None:
    video = np.full((17, 32, 32, 3), 16, np.uint8)
    for frame in range(17):
        apart = max(0, frame - 3)  # two blue bars open before a red strip
        for left in (max(0, 8 - apart), min(26, 16 + apart)):
            video[frame, 8:24, left : left + 6] = (20, 20, 225)
        video[frame, 8:24, 14:16] = (225, 20, 20)
    with np.errstate(all="raise"):
        found = find_shapes(video)
    assert any(shape.colour == "red" for shape in found)
    assert all(np.isfinite([shape.area, *shape.travel]).all() for shape in found)


def test_shapes_of_one_colour_are_told_apart() -> None:
    rng = np.random.default_rng(1)
    both = draw([Triple("circle", "red", "left"), Triple("square", "blue", "left")], rng).video
    as_red = both.copy()
    blue = (both[..., 2] > both[..., 0].astype(int) + 40)[..., None]
    as_red = np.where(blue, both[..., ::-1], both)
    found = find_shapes(as_red)
    assert [shape.colour for shape in found] == ["red", "red"]
    assert {shape.shape for shape in found} == {"circle", "square"}


@pytest.mark.parametrize(
    "video",
    [
        np.zeros((17, 32, 32), np.uint8),
        np.zeros((17, 32, 32, 3), np.float32),
        np.zeros((1, 32, 32, 3), np.uint8),
    ],
)
def test_other_layouts_are_refused(video: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"must be uint8 \(frames >= 2, height, width, 3\)"):
        find_shapes(video)
