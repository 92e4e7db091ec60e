"""Damages files the way disks, networks and broken muxers do."""

from __future__ import annotations

import numpy as np


def spoiled(content: bytes, rng: np.random.Generator) -> bytes:
    """The content cut short, with bits flipped, or with bits flipped and a stretch taken out."""
    kind = rng.integers(4)
    if kind == 0:
        return content[: rng.integers(1, len(content))]
    damaged = bytearray(content)
    most_flips = 1000 if kind == 1 else 30
    for place in rng.integers(0, len(damaged), int(most_flips ** rng.random())):
        damaged[place] ^= 1 << int(rng.integers(8))
    if kind == 3:
        start = int(rng.integers(len(damaged)))
        del damaged[start : start + int(rng.integers(1, 2000))]
    return bytes(damaged)
