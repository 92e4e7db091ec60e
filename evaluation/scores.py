"""Clips and prompts in, scores out: each with its interval, its scale and a sentence that says what
it means.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from evaluation.metrics.alignment import ATTRIBUTES, Alignment, align, parse_prompt
from evaluation.metrics.frechet import (
    distance_between_halves,
    frechet_distance,
    frechet_distance_at_infinity,
    frechet_distance_of_population,
    jackknife_interval,
)
from evaluation.metrics.intervals import bootstrap_interval, wilson_interval
from evaluation.metrics.kernel import kernel_distance
from evaluation.metrics.motion import MOTION, motion_scores
from evaluation.metrics.neighbours import diversity, nearest
from evaluation.metrics.reconstruction import psnr_per_clip, ssim_per_clip
from evaluation.metrics.shapes import FoundShape, find_shapes
from evaluation.protocol import ScoreSpec
from evaluation.videos import as_batch

Video = UInt8[np.ndarray, "F H W 3"]
BATCH = 16


@dataclass(frozen=True)
class Score:
    """A number, over how many videos, its 95 % interval where it has one, which way is better, what
    it means.
    """

    value: float
    n: int
    meaning: str
    better: str  # "higher", "lower", or "" for a number that only gives another one its scale
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Clips:
    """Videos of the protocol's frames, of any sizes, with a prompt each and what the networks make
    of each: features, those of some of its frames, and an embedding to compare with texts.
    """

    videos: list[Video]
    prompts: list[str]
    features: Float[Tensor, "n d"]
    frames: Float[Tensor, "n k d"] | None = None
    embeddings: Float[Tensor, "n e"] | None = None


@dataclass(frozen=True)
class Seen:
    """What pixels show of one video, and how that compares with its prompt."""

    found: list[FoundShape]
    alignment: Alignment


def frechet_scores(
    generated: Float[Tensor, "n d"],
    reference: Float[Tensor, "m d"],
    spec: ScoreSpec,
    names: tuple[str, str],
    rows_per_video: int = 1,
) -> dict[str, Score]:
    """The distance with its interval; what endlessly many videos would give; distance and floor
    that compare, at half the videos; and the kernel distance with its interval. ``names`` are those
    of the two distances.
    """
    fvd, kvd = names
    n = min(len(generated), len(reference))
    num_videos, half = n // rows_per_video, n // rows_per_video // 2
    few = ""
    if half * rows_per_video <= generated.shape[1]:
        few = " Fewer videos than features: mostly bias."
    of = frechet_distance if spec.covariance_ddof else frechet_distance_of_population
    settings: dict[str, Any] = {"seed": spec.seed, "rows_per_video": rows_per_video}
    with warnings.catch_warnings():
        # The report says it beside the score.
        warnings.simplefilter("ignore", UserWarning)
        value = float(of(generated, reference))
        groups = spec.jackknife_groups
        low, high = jackknife_interval(generated, reference, groups, distance=of, **settings)
        infinity = frechet_distance_at_infinity(generated, reference, distance=of, **settings)
        # Both sides are cut at the same places, so the two must be of one length.
        first, second = reference[:n], generated[:n]
        at_half = distance_between_halves(first, second, distance=of, **settings)
        floor = distance_between_halves(first, first, distance=of, **settings)
    kernel_low, kernel_high = jackknife_interval(
        generated, reference, groups, distance=kernel_distance, **settings
    )
    return {
        fvd: Score(
            value,
            num_videos,
            "Fréchet distance between generated and real videos by the features of the network in "
            f"its name, under this protocol alone.{few}",
            "lower",
            max(0.0, low),
            high,
        ),
        f"{fvd}/infinity": Score(
            infinity,
            num_videos,
            "What endlessly many videos would give, by a line through the distances of subsets of "
            "both sides.",
            "lower",
        ),
        f"{fvd}/half": Score(
            at_half,
            half,
            "The same with half the videos on each side and no prompt on both: to read beside "
            "the floor.",
            "lower",
        ),
        f"{fvd}/floor": Score(
            floor,
            half,
            "The same between two halves of the real videos: what remains when nothing differs. "
            "No model should be expected below it.",
            "",
        ),
        kvd: Score(
            float(kernel_distance(generated, reference)),
            num_videos,
            "Unbiased kernel distance by the same features: about 0 where nothing differs, at any "
            "number of videos, and then as often below as above.",
            "lower",
            kernel_low,
            kernel_high,
        ),
    }


def clip_scores(
    name: str,
    embed_texts: Callable[[Sequence[str]], Float[Tensor, "b e"]],
    generated: Clips,
    reference: Clips,
    spec: ScoreSpec,
) -> tuple[dict[str, Score], Float[np.ndarray, " n"]]:
    """The score with the two that give it a scale, and each generated video's own."""
    scores = _scores(embed_texts, generated, generated.prompts)
    real = _scores(embed_texts, reference, reference.prompts)
    shuffled = _scores(embed_texts, reference, _others(reference.prompts, spec.seed))

    def score(values: Float[np.ndarray, " n"], meaning: str, better: str) -> Score:
        low, high = bootstrap_interval(values, seed=spec.seed)
        return Score(float(values.mean()), len(values), meaning, better, low, high)

    by_name = {
        name: score(
            scores,
            "100 times the cosine between a generated video and its prompt by the network in its "
            "name, mean over frames; not clamped.",
            "higher",
        ),
        f"{name}/reference": score(
            real,
            "The same for real videos and their own captions: what a perfect model would get.",
            "",
        ),
        f"{name}/shuffled": score(
            shuffled,
            "The same for real videos and captions of others: what a model deaf to its prompt "
            "would get.",
            "",
        ),
    }
    return by_name, scores


