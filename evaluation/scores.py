"""Scores from features: each with its interval, a scale to read it on, and its meaning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from evaluation.distances import FeatureSets, frechet_scores
from evaluation.features import Clip
from evaluation.metrics.alignment import ATTRIBUTES, SHARES
from evaluation.metrics.intervals import bootstrap_interval, wilson_interval
from evaluation.metrics.motion import MOTION
from evaluation.metrics.neighbours import diversity, nearest, nearest_of_others
from evaluation.metrics.score import Score
from evaluation.networks import FeatureExtractors, score_name
from evaluation.protocol import ScoreSpec
from evaluation.video_features import Detections, VideoFeatures

Values = Float[np.ndarray, " n"]
Row = dict[str, Any]


def mean_score(values: Values, meaning: str, better: str, spec: ScoreSpec) -> Score:
    """Mean over videos with a bootstrap interval."""
    interval = bootstrap_interval(values, seed=spec.seed)
    return Score(float(values.mean()), len(values), meaning, better, *interval)


def clip_scores(
    name: str,
    embed_texts: Callable[[Sequence[str]], Float[Tensor, "b e"]],
    generated: VideoFeatures,
    reference: VideoFeatures,
    spec: ScoreSpec,
) -> tuple[dict[str, Score], Values]:
    """Return the CLIP score with its two references, and the score of each generated video.

    The references are real videos with their own captions, and with captions of others (chance
    level).
    """
    scores = _scores(embed_texts, generated, generated.prompts)
    real = _scores(embed_texts, reference, reference.prompts)
    shuffled = _scores(embed_texts, reference, _others(reference.prompts, spec.seed))

    by_name = {
        name: mean_score(
            scores,
            "100 times the cosine between a generated video and its prompt by the network in its "
            "name, mean over frames, not clamped.",
            "higher",
            spec,
        ),
        f"{name}/reference": mean_score(
            real,
            "CLIP score of real videos with their own captions: the value of a perfect model.",
            "",
            spec,
        ),
        f"{name}/shuffled": mean_score(
            shuffled,
            "CLIP score of real videos with captions of others: chance level.",
            "",
            spec,
        ),
    }
    return by_name, scores


def motion_and_variety(
    generated: VideoFeatures, reference: VideoFeatures, spec: ScoreSpec
) -> tuple[dict[str, Score], dict[str, Values]]:
    """Return scores of motion, diversity and nearest neighbours, and the values of each video."""
    meanings = {
        "flicker": "1 minus the mean change of a pixel between frames; 1 for a still video.",
        "proxy/dynamic_degree": "Share of pixels that change by 16 levels of 255 or more between "
        "frames. A proxy: not VBench's dynamic degree.",
        "proxy/motion_smoothness": "1 minus the mean difference of a frame from the mean of its "
        "neighbours; 1 for a still video. A proxy: not VBench's motion smoothness.",
    }
    scores: dict[str, Score] = {}
    values = dict(zip(MOTION, generated.motion.numpy().T, strict=True))
    values["nearest_ratio"] = nearest(generated.features, reference.features).ratio.numpy()
    real = dict(zip(MOTION, reference.motion.numpy().T, strict=True))
    real["nearest_ratio"] = nearest_of_others(reference.features).ratio.numpy()
    meanings["nearest_ratio"] = (
        "Ratio of the distances to the nearest and the second nearest real video, mean over "
        "videos: near 0 for copies. To detect memorisation, use the training videos as reference."
    )
    for prefix, columns in (("", values), ("reference/", real)):
        whose = "Real videos: " if prefix else ""
        for name, column in columns.items():
            scores[prefix + name] = mean_score(column, whose + meanings[name], "", spec)
    for video_features, prefix in ((generated, ""), (reference, "reference/")):
        meaning = "Mean distance between the features of two videos; 0 if all are equal."
        spread = float(diversity(video_features.features))
        scores[f"{prefix}diversity"] = Score(spread, len(video_features.features), meaning, "")
    return scores, values


def consistency_scores(
    name: str, generated: VideoFeatures, reference: VideoFeatures, spec: ScoreSpec
) -> tuple[dict[str, Score], Values]:
    """Return the consistency of frames by the network ``name``, and each video's value."""
    meanings = {
        "": "Mean cosine of successive frames by the network in its name; 1 for a still video, so "
        "read it with the dynamic degree.",
        "/with_first": "Mean cosine with the previous and the first frame, as in VBench.",
    }
    scores = {}
    for video_features, prefix in ((generated, ""), (reference, "reference/")):
        assert video_features.consistency is not None
        whose = "Real videos: " if prefix else ""
        for column, (form, meaning) in zip(
            video_features.consistency.numpy().T, meanings.items(), strict=True
        ):
            scores[f"{prefix}{name}{form}"] = mean_score(column, whose + meaning, "", spec)
    assert generated.consistency is not None
    return scores, generated.consistency[:, 0].numpy()


