"""Clips go to a size that they cover; frames are never scaled up and never distorted."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from sora_lightning.data import Buckets, ClipRecord, Removal, SizeFamily, VideoMetadata
from sora_lightning.data.batching.buckets import fit_frames, num_pixels
from sora_lightning.data.batching.size_assignment import assign_sizes
from sora_lightning.data.decoding.bad_clips import BadClips
from sora_lightning.types import VideoSize

SIZES = [VideoSize.parse(s) for s in ("17x32x32", "17x24x40", "17x40x24", "9x64x64", "1x48x48")]


def buckets(pixels_per_batch: int = 10**6) -> Buckets:
    return Buckets(SIZES, fps=8.0, pixels_per_batch=pixels_per_batch)


def test_a_clip_covers_the_size_it_goes_to() -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(500):
        frames, height, width = rng.integers([1, 16, 16], [120, 130, 130])
        metadata = VideoMetadata(int(frames), float(rng.uniform(4, 30)), int(height), int(width))
        size = buckets().nearest(metadata, metadata.duration_s)
        seen.add(size)
        if isinstance(size, VideoSize):
            assert metadata.height >= size.height
            assert metadata.width >= size.width
            assert size.num_frames == 1 or metadata.duration_s > (size.num_frames - 1) / 8
            assert size.num_frames == 1 or metadata.fps >= 8 * 0.95
    assert seen >= {*SIZES, Removal.TOO_SMALL}


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (VideoMetadata(40, 8, 60, 60), "17x32x32"),
        (VideoMetadata(40, 8, 48, 80), "17x24x40"),
        (VideoMetadata(40, 8, 80, 48), "17x40x24"),
        (VideoMetadata(10, 8, 90, 90), "9x64x64"),
        (VideoMetadata(17, 8, 32, 32), "17x32x32"),  # exactly long and large enough
        (VideoMetadata(1, 25, 60, 60), "1x48x48"),
        (VideoMetadata(100, 4, 60, 60), "1x48x48"),  # too slow for a video, but an image
        (VideoMetadata(40, 8, 23, 90), Removal.TOO_SMALL),
        (VideoMetadata(40, 8, 30, 30), Removal.TOO_SMALL),
        (VideoMetadata(8, 8, 40, 40), Removal.TOO_SHORT),
        (VideoMetadata(40, 7, 40, 40), Removal.TOO_SLOW),
        (VideoMetadata(70, 23.976, 40, 40), "17x32x32"),
    ],
)
def test_the_nearest_size_keeps_most_of_the_clip(metadata: VideoMetadata, expected: object) -> None:
    size = buckets().nearest(metadata, metadata.duration_s)
    assert size == expected if isinstance(expected, Removal) else str(size) == expected


def test_every_clip_is_assigned_or_counted_with_its_reason() -> None:
    footages = [
        VideoMetadata(40, 8, 60, 60),
        VideoMetadata(40, 8, 10, 60),
        VideoMetadata(2, 8, 40, 40),
    ]
    clips = [
        ClipRecord(Path(f"{i}.mp4"), ("x",), f"{i:016x}", metadata=metadata)
        for i, metadata in enumerate(footages)
    ]
    cut = ClipRecord(Path("cut.mp4"), ("x",), "f" * 16, 4.5, metadata=VideoMetadata(40, 8, 40, 40))
    assignment = assign_sizes([*clips, cut], buckets(), BadClips(None))
    assert assignment.num_clips == 1
    assert tuple(assignment.clips) == buckets().sizes
    assert assignment.removed == {
        Removal.TOO_SMALL: [clips[1]],
        Removal.TOO_SHORT: [clips[2], cut],
    }
    table = str(assignment)
    assert "1 clips as 17x32x32" in table
    assert f"2 left out: {Removal.TOO_SHORT.value}, e.g. 2.mp4" in table


def test_a_batch_fills_its_budget_and_does_not_pass_it() -> None:
    for size in SIZES:
        for budget in (num_pixels(SIZES[3]), 100_000, 10**6):
            clips = buckets(budget).batch_size(size)
            assert clips * num_pixels(size) <= budget < (clips + 1) * num_pixels(size)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pixels_per_batch = 17408: .* 36864, one clip of size 9"):
        buckets(17 * 32 * 32)
    with pytest.raises(ValueError, match="different sizes"):
        Buckets([SIZES[0], SIZES[0]], 8.0, 10**6)
    with pytest.raises(ValueError, match="sizes = "):
        Buckets([], 8.0, 10**6)
    with pytest.raises(ValueError, match="fps = 0"):
        Buckets(SIZES, 0, 10**6)


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (72, 120), (33, 200), (32, 32), (97, 61)])
def test_a_circle_stays_a_circle_in_the_middle(rows: int, columns: int) -> None:
    y, x = np.mgrid[:rows, :columns] + 0.5
    radius = 0.4 * min(rows, columns)
    disc = np.hypot(y - rows / 2, x - columns / 2) < radius
    frames = torch.from_numpy(np.repeat(np.uint8(255) * disc[None, ..., None], 3, axis=-1))
    video = fit_frames(frames, 32, 32)
    assert video.shape == (3, 1, 32, 32)
    inside = video[0, 0] > 0
    height, width = inside.any(1).sum().item(), inside.any(0).sum().item()
    expected = 2 * radius * 32 / min(rows, columns)
    assert abs(height - expected) <= 1
    assert abs(width - expected) <= 1
    rows_of, columns_of = torch.nonzero(inside, as_tuple=True)
    assert abs(rows_of.float().mean() - 15.5) < 0.75
    assert abs(columns_of.float().mean() - 15.5) < 0.75


def test_fine_stripes_become_grey_and_values_span_minus_one_to_one() -> None:
    stripes = torch.zeros(2, 128, 128, 3, dtype=torch.uint8)
    stripes[:, :, 1::4] = stripes[:, :, 2::4] = 255
    assert fit_frames(stripes, 32, 32).abs().max() < 0.15
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    exact = fit_frames(levels, 16, 16)
    torch.testing.assert_close(exact[0].flatten(), torch.linspace(-1, 1, 256))


def test_nothing_is_scaled_up() -> None:
    with pytest.raises(ValueError, match="31x64 do not cover 32x32"):
        fit_frames(torch.zeros(1, 31, 64, 3, dtype=torch.uint8), 32, 32)


@pytest.mark.parametrize("pixels", [256 * 256, 480 * 854, 40_000])
def test_a_family_fills_its_budget_at_each_ratio(pixels: int) -> None:
    ratios = {"16:9": 16 / 9, "1:1": 1.0, "9:16": 9 / 16, "2.39:1": 2.39}
    sizes = SizeFamily(pixels, [1, 17], list(ratios)).sizes()
    assert len(sizes) == len(set(sizes)) == 8
    for size, (frames, ratio) in zip(
        sizes, itertools.product([1, 17], ratios.values()), strict=True
    ):
        assert size.num_frames == frames
        assert size.height % 16 == size.width % 16 == 0
        assert size.height * size.width <= pixels < (size.height + 32) * (size.width + 32)
        assert size.width / size.height == pytest.approx(ratio, rel=0.2)
        taller, wider = (size.height + 16) * size.width, size.height * (size.width + 16)
        nearer = [
            abs(np.log(shape / ratio)) < abs(np.log(size.width / size.height / ratio))
            for shape, area in (
                (size.width / (size.height + 16), taller),
                ((size.width + 16) / size.height, wider),
            )
            if area <= pixels
        ]
        assert not any(nearer)


def test_shapes_that_fall_together_stand_once() -> None:
    assert SizeFamily(32 * 32, [5], ["1:1", "16:15"]).sizes() == [VideoSize(5, 32, 32)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((4096, [1], ["16x9"]), "'16x9' is no ratio"),
        ((4096, [1], ["16:0"]), "'16:0' is no ratio"),
        ((255, [1], ["1:1"]), "pixels_per_frame = 255: holds no frame of 1:1"),
        ((4096, [1], ["1:1"], 0), "multiple = 0"),
        ((4096, [0], ["1:1"]), "num_frames = 0"),
    ],
)
def test_families_that_cannot_be_are_refused(settings: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SizeFamily(*settings).sizes()
