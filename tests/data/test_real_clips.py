"""The clips of the folder beside the repository: many codecs and sizes, and what a crawl brings."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from sora_lightning.data import DecodeError, PyAVReader
from sora_lightning.data.decoding.readers import default_reader, probe
from sora_lightning.data.decoding.timeline import read_timeline
from tests.data.modules import data_module

CLIPS = Path(__file__).resolve().parents[2] / "../shared/clips"
if not CLIPS.is_dir():
    pytest.skip(f"the clips are not here: {CLIPS}", allow_module_level=True)

FILES = sorted((CLIPS / "train").iterdir())
UNREADABLE = {"audio_only.mp4", "text.mp4", "truncated.mp4", "zero_bytes.mp4"}
# 10-bit video is brought to 8 bits by FFmpeg 4 in decord and by FFmpeg 8 in PyAV: the mean
# difference in levels of 255. Eight-bit video is the same to the bit.
LARGEST_MEAN_DIFFERENCE = {"h264_10bits.mp4": 4.0}


def sequential(path: Path) -> tuple[int, dict[int, np.ndarray]]:
    """How many frames a decode from first to last gives, and a few of them, on a grid of pixels."""
    with av.open(str(path)) as container:
        total = sum(1 for _ in container.decode(container.streams.best("video")))
    chosen = set(np.random.default_rng(0).integers(0, total, 12).tolist())
    images = {}
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(container.streams.best("video"))):
            if number in chosen:
                image = np.rot90(frame.to_ndarray(format="rgb24"), int(frame.rotation) // 90 % 4)
                images[number] = image[::8, ::8].astype(int)
    return total, images


def assert_same_frames(path: Path, bound: float = 0.0) -> None:
    timeline, (total, expected) = read_timeline(path), sequential(path)
    assert len(timeline) == total
    early, late = sorted(expected)[::2], sorted(expected)[1::2]
    for reader in (PyAVReader(), default_reader()):
        for indices in filter(None, (early, late)):
            frames = reader.read(path, timeline, indices)[:, ::8, ::8].astype(int)
            assert np.abs(frames - np.stack([expected[i] for i in indices])).mean() <= bound


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_random_access_equals_a_sequential_decode(path: Path) -> None:
    assert_same_frames(path, LARGEST_MEAN_DIFFERENCE.get(path.name, 0.0))


@pytest.mark.parametrize("path", sorted((CLIPS / "hostile").iterdir()), ids=lambda p: p.name)
def test_hostile_files_decode_rightly_or_are_refused(path: Path) -> None:
    if path.name in UNREADABLE:
        with pytest.raises(DecodeError, match=path.name):
            probe(path)
        return
    timeline = read_timeline(path)
    assert probe(path).num_frames == len(timeline)
    if path.name == "corrupted.mp4":
        with pytest.raises(DecodeError, match=path.name):
            default_reader().read(path, timeline, [len(timeline) - 1])
        return
    assert_same_frames(path)


def test_every_real_clip_has_a_place_and_comes_out_as_a_batch() -> None:
    sizes = ["9x64x64", "9x48x80", "5x64x64"]
    data = data_module(CLIPS / "captions.jsonl", sizes, fps=8.0, pixels_per_batch=2 * 9 * 64 * 64)
    assignment = data.check()[CLIPS / "captions.jsonl"]
    assert assignment.num_clips + assignment.num_removed == len(FILES)
    assert assignment.num_clips >= len(FILES) - 2, str(assignment)
    data.setup("fit")
    for batch in data.train_dataloader():
        assert batch.video.std() > 0.05
        assert batch.video.abs().max() <= 1
