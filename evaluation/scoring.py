"""Which scores a protocol makes of what was found, under which names, in the report's order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from evaluation.distances import FeatureSets, frechet_scores
from evaluation.features import Clip
from evaluation.features.networks import Judges, score_name
from evaluation.findings import Findings
from evaluation.protocol import ScoreSpec
from evaluation.scores import (
    Score,
    alignment_scores,
    clip_scores,
    consistency_scores,
    motion_and_variety,
    tokenizer_scores,
)

Row = dict[str, Any]


def make_scores(
    judges: Judges,
    generated: Findings,
    real: Findings,
    spec: ScoreSpec,
    spare: Findings | None = None,
) -> tuple[dict[str, Score], list[Row]]:
    """Scores by name; and a row of findings for each generated video. ``spare`` are further real
    videos, for the floors of distances.
    """
    scores: dict[str, Score] = {}
    rows: list[Row] = [{} for _ in generated.prompts]
    if generated.seen is not None:
        scores |= alignment_scores(generated.seen, "")
        for row, one in zip(rows, generated.seen, strict=True):
            row |= {"found": [str(shape) for shape in one.found], **asdict(one.alignment)}
    names = score_name("fvd", judges.videos), score_name("kvd", judges.videos)
    paired = _paired(generated.prompts, real.prompts)
    enough = not too_few(generated, real, spec)
    if enough:
        features = (generated.features, real.features, None if spare is None else spare.features)
        scores |= frechet_scores(FeatureSets(*features, paired=paired), spec, names)
    if judges.texts is not None:
        scores |= _text_scores(judges, generated, real, spec, rows)
    if judges.frames is not None and enough:
        names = score_name("fid", judges.frames), score_name("kid", judges.frames)
        frames = (_frames(generated), _frames(real), None if spare is None else _frames(spare))
        sets = FeatureSets(*frames, judges.frames_per_video, paired)
        scores |= frechet_scores(sets, spec, names)
    motion, values = motion_and_variety(generated, real, spec)
    for index, row in enumerate(rows):
        row |= {name: round(float(column[index]), 6) for name, column in values.items()}
    if real.fidelity is not None:
        network = judges.perceptual.label if judges.perceptual is not None else None
        scores |= tokenizer_scores(real.fidelity, network, spec)
    if real.seen is not None:
        scores |= alignment_scores(real.seen, "reference/")
    if real.seen_again is not None:
        scores |= alignment_scores(real.seen_again, "reconstruction/")
    return scores | motion, rows


def too_few(generated: Findings, real: Findings, spec: ScoreSpec) -> str:
    """Why no distance is computed; "" where there are videos enough."""
    n, m = len(generated.prompts), len(real.prompts)
    if min(n, m) >= spec.least_videos:
        return ""
    return f"distances: need {spec.least_videos} videos on each side, and there are {n} and {m}"


def _frames(findings: Findings) -> Float[Tensor, "m d"]:
    assert findings.frames is not None
    return rearrange(findings.frames, "n k d -> (n k) d")


def _paired(generated: Sequence[str], real: Sequence[str]) -> bool:
    """Whether both have the same prompts, as far as both go, and not none."""
    n = min(len(generated), len(real))
    return any(generated) and list(generated[:n]) == list(real[:n])


def _text_scores(
    judges: Judges, generated: Findings, real: Findings, spec: ScoreSpec, rows: list[Row]
) -> dict[str, Score]:
    assert judges.texts is not None
    # The network is part of what the score means.
    network = judges.texts.label.removeprefix("clip-")
    name = f"clip_score-{network}"
    scores, of_each = clip_scores(name, judges.texts_embedded, generated, real, spec)
    columns = {name: of_each}
    if isinstance(judges.texts, Clip):
        cut = judges.texts.truncated(generated.prompts)
        scores[f"{name}/truncated"] = Score(
            sum(cut) / len(cut),
            len(cut),
            "Part of prompts longer than the network reads; what it cannot read does not count.",
            "",
        )
        name = f"clip_consistency-{network}"
        more, columns[name] = consistency_scores(name, generated, real, spec)
        scores |= more
    for index, row in enumerate(rows):
        row |= {key: round(float(column[index]), 4) for key, column in columns.items()}
    return scores