def motion_and_variety(
    generated: Clips, reference: Clips, spec: ScoreSpec
) -> tuple[dict[str, Score], dict[str, Float[np.ndarray, " n"]]]:
    """How frames follow one another, how much videos differ from each other, how near each is to a
    real one; and each generated video's own values.
    """
    meanings = {
        "flicker": "1 less the mean change of a pixel from frame to frame; 1 for a still.",
        "proxy/dynamic_degree": "Part of pixels that change by 16 levels of 255 or more from frame "
        "to frame. A proxy: not VBench's dynamic degree.",
        "proxy/motion_smoothness": "1 less the mean difference of a frame from the mean of its "
        "neighbours; 1 for a still. A proxy: not VBench's motion smoothness.",
    }
    scores: dict[str, Score] = {}
    values: dict[str, Float[np.ndarray, " n"]] = {}
    for clips, prefix in ((generated, ""), (reference, "reference/")):
        rows = np.zeros((len(clips.videos), len(MOTION)))
        for indices in _same_size(clips.videos):
            rows[indices] = motion_scores(as_batch([clips.videos[i] for i in indices]))
        for name, column in zip(MOTION, rows.T, strict=True):
            interval = bootstrap_interval(column, seed=spec.seed)
            whose = "" if not prefix else "Of real videos: "
            text = whose + meanings[name]
            scores[prefix + name] = Score(float(column.mean()), len(column), text, "", *interval)
            values.setdefault(name, column)
    for clips, prefix in ((generated, ""), (reference, "reference/")):
        meaning = "Mean distance between features of two videos; 0 if all were one."
        spread = float(diversity(clips.features))
        scores[f"{prefix}diversity"] = Score(spread, len(clips.features), meaning, "")
    ratio = nearest(generated.features, reference.features).ratio.numpy()
    values["nearest_ratio"] = ratio
    scores["nearest_ratio"] = Score(
        float(ratio.mean()),
        len(ratio),
        "Distance to the nearest real video over that to the second nearest, mean over generated "
        "videos: near 0 for copies. Give the training's videos as reference to look for "
        "memorisation.",
        "",
        *bootstrap_interval(ratio, seed=spec.seed),
    )
    return scores, values


def _others(prompts: Sequence[str], seed: int) -> list[str]:
    """Each prompt replaced by another video's, along one random cycle."""
    cycle = np.random.default_rng(seed).permutation(len(prompts))
    others = list(prompts)
    for place, following in zip(cycle, np.roll(cycle, 1), strict=True):
        others[place] = prompts[following]
    return others


def _scores(
    embed_texts: Callable[[Sequence[str]], Float[Tensor, "b e"]],
    clips: Clips,
    texts: Sequence[str],
) -> Float[np.ndarray, " n"]:
    assert clips.embeddings is not None
    return 100 * (clips.embeddings * embed_texts(texts)).sum(dim=1).double().numpy()


