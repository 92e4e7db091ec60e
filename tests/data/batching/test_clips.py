"""A window of a clip holds the frames of its times, and its place is drawn or evenly spaced."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange

from sora_lightning.data import ClipRecord, DecodeError, PyAVReader, read_manifest
from sora_lightning.data.batching.clip_reader import ClipReader
from sora_lightning.data.batching.windows import EvenWindows, RandomWindows
from sora_lightning.data.manifest.index import index
from sora_lightning.types import VideoSize
from tests.data.barcodes import BITS, ROWS, STRIPE, numbers_in

SIZE = VideoSize(5, ROWS, BITS * STRIPE)


def record(path: Path, **window: float) -> ClipRecord:
    return ClipRecord(path, ("one", "two", "three"), "0123456789abcdef", **window)


def numbers_read(one: ClipRecord, fps: float, window: float) -> list[int]:
    video = ClipReader(PyAVReader(), fps).read(one, SIZE, window)
    return numbers_in(rearrange((video.numpy() + 1) * 127.5, "c F H W -> F H W c"))


@pytest.fixture
def second_long(barcodes: Callable[..., Path]) -> Path:
    """61 frames at 25 frames per second."""
    return barcodes("long.mp4", list(range(0, 61 * 40, 40)))


def test_a_window_moves_from_the_first_frame_to_the_last(second_long: Path) -> None:
    one = record(second_long)
    assert numbers_read(one, 25.0, 0.0) == [0, 1, 2, 3, 4]
    assert numbers_read(one, 25.0, 1.0) == [56, 57, 58, 59, 60]
    assert numbers_read(one, 5.0, 0.0) == [0, 5, 10, 15, 20]
    assert numbers_read(one, 5.0, 0.5) == [20, 25, 30, 35, 40]
    assert numbers_read(one, 5.0, 1.0) == [40, 45, 50, 55, 60]


def test_a_record_can_be_a_part_of_its_file(second_long: Path) -> None:
    part = record(second_long, start_s=0.4, end_s=2.0)
    assert numbers_read(part, 5.0, 0.0) == [10, 15, 20, 25, 30]
    assert max(numbers_read(part, 5.0, 1.0)) <= 50
    with pytest.raises(DecodeError, match=r"long.mp4: 0.400 s are too short for 5x64x128"):
        numbers_read(record(second_long, start_s=1.0, end_s=1.4), 5.0, 0.0)


def test_even_windows_are_evenly_spaced_about_the_middle() -> None:
    one = record(Path("a.mp4"))
    assert EvenWindows(1)(one, 0) == (0.5, "one")
    windows = [EvenWindows(4)(one, repeat).position for repeat in range(4)]
    np.testing.assert_allclose(windows, [0.125, 0.375, 0.625, 0.875])


def test_random_windows_and_wordings_are_spread_and_depend_on_seed_clip_and_turn() -> None:
    one, other = record(Path("a.mp4")), ClipRecord(Path("b.mp4"), ("one", "two", "three"), "f" * 16)
    sampler, key = RandomWindows(0), np.array([0, int(one.clip_id, 16)], dtype=np.uint64)
    drawn = [sampler(one, repeat) for repeat in range(600)]
    assert [RandomWindows(0)(one, repeat) for repeat in range(600)] == drawn
    for repeat, window in enumerate(drawn):
        rng = np.random.Generator(np.random.Philox(key=key, counter=repeat))
        assert window == (rng.random(), one.captions[rng.integers(3)])
    for changed in (RandomWindows(1)(one, 0), RandomWindows(0)(other, 0), RandomWindows(0)(one, 1)):
        assert changed.position != drawn[0].position
    counts, _ = np.histogram([window.position for window in drawn], bins=6, range=(0, 1))
    assert counts.min() > 60
    for wording in one.captions:
        assert sum(choice.caption == wording for choice in drawn) > 130


def test_a_file_that_changed_after_it_was_indexed_is_refused(
    barcodes: Callable[..., Path], tmp_path: Path
) -> None:
    """A changed bit and a changed length are both noticed. A new time does not matter, nor that
    the reader has read the file before."""
    path = barcodes("a.mp4", list(range(0, 60 * 40, 40)))
    (tmp_path / "raw.jsonl").write_text(json.dumps({"path": "a.mp4", "caption": "x"}))
    index(tmp_path / "raw.jsonl", tmp_path / "clips.jsonl")
    (indexed,) = read_manifest(tmp_path / "clips.jsonl")
    reader, size = ClipReader(PyAVReader(), 8.0), VideoSize(9, 64, 128)
    shown = reader.read(indexed, size, 0.5)
    content, state = path.read_bytes(), path.stat()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for changed in (bytes(flipped), content + b"x"):
        path.write_bytes(changed)
        if len(changed) > len(content):
            os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
        for one in (reader, ClipReader(PyAVReader(), 8.0)):
            with pytest.raises(DecodeError, match=r"a\.mp4: has changed since it was indexed"):
                one.read(indexed, size, 0.5)
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    assert torch.equal(reader.read(indexed, size, 0.5), shown)
