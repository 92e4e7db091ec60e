"""Evaluation of videos, or of a checkpoint that samples them: load, features, scores, report."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch

from evaluation import vbench
from evaluation.checks import Request, check, read_generated, read_reference, read_spare
from evaluation.features.cache import FeatureCache
from evaluation.fingerprint import fingerprint, texts_sha256
from evaluation.inputs import SAMPLING_KEYS, CutClips, VideoEntry, dataset_sha256
from evaluation.metrics.score import Score
from evaluation.models.sample import describe_checkpoint, sample_videos, through_tokenizer
from evaluation.networks import FeatureExtractors, build_extractors
from evaluation.report.write import write_report
from evaluation.scores import make_scores, too_few
from evaluation.vbench import vbench_version
from evaluation.video_features import Reconstruct, VideoFeatures, extract_features

_PACKAGES = ("torch", "torchmetrics", "numpy", "scipy", "av")


def evaluate(request: Request) -> dict[str, Any]:
    """Sample videos if needed, score them, write the report, and return it.

    Raises ``ValueError`` naming the problem before any video is sampled or evaluated.
    """
    checkpoint = describe_checkpoint(request.checkpoint) if request.checkpoint else None
    protocol = request.protocol
    extractors = build_extractors(protocol, request.networks, request.device)
    reference, num_short = read_reference(request)
    check(request, reference, checkpoint["sha256"] if checkpoint else None, extractors)
    started = time.monotonic()
    if request.videos is None:
        sample_videos(request)
    entries = read_generated(request)
    clips, seed, alignment = protocol.clips, protocol.scores.seed, protocol.scores.alignment
    videos = CutClips(entries, clips, clips.generated_window, seed)
    prompts = [entry.prompt for entry in entries]
    generated = extract_features(videos, prompts, extractors, alignment, "generated videos")
    real_videos = CutClips(reference, clips, clips.reference_window, seed)
    reference_sha256 = dataset_sha256(reference)
    reconstruct = None
    if request.checkpoint is not None:
        reconstruct = through_tokenizer(request.checkpoint, request.device)
    real = _features_of_real(
        request, real_videos, reference_sha256, extractors, "real videos", alignment, reconstruct
    )
    spare = read_spare(request, len(entries), len(reference))
    others = None
    if spare:  # for floors alone
        spare_videos = CutClips(spare, clips, clips.reference_window, seed)
        sha256 = dataset_sha256(spare)
        others = _features_of_real(request, spare_videos, sha256, extractors, "further real videos")
    scores, rows = make_scores(extractors, generated, real, protocol.scores, others)
    if protocol.scores.vbench:
        scores |= _by_vbench(request, entries, rows)
    report = {
        "scores": {name: score.value for name, score in scores.items()},
        "details": {name: asdict(score) for name, score in scores.items()},
        **record(request, extractors, checkpoint, entries, reference, reference_sha256),
        "left_out": [reason] if (reason := too_few(generated, real, protocol.scores)) else [],
        "num_short_reference": num_short,
        "num_spare_reference": len(spare),
        "videos": [
            {"path": str(e.path), "prompt": e.prompt, **e.sampling, **row}
            for e, row in zip(entries, rows, strict=True)
        ],
        "seconds": round(time.monotonic() - started, 1),
    }
    paired = real_videos if protocol.reads_prompts and real.prompts == prompts else None
    write_report(report, videos, paired, clips.fps or _rate(entries[0]), request.output)
    torch.save(
        {"generated": generated.features.float(), "reference": real.features.float()},
        request.output / "features.pt",
    )
    return report


def _by_vbench(
    request: Request, entries: Sequence[VideoEntry], rows: list[dict[str, Any]]
) -> dict[str, Score]:
    spec = request.protocol.scores
    measured = vbench.measure(entries, spec.vbench, request.output / "vbench", request.device)
    scores, columns = vbench.as_scores(measured, spec)
    for index, row in enumerate(rows):
        row |= {name: column[index] for name, column in columns.items()}
    return scores


def _rate(entry: VideoEntry) -> float:
    times, end = entry.file.times()
    return len(times) / max(end - times[0], 1e-6) if entry.file.has_clock else 8.0


def _features_of_real(
    request: Request,
    videos: CutClips,
    sha256: str,
    extractors: FeatureExtractors,
    description: str,
    alignment: bool = False,
    reconstruct: Reconstruct | None = None,
) -> VideoFeatures:
    """Features of real videos; those for the distance are cached beside the report's folder."""
    settings = {
        "clips": request.protocol.settings()["clips"],
        "seed": request.protocol.scores.seed,
        "network": extractors.videos.record(),
    }
    folder = request.output.parent / "reference_features"
    cache = FeatureCache(folder, extractors.videos.label, sha256, settings)
    known = cache.read()
    prompts = [entry.prompt for entry in videos.entries]
    found = extract_features(
        videos, prompts, extractors, alignment, description, known, reconstruct
    )
    if known is None:
        cache.write(found.features)
    return found


def record(
    request: Request,
    extractors: FeatureExtractors,
    checkpoint: dict[str, Any] | None,
    entries: Sequence[VideoEntry],
    reference: Sequence[VideoEntry],
    reference_sha256: str,
) -> dict[str, Any]:
    """Return the part of the report that identifies the evaluation.

    ``settings`` holds everything that affects a score except the model; its hash is the
    fingerprint.
    """
    settings = request.protocol.settings()
    # The sampling recorded with the videos counts, not that of the protocol.
    settings["sampling"] = {
        key: sorted({_said(e, key) for e in entries}, key=_numbers_first)
        for key in ("seed", "num_steps", "guidance_scale", *_options(entries))
    }
    settings["networks"] = extractors.record()
    if request.protocol.scores.vbench:
        settings["networks"]["vbench"] = vbench_version()
    settings["extractor"] = settings["networks"]["videos"]
    settings["prompts_sha256"] = texts_sha256([e.prompt for e in entries])
    settings["reference_sha256"] = reference_sha256
    settings["num_videos"], settings["num_reference"] = len(entries), len(reference)
    return {
        "protocol": request.protocol.name,
        "fingerprint": fingerprint(settings),
        "settings": settings,
        "checkpoint": checkpoint,
        "networks": {
            "name": extractors.videos.label,
            "path": str(request.networks or ""),
            "sha256": extractors.videos.sha256,
            **extractors.notes,
        },
        "reference": str(request.reference),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in _PACKAGES},
        "device": request.device,
    }


def _said(entry: VideoEntry, key: str) -> float | str:
    return entry.sampling.get(key, "unknown" if key in SAMPLING_KEYS else "unset")


def _options(entries: Sequence[VideoEntry]) -> list[str]:
    """Names of all sampling options that are recorded for at least one video."""
    return sorted({key for e in entries for key in e.sampling} - set(SAMPLING_KEYS))


def _numbers_first(value: float | str) -> tuple[bool, float | str]:
    return isinstance(value, str), value