@torch.no_grad()
def in_batches(
    function: Callable[[UInt8[Tensor, "b 3 F H W"]], Tensor],
    videos: Sequence[Video],
    description: str,
) -> list[Tensor]:
    """``function`` of each of the videos, which may be of several sizes, in their order."""
    results: dict[int, Tensor] = {}
    with tqdm(total=len(videos), desc=description, unit="video") as bar:
        for indices in _same_size(videos):
            results |= zip(indices, function(as_batch([videos[i] for i in indices])), strict=True)
            bar.update(len(indices))
    return [results[i] for i in range(len(videos))]


def _same_size(videos: Sequence[Video]) -> Iterator[list[int]]:
    """Places of videos that fit one batch."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for index, video in enumerate(videos):
        by_shape.setdefault(video.shape, []).append(index)
    for indices in by_shape.values():
        for start in range(0, len(indices), BATCH):
            yield indices[start : start + BATCH]


def look(clips: Clips, description: str) -> list[Seen]:
    """Find the shapes of every video and compare them with its prompt."""
    seen = []
    for video, prompt in zip(
        tqdm(clips.videos, desc=description, unit="video"), clips.prompts, strict=True
    ):
        found = find_shapes(video)
        seen.append(Seen(found, align(found, parse_prompt(prompt))))
    return seen


_OF_WHAT = {
    "": "generated videos",
    "reference/": "real clips, so that it measures the reader of pixels itself",
    "reconstruction/": "real clips after the tokenizer, which no model on it should exceed",
}
_WHAT = {
    "colour": "colours are those of the prompt",
    "direction": "shapes move as the prompt says",
    "shape": "shapes are those of the prompt",
    "all": "colour, direction and shape are all right",
}


def alignment_scores(seen: Sequence[Seen], of: str) -> dict[str, Score]:
    """Parts right, with Wilson intervals; ``of`` is "" for generated videos or a prefix of
    ``_OF_WHAT``.

    Prompts of one shape and of several are apart. A video with a shape that nobody asked for is
    wrong in everything.
    """
    scores = {}
    alignments = [one.alignment for one in seen]
    for kind, chosen in (
        ("", [a for a in alignments if a.num_expected == 1]),
        ("two_shapes/", [a for a in alignments if a.num_expected > 1]),
    ):
        if not chosen:
            continue
        prompts = "prompts of two shapes" if kind else "prompts of one shape"
        right = {name: [getattr(a, name) for a in chosen] for name in ATTRIBUTES}
        right["all"] = [all(flags) for flags in zip(*right.values(), strict=True)]
        for name, flags in right.items():
            meaning = f"Part of videos whose {_WHAT[name]}, over {prompts}; of {_OF_WHAT[of]}."
            low, high = wilson_interval(sum(flags), len(flags))
            scores[f"{of}alignment/{kind}{name}"] = Score(
                sum(flags) / len(flags), len(flags), meaning, "" if of else "higher", low, high
            )
    if not of:
        extra = [a.num_extra > 0 for a in alignments]
        scores["alignment/extra_shapes"] = Score(
            sum(extra) / len(extra),
            len(extra),
            "Part of videos that show a shape which the prompt does not name; they count as wrong "
            "in everything.",
            "lower",
            *wilson_interval(sum(extra), len(extra)),
        )
    return scores


def tokenizer_scores(
    videos: Sequence[Video], reconstructed: Sequence[Video], spec: ScoreSpec
) -> dict[str, Score]:
    """PSNR and SSIM of what the tokenizer makes of the real clips."""
    values = np.zeros((len(videos), 2))
    for indices in _same_size(videos):
        real, other = (as_batch([side[i] for i in indices]) for side in (videos, reconstructed))
        values[indices, 0], values[indices, 1] = (
            psnr_per_clip(real, other),
            ssim_per_clip(real, other),
        )
    meanings = {
        "tokenizer/psnr": "Peak signal to noise of real clips after the tokenizer, in dB; "
        "mean over frames, then clips.",
        "tokenizer/ssim": "Structural similarity of real clips after the tokenizer, at most 1; "
        "mean over frames, then clips.",
    }
    return {
        name: Score(
            float(column.mean()),
            len(column),
            meaning,
            "higher",
            *bootstrap_interval(column, seed=spec.seed),
        )
        for (name, meaning), column in zip(meanings.items(), values.T, strict=True)
    }
