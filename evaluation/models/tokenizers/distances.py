"""Distances between reconstructed and real clips, and their means over clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from evaluation.metrics.intervals import bootstrap_interval
from evaluation.metrics.motion import flicker
from evaluation.metrics.reconstruction import psnr_per_clip, ssim_per_clip
from evaluation.scores import Score
from sora_lightning.tokenizers import PerceptualDistance

Video = UInt8[np.ndarray, "F H W 3"]
Columns = dict[str, Float[np.ndarray, " n"]]
OURS = "tokenizer"
# The smallest side for SSIM's window, and the smallest number of frames for flicker.
_LEAST_FRAMES = 2
_MEANINGS = {
    "psnr": ("Peak signal to noise in dB; mean over frames, then clips.", "higher"),
    "ssim": ("Structural similarity, at most 1; mean over frames, then clips.", "higher"),
    "flicker": (
        "1 less the mean absolute change from frame to frame. Nearest to that of the real clips "
        "(reference/flicker) is best.",
        "",
    ),
    "flicker_error": (
        "Mean absolute difference between the changes from frame to frame and those of the real "
        "clip, in 0..1: what moves that should not, and what should and does not.",
        "lower",
    ),
    "lpips": ("LPIPS by VGG-16; mean over frames, then clips.", "lower"),
}


def flicker_error(
    real: UInt8[Tensor, "b 3 F H W"], other: UInt8[Tensor, "b 3 F H W"]
) -> Float[Tensor, " b"]:
    """Mean absolute error of the differences between successive frames, in 0..1.

    A constant error does not count.
    """
    error = (other.double() - real.double()).diff(dim=2)
    return error.abs().flatten(1).mean(dim=1) / 255


@torch.no_grad()
def distances(
    real: Sequence[Video], other: Sequence[Video], network: PerceptualDistance | None
) -> Columns:
    """Return the distances of each clip by name; NaN if a clip is too short for one.

    Raises ``ValueError`` for frames too small for SSIM.
    """
    rows = []
    for video, rebuilt in zip(real, other, strict=True):
        x, y = _batch(video), _batch(rebuilt)
        row = {"psnr": psnr_per_clip(x, y), "ssim": ssim_per_clip(x, y)}
        moves = len(video) >= _LEAST_FRAMES
        row["flicker"] = flicker(y) if moves else torch.tensor([torch.nan])
        row["flicker_error"] = flicker_error(x, y) if moves else torch.tensor([torch.nan])
        if network is not None:
            row["lpips"] = network(*(v.float() / 127.5 - 1 for v in (y, x)))
        rows.append({name: float(value) for name, value in row.items()})
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def summary(values: Mapping[str, Columns], sizes: Sequence[str], seed: int) -> dict[str, Score]:
    """Return means over clips as scores.

    They are named ``way/distance`` over all clips and ``way/distance/size`` over clips of one size.
    The gain of the tokenizer's PSNR over each other way is computed clip by clip.
    """
    scores = {}
    for way, columns in values.items():
        for name, column in columns.items():
            meaning, better = _MEANINGS[name]
            scores[f"{way}/{name}"] = _mean(column, meaning, better if way == OURS else "", seed)
    for size in sorted(set(sizes)):
        chosen = np.array([own == size for own in sizes])
        for way, columns in values.items():
            for name in ("psnr", "ssim", "flicker_error"):
                if name in columns:
                    meaning = f"Only clips of {size}."
                    scores[f"{way}/{name}/{size}"] = _mean(columns[name][chosen], meaning, "", seed)
    for way in values:
        if "psnr" in values[way] and way != OURS:
            gain = values[OURS]["psnr"] - values[way]["psnr"]
            name, text = f"{OURS}/gain_over_{way}", f"PSNR minus that of {way}, in dB"
            scores[name] = _mean(gain, f"{text}; mean over clips.", "higher", seed)
            for size in sorted(set(sizes)):
                chosen = np.array([own == size for own in sizes])
                meaning = f"{text}; mean over clips of {size}."
                scores[f"{name}/{size}"] = _mean(gain[chosen], meaning, "higher", seed)
    return scores


def _mean(values: Float[np.ndarray, " n"], meaning: str, better: str, seed: int) -> Score:
    counted = values[~np.isnan(values)]
    if not len(counted):
        return Score(0.0, 0, f"{meaning} No clip is long enough.", better)
    low, high = bootstrap_interval(counted, seed=seed)
    return Score(float(counted.mean()), len(counted), meaning, better, low, high)


def _batch(video: Video) -> UInt8[Tensor, "1 3 F H W"]:
    return rearrange(torch.from_numpy(video), "F H W c -> 1 c F H W")
