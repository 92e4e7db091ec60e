"""torchcodec's frames are those asked for, or PyAV's; the reader names the missing package."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sora_lightning.data import DecodeError, PyAVReader, TorchCodecReader
from sora_lightning.data.decoding.timeline import read_timeline
from tests.data.barcodes import numbers_in
from tests.data.decoding.test_readers import CLOSED, STEADY
from tests.data.decoding.torchcodec_reader import torchcodec_parameter

READER = pytest.mark.parametrize("reader", [torchcodec_parameter()])


@READER
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_no_pixel_differs_from_pyav(
    reader: TorchCodecReader, rotation: int, barcodes: Callable[..., Path]
) -> None:
    path = barcodes("turned.mp4", STEADY, options=CLOSED, rotation=rotation)
    timeline = read_timeline(path)
    indices = [2, 30, 30, 59]
    by_pyav = PyAVReader().read(path, timeline, indices)
    np.testing.assert_array_equal(reader._read(path, timeline, indices), by_pyav)


@READER
def test_frames_of_other_times_or_another_count_are_thrown_away(
    reader: TorchCodecReader, barcodes: Callable[..., Path]
) -> None:
    path = barcodes("closed.mp4", STEADY, options=CLOSED)
    timeline = read_timeline(path)
    assert numbers_in(reader._read(path, timeline, [3, 40])) == [3, 40]
    later = replace(timeline, pts=timeline.pts + timeline.pts[1])
    with pytest.raises(DecodeError, match="other times"):
        reader._read(path, later, [3, 40])
    fewer = replace(timeline, pts=timeline.pts[:50], times_s=timeline.times_s[:50])
    with pytest.raises(DecodeError, match="60 frames, where the packets say 50"):
        reader._read(path, fewer, [3])


def test_without_torchcodec_the_reader_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torchcodec" else found(name)
    )
    with pytest.raises(ValueError, match=r"pip install 'sora-lightning\[torchcodec\]'"):
        TorchCodecReader()