def _others(prompts: Sequence[str], seed: int) -> list[str]:
    """Replace each prompt by another video's, along one random cycle."""
    cycle = np.random.default_rng(seed).permutation(len(prompts))
    others = list(prompts)
    for place, following in zip(cycle, np.roll(cycle, 1), strict=True):
        others[place] = prompts[following]
    return others


def _scores(
    embed_texts: Callable[[Sequence[str]], Float[Tensor, "b e"]],
    video_features: VideoFeatures,
    texts: Sequence[str],
) -> Values:
    assert video_features.embeddings is not None
    return 100 * (video_features.embeddings * embed_texts(texts)).sum(dim=1).double().numpy()


_OF_WHAT = {
    "": "generated videos",
    "reference/": "real clips, which measures the shape detector itself",
    "reconstruction/": "real clips after the tokenizer: an upper bound for models that use it",
}
_WHAT = {
    "colour": "colours are those of the prompt",
    "direction": "shapes move as the prompt says",
    "shape": "shapes are clearly those of the prompt",
    "nearest_shape": "shapes are nearer to those of the prompt than to the two others (by chance a "
    "third)",
    "all": "colour, direction and shape are all right",
}


def alignment_scores(seen: Sequence[Detections], of: str) -> dict[str, Score]:
    """Return the shares of videos that match their prompts, with Wilson intervals.

    ``of`` is "" for generated videos, or a prefix of ``_OF_WHAT``. Prompts with one shape and with
    several are scored separately. A video with an additional shape does not match in any attribute.
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
        right = {name: [getattr(a, name) for a in chosen] for name in SHARES}
        right["all"] = [all(flags) for flags in zip(*map(right.get, ATTRIBUTES), strict=True)]
        for name, flags in right.items():
            meaning = f"Share of videos whose {_WHAT[name]}, over {prompts}; {_OF_WHAT[of]}."
            low, high = wilson_interval(sum(flags), len(flags))
            scores[f"{of}alignment/{kind}{name}"] = Score(
                sum(flags) / len(flags), len(flags), meaning, "" if of else "higher", low, high
            )
    unread = {
        "none": "a coloured blob that is none of the known shapes",
        "ambiguous": "a shape that matches two equally, or changes its form or colour",
    }
    found = [{part for f in one.found for part in (f.shape or "none", f.colour)} for one in seen]
    if not of:
        unread["extra_shapes"] = "a shape that the prompt does not mention"
        found = [
            parts | ({"extra_shapes"} if a.num_extra else set())
            for parts, a in zip(found, alignments, strict=True)
        ]
    unread["cut"] = "a shape partly out of view"
    for parts, one in zip(found, seen, strict=True):
        if one.cut:
            parts.add("cut")
    for name, what in unread.items():
        number, n = sum(name in parts for parts in found), len(found)
        counted = "" if name == "cut" else "they count as wrong; "
        meaning = f"Share of videos that show {what}; {counted}{_OF_WHAT[of]}."
        low, high = wilson_interval(number, n)
        better = "" if of else "lower"
        scores[f"{of}alignment/{name}"] = Score(number / n, n, meaning, better, low, high)
    return scores


def tokenizer_scores(
    fidelity: Float[Tensor, "n s"], perceptual: str | None, spec: ScoreSpec
) -> dict[str, Score]:
    """Return PSNR, SSIM and, given the name of a perceptual network, LPIPS of reconstructions."""
    meanings = {
        "psnr": ("Peak signal-to-noise ratio of reconstructed real clips, in dB", "higher"),
        "ssim": ("Structural similarity of reconstructed real clips, at most 1", "higher"),
    }
    if perceptual is not None:
        meaning = "LPIPS between real clips and their reconstructions, 0 for equal clips"
        meanings[f"lpips-{perceptual}"] = (meaning, "lower")
    return {
        f"tokenizer/{name}": mean_score(
            column, f"{meaning}; mean over frames and clips.", better, spec
        )
        for (name, (meaning, better)), column in zip(
            meanings.items(), fidelity.numpy().T, strict=True
        )
    }


def make_scores(
    extractors: FeatureExtractors,
    generated: VideoFeatures,
    real: VideoFeatures,
    spec: ScoreSpec,
    spare: VideoFeatures | None = None,
) -> tuple[dict[str, Score], list[Row]]:
    """Return the scores by name, and a row of values for each generated video.

    ``spare`` are features of additional real videos for the floors of distances.
    """
    scores: dict[str, Score] = {}
    rows: list[Row] = [{} for _ in generated.prompts]
    if generated.detections is not None:
        scores |= alignment_scores(generated.detections, "")
        for row, one in zip(rows, generated.detections, strict=True):
            row |= {"found": [str(shape) for shape in one.found], "cut": one.cut}
            row |= asdict(one.alignment)
    names = score_name("fvd", extractors.videos), score_name("kvd", extractors.videos)
    paired = _paired(generated.prompts, real.prompts)
    enough = not too_few(generated, real, spec)
    if enough:
        features = (generated.features, real.features, None if spare is None else spare.features)
        scores |= frechet_scores(FeatureSets(*features, paired=paired), spec, names)
    if extractors.texts is not None:
        scores |= _text_scores(extractors, generated, real, spec, rows)
    if extractors.frames is not None and enough:
        names = score_name("fid", extractors.frames), score_name("kid", extractors.frames)
        frames = (_frames(generated), _frames(real), None if spare is None else _frames(spare))
        sets = FeatureSets(*frames, extractors.frames_per_video, paired)
        scores |= frechet_scores(sets, spec, names)
    motion, values = motion_and_variety(generated, real, spec)
    for index, row in enumerate(rows):
        row |= {name: round(float(column[index]), 6) for name, column in values.items()}
    if real.fidelity is not None:
        network = extractors.perceptual.label if extractors.perceptual is not None else None
        scores |= tokenizer_scores(real.fidelity, network, spec)
    if real.detections is not None:
        scores |= alignment_scores(real.detections, "reference/")
    if real.reconstruction_detections is not None:
        scores |= alignment_scores(real.reconstruction_detections, "reconstruction/")
    return scores | motion, rows


def too_few(generated: VideoFeatures, real: VideoFeatures, spec: ScoreSpec) -> str:
    """Return why no distance is computed; "" if there are enough videos."""
    n, m = len(generated.prompts), len(real.prompts)
    if min(n, m) >= spec.least_videos:
        return ""
    return f"distances: need {spec.least_videos} videos on each side, and there are {n} and {m}"


def _frames(video_features: VideoFeatures) -> Float[Tensor, "m d"]:
    assert video_features.frames is not None
    return rearrange(video_features.frames, "n k d -> (n k) d")


def _paired(generated: Sequence[str], real: Sequence[str]) -> bool:
    """Return True if both lists have the same prompts up to the shorter length, and not only empty
    ones.
    """
    n = min(len(generated), len(real))
    return any(generated) and list(generated[:n]) == list(real[:n])


def _text_scores(
    extractors: FeatureExtractors,
    generated: VideoFeatures,
    real: VideoFeatures,
    spec: ScoreSpec,
    rows: list[Row],
) -> dict[str, Score]:
    assert extractors.texts is not None
    # Values depend on the network, so it is part of the name.
    network = extractors.texts.label.removeprefix("clip-")
    name = f"clip_score-{network}"
    scores, of_each = clip_scores(name, extractors.texts_embedded, generated, real, spec)
    columns = {name: of_each}
    if isinstance(extractors.texts, Clip):
        cut = extractors.texts.truncated(generated.prompts)
        scores[f"{name}/truncated"] = Score(
            sum(cut) / len(cut),
            len(cut),
            "Share of prompts longer than the network's context, beyond which text is ignored.",
            "",
        )
        name = f"clip_consistency-{network}"
        more, columns[name] = consistency_scores(name, generated, real, spec)
        scores |= more
    for index, row in enumerate(rows):
        row |= {key: round(float(column[index]), 4) for key, column in columns.items()}
    return scores
