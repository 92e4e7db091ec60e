"""From a checkpoint or a folder of videos to a report: beside ``tasks`` the one file of the judge
that imports the library.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from evaluation import vbench
from evaluation.clips import CutClips
from evaluation.features.cache import FeatureCache
from evaluation.features.networks import Judges, build_judges
from evaluation.findings import Findings, Reconstruct, find
from evaluation.inputs import VideoEntry
from evaluation.record import dataset_sha256, record
from evaluation.report.write import write_report
from evaluation.request import Request, check, read_generated, read_reference, read_spare
from evaluation.scores import Score
from evaluation.scoring import make_scores, too_few
from sora_lightning.checkpoints import load_tokenizer, read_checkpoint
from sora_lightning.cli.sample import Request as SampleRequest
from sora_lightning.cli.sample import sample
from sora_lightning.files import file_sha256
from sora_lightning.generation import GuidanceConfig, SamplingConfig
from sora_lightning.types import as_levels


def evaluate(request: Request) -> dict[str, Any]:
    """Sample where that is asked for, score, and write the report; give it.

    Raises ``ValueError`` naming what is wrong before any video is sampled or judged.
    """
    checkpoint = _checkpoint(request)
    protocol = request.protocol
    judges = build_judges(protocol, request.judge, request.device)
    reference, num_short = read_reference(request)
    check(request, reference, checkpoint["sha256"] if checkpoint else None, judges)
    started = time.monotonic()
    if request.videos is None:
        _sample(request)
    entries = read_generated(request)
    clips, seed = protocol.clips, protocol.scores.seed
    videos = CutClips(entries, clips, clips.generated_window, seed)
    real_videos = CutClips(reference, clips, clips.reference_window, seed)
    prompts = [entry.prompt for entry in entries]
    generated = find(videos, prompts, judges, protocol.scores.alignment, "generated videos")
    reference_sha256 = dataset_sha256(reference)
    real = _real(request, reference, real_videos, judges, reference_sha256)
    spare = read_spare(request, len(entries), len(reference))
    others = _spare(request, spare, judges) if spare else None
    scores, rows = make_scores(judges, generated, real, protocol.scores, others)
    if protocol.scores.vbench:
        scores |= _by_vbench(request, entries, rows)
    report = {
        "scores": {name: score.value for name, score in scores.items()},
        "details": {name: asdict(score) for name, score in scores.items()},
        **record(request, judges, checkpoint, entries, reference, reference_sha256),
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


def _checkpoint(request: Request) -> dict[str, Any] | None:
    if request.checkpoint is None:
        return None
    content = read_checkpoint(request.checkpoint)
    return {
        "path": str(request.checkpoint),
        "sha256": file_sha256(request.checkpoint),
        "step": int(content.get("global_step", 0)),
    }


def _sample(request: Request) -> None:
    """One video for each caption, as many as are judged, by the library's own command, which goes
    on where it stopped.
    """
    assert request.checkpoint is not None
    clips, sampling = request.protocol.clips, request.protocol.sampling
    sample(
        checkpoint=request.checkpoint,
        output=request.output / "videos",
        request=SampleRequest(
            prompts=_captions(request),
            size=",".join(clips.sizes),
            num_frames=clips.num_frames,
            seed=sampling.seed,
        ),
        sampling=SamplingConfig(
            num_steps=sampling.num_steps, guidance=GuidanceConfig(sampling.guidance_scale)
        ),
        device=request.device,
    )


def _captions(request: Request) -> Path:
    """The reference's own file, or, where it holds more captions than are judged, the first of
    them."""
    number = request.protocol.scores.num_generated
    rows = [row for row in request.prompts.read_text(encoding="utf-8").splitlines() if row.strip()]
    if number is None or number >= len(rows):
        return request.prompts
    first = request.output / "captions.jsonl"
    request.output.mkdir(parents=True, exist_ok=True)
    first.write_text("".join(row + "\n" for row in rows[:number]), encoding="utf-8")
    return first


def _real(
    request: Request,
    entries: Sequence[VideoEntry],
    videos: CutClips,
    judges: Judges,
    reference_sha256: str,
) -> Findings:
    """The features are kept between runs, beside the report's folder."""
    cache = _cache(request, judges, reference_sha256)
    known, reconstruct = cache.read(), None
    if request.checkpoint is not None:
        reconstruct = _through_tokenizer(request.checkpoint, request.device)
    prompts = [entry.prompt for entry in entries]
    alignment = request.protocol.scores.alignment
    real = find(videos, prompts, judges, alignment, "real videos", known, reconstruct)
    if known is None:
        cache.write(real.features)
    return real


def _spare(request: Request, entries: Sequence[VideoEntry], judges: Judges) -> Findings:
    """Of further real videos, which floors alone are made of."""
    clips, seed = request.protocol.clips, request.protocol.scores.seed
    videos = CutClips(entries, clips, clips.reference_window, seed)
    cache = _cache(request, judges, dataset_sha256(entries))
    known = cache.read()
    prompts = [entry.prompt for entry in entries]
    found = find(videos, prompts, judges, False, "further real videos", known)
    if known is None:
        cache.write(found.features)
    return found


def _cache(request: Request, judges: Judges, reference_sha256: str) -> FeatureCache:
    settings = {
        "clips": request.protocol.settings()["clips"],
        "seed": request.protocol.scores.seed,
        "network": judges.videos.record(),
    }
    folder = request.output.parent / "reference_features"
    return FeatureCache(folder, judges.videos.label, reference_sha256, settings)


def _through_tokenizer(checkpoint: Path, device: str) -> Reconstruct:
    """Encodes and decodes by the tokenizer that the checkpoint holds."""
    tokenizer = load_tokenizer(checkpoint).to(device).eval()

    def reconstruct(batch: UInt8[Tensor, "b 3 F H W"]) -> UInt8[Tensor, "b 3 F H W"]:
        pixels = tokenizer.decode(tokenizer.encode(batch.to(device).float() / 127.5 - 1))
        return as_levels(pixels.cpu())

    return reconstruct
