"""Sample the window and the caption of each repeat of a clip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from sora_lightning.data.manifest.records import ClipRecord


class Window(NamedTuple):
    """``position`` in [0, 1] is where the window begins between the first and the last one that the
    clip has room for.
    """

    position: float
    caption: str


_EMPTY = np.zeros(4, dtype=np.uint64)  # a buffer of Philox without numbers left
WindowSampler = Callable[[ClipRecord, int], Window]


@dataclass(frozen=True)
class RandomWindows:
    """Draw a position and a caption by (seed, clip, repeat) alone, whichever worker and rank
    asks.
    """

    seed: int
    _rng: np.random.Generator = field(
        default_factory=lambda: np.random.Generator(np.random.Philox(0)),
        init=False,
        repr=False,
        compare=False,
    )

    def __call__(self, record: ClipRecord, repeat: int) -> Window:
        rng = self._rng
        # Philox(key=..., counter=...) of its own takes three times as long: it asks for entropy.
        rng.bit_generator.state = {
            "bit_generator": "Philox",
            "state": {
                "counter": np.array([repeat, 0, 0, 0], dtype=np.uint64),
                "key": np.array([self.seed, int(record.clip_id, 16)], dtype=np.uint64),
            },
            "buffer": _EMPTY,
            "buffer_pos": len(_EMPTY),
            "has_uint32": 0,
            "uinteger": 0,
        }
        position = rng.random()
        if len(set(record.weights)) < 2:
            return Window(position, record.captions[rng.integers(len(record.captions))])
        return Window(position, record.captions[rng.choice(len(record.captions), p=record.weights)])


@dataclass(frozen=True)
class EvenWindows:
    """Take evenly placed windows one after the other, and the first caption. A single window is the
    middle of the clip.
    """

    num_windows: int

    def __call__(self, record: ClipRecord, repeat: int) -> Window:
        return Window((repeat + 0.5) / self.num_windows, record.captions[0])


@dataclass(frozen=True)
class FixedWindows:
    """Move sampled windows to the nearest of evenly placed ones, as a latent cache holds them."""

    sampler: WindowSampler
    num_windows: int

    def __call__(self, record: ClipRecord, repeat: int) -> Window:
        window = self.sampler(record, repeat)
        index = min(int(window.position * self.num_windows), self.num_windows - 1)
        return window._replace(position=(index + 0.5) / self.num_windows)
