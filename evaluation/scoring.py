"""Which scores a protocol makes of what was found, under which names, in the report's order."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from einops import rearrange

from evaluation.features import Clip
from evaluation.findings import Findings
from evaluation.networks import Judges, score_name
from evaluation.protocol import ScoreSpec
from evaluation.scores import (
    Score,
    alignment_scores,
    clip_scores,
    consistency_scores,
    frechet_scores,
    motion_and_variety,
    tokenizer_scores,
)

Row = dict[str, Any]


def make_scores(
    judges: Judges, generated: Findings, real: Findings, spec: ScoreSpec
) -> tuple[dict[str, Score], list[Row]]:
    """Scores by name; and a row of findings for each generated video."""
    scores: dict[str, Score] = {}
    rows: list[Row] = [{} for _ in generated.prompts]
    if generated.seen is not None:
        scores |= alignment_scores(generated.seen, "")
        for row, one in zip(rows, generated.seen, strict=True):
            row |= {"found": [str(shape) for shape in one.found], **asdict(one.alignment)}
    names = score_name("fvd", judges.videos), score_name("kvd", judges.videos)
    scores |= frechet_scores(generated.features, real.features, spec, names)
    if judges.texts is not None:
        scores |= _text_scores(judges, generated, real, spec, rows)
    if judges.frames is not None:
        assert generated.frames is not None
        assert real.frames is not None
        names = score_name("fid", judges.frames), score_name("kid", judges.frames)
        fakes, reals = (rearrange(f, "n k d -> (n k) d") for f in (generated.frames, real.frames))
        scores |= frechet_scores(fakes, reals, spec, names, judges.frames_per_video)
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
