"""The clips that a protocol cuts out of videos, and a way through them that holds no more than a
few in memory at once, however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from tqdm import tqdm

from evaluation.inputs import Video, VideoEntry, as_batch, cover, nearest_size, read_video
from evaluation.protocol import ClipSpec

BATCH = 16
# Clips that wait for others of their size, at most.
_WAITING = 4

Look = Callable[[UInt8[Tensor, "b 3 F H W"], list[int]], Mapping[str, Sequence[Any]]]


class Videos(Protocol):
    """A list of videos, or what decodes them as they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int, /) -> Video: ...


class CutClips:
    """The clip of each entry, at the size of the protocol nearest to its proportions; decoded anew
    each time it is asked for.

    ``window`` is one of ``WINDOWS``; a random one is drawn by ``seed`` and the entry's place.
    """

    def __init__(
        self, entries: Sequence[VideoEntry], clips: ClipSpec, window: str, seed: int
    ) -> None:
        self.entries, self.clips, self.window, self.seed = entries, clips, window, seed

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, place: int) -> Video:
        draw = 0.5
        if self.window == "random":
            draw = float(np.random.default_rng([self.seed, place]).random())
        clips, file = self.clips, self.entries[place].file
        video = read_video(file, clips.num_frames, clips.fps, self.window, draw)
        return cover(video, *nearest_size(video.shape[1:3], clips.heights_and_widths))


@torch.no_grad()
def look_through(videos: Videos, look: Look, description: str) -> dict[str, list[Any]]:
    """What ``look`` finds in each video, by name and in the order of the videos.

    ``look`` is given batches of one size and the places of their videos, and gives a row for each
    of them under each name.
    """
    rows: dict[str, dict[int, Any]] = {}
    with tqdm(total=len(videos), desc=description, unit="video") as bar:
        for places, batch in _batches(videos):
            for name, values in look(batch, places).items():
                rows.setdefault(name, {}).update(zip(places, values, strict=True))
            bar.update(len(places))
    return {name: [found[i] for i in range(len(videos))] for name, found in rows.items()}


def _batches(videos: Videos) -> Iterator[tuple[list[int], UInt8[Tensor, "b 3 F H W"]]]:
    waiting: dict[tuple[int, ...], dict[int, Video]] = {}
    for place in range(len(videos)):
        video = videos[place]
        waiting.setdefault(video.shape, {})[place] = video
        fullest = max(waiting.values(), key=len)
        if len(fullest) == BATCH or sum(map(len, waiting.values())) == _WAITING * BATCH:
            places, batch = list(fullest), as_batch(list(fullest.values()))
            fullest.clear()
            yield places, batch
    for left in waiting.values():
        if left:
            yield list(left), as_batch(list(left.values()))
