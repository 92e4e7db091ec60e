"""A synthetic mixture of clips like a crawl's: images and videos of many sizes, aspect
ratios and lengths, two stages of resolution.
"""

from __future__ import annotations

import numpy as np

TOKENS = 65536
LARGEST_AREA = 480 * 854


def mixture(num_clips: int, seed: int) -> np.ndarray:
    """Token grids ``n 3`` of latents compressed 4 x 8 x 8 and cut into patches of 1 x 2 x 2."""
    rng = np.random.default_rng(seed)
    short = rng.choice([360, 480, 720, 1080], num_clips, p=[0.1, 0.25, 0.4, 0.25])
    ratios = [16 / 9, 9 / 16, 1.0, 4 / 3, 3 / 4, 21 / 9]
    ratio = rng.choice(ratios, num_clips, p=[0.55, 0.2, 0.08, 0.07, 0.05, 0.05])
    duration_s = np.clip(np.exp(rng.normal(np.log(5.5), 0.6, num_clips)), 0.6, 30)
    height, width = short * np.maximum(1, 1 / ratio), short * np.maximum(1, ratio)
    area = rng.choice([256 * 256, LARGEST_AREA], num_clips, p=[0.4, 0.6])
    scale = np.minimum(1, np.sqrt(area / (height * width)))
    frames = np.minimum(31, (np.floor(duration_s * 16) - 1) // 4 + 1)
    frames = np.where(rng.random(num_clips) < 0.3, 1, frames)
    sides = [np.maximum(1, side * scale // 16) for side in (height, width)]
    return np.stack([frames, *sides], axis=1).astype(np.int64)
