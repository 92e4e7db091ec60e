"""The reader of pixels: right on rendered clips and on flawed ones, not fooled by wrong ones."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from evaluation.metrics.alignment import align, parse_prompt
from evaluation.metrics.shapes import COLOURS, DIRECTIONS, SHAPES, find_shapes
from sora_lightning.data.synthetic import scenes
from sora_lightning.data.synthetic.scenes import Triple
from tests.evaluation.conftest import Known, draw


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
    judged = [align(find_shapes(flaw(k.video)), parse_prompt(k.prompt)) for k in known]
    return np.mean([(one.colour, one.direction, one.shape) for one in judged], axis=0)


def test_rendered_clips_are_read_right(known: list[Known]) -> None:
    assert (part_right(known, lambda video: video) >= 0.99).all()


@pytest.mark.parametrize("flaw", [blurred, rounded, noisy, very_noisy, compressed, tinted])
def test_flawed_clips_are_read_right(
    known: list[Known], flaw: Callable[[np.ndarray], np.ndarray]
) -> None:
    assert (part_right(known, flaw) >= 0.97).all()


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
