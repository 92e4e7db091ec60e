"""However many videos are evaluated, only a few of them are in memory at once."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import evaluation.inputs
from evaluation.__main__ import main
from evaluation.inputs import BATCH, DECODED_AHEAD, CutClips, Video, look_through

SHAPES = ((4, 8, 8), (4, 6, 10), (4, 10, 6))


class Alive:
    """Counts videos that something still refers to, and how many there ever were at once."""

    def __init__(self) -> None:
        self.now = self.most = self.ever = 0

    def watch(self, video: Video) -> Video:
        self.now += 1
        self.ever += 1
        self.most = max(self.most, self.now)
        weakref.finalize(video, self._gone)
        return video

    def _gone(self) -> None:
        self.now -= 1


class Rendered:
    """Videos of several sizes whose levels are their places."""

    def __init__(self, number: int, shapes: Sequence[tuple[int, ...]] = SHAPES) -> None:
        self.number, self.shapes, self.alive = number, shapes, Alive()

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, place: int) -> Video:
        shape = self.shapes[place % len(self.shapes)]
        return self.alive.watch(np.full((*shape, 3), place % 256, np.uint8))


def mean_and_place(batch: Tensor, places: list[int]) -> dict[str, Sequence[Any]]:
    return {"mean": batch.float().mean(dim=(1, 2, 3, 4)), "place": places}


@pytest.mark.parametrize("number", [1, 50, 300])
def test_rows_come_in_the_order_of_the_videos(number: int) -> None:
    rows = look_through(Rendered(number), mean_and_place, "look")
    assert rows["place"] == list(range(number))
    assert torch.stack(rows["mean"]).tolist() == [float(i % 256) for i in range(number)]


def test_memory_does_not_grow_with_the_number_of_videos() -> None:
    most = []
    for number in (100, 1000):
        videos = Rendered(number)
        look_through(videos, mean_and_place, "look")
        most.append(videos.alive.most)
        assert videos.alive.ever == number
    assert max(most) <= BATCH * len(SHAPES) + DECODED_AHEAD + 1


def test_videos_of_a_hundred_sizes_do_not_wait_for_one_another() -> None:
    videos = Rendered(500, shapes=[(4, 8, 8 + i) for i in range(100)])
    rows = look_through(videos, mean_and_place, "look")
    assert rows["place"] == list(range(500))
    assert videos.alive.most <= 4 * BATCH + DECODED_AHEAD + 1


def test_a_whole_evaluation_holds_a_few_videos_at_once(
    samples: Path,
    dataset: dict[str, Path],
    networks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the first network to the page with its images: of 2 x 20 videos, in batches of 2."""
    alive, cut = Alive(), CutClips.__getitem__
    monkeypatch.setattr(CutClips, "__getitem__", lambda self, i: alive.watch(cut(self, i)))
    monkeypatch.setattr(evaluation.inputs, "BATCH", 2)
    places = [
        "--reference",
        dataset["test"],
        "--networks",
        networks,
        "--output",
        tmp_path / "report",
    ]
    assert main([str(part) for part in [*places, "--videos", samples]]) == 0
    assert alive.ever >= 40
    assert alive.most <= 2 * 3 + 2 + DECODED_AHEAD
