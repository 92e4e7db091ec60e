"""From a checkpoint or a folder of videos to a report: the one file of the judge that imports the
library.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import UInt8
from torch import Tensor
from tqdm import tqdm

from evaluation.features.tiny import SavedJudge, TinyJudge, load_judge
from evaluation.metrics.alignment import parse_prompt
from evaluation.protocol import (
    ClipSpec,
    Protocol,
    ScoreSpec,
    file_sha256,
    fingerprint,
    texts_sha256,
)
from evaluation.report import write_report
from evaluation.scores import (
    Clips,
    Score,
    Video,
    alignment_scores,
    clip_scores,
    frechet_scores,
    in_batches,
    look,
    tokenizer_scores,
)
from evaluation.videos import (
    VideoEntry,
    cover,
    nearest_size,
    read_entries,
    read_folder,
    read_video,
)
from sora_lightning.cli.sampling import sample
from sora_lightning.tokenizers.load import load_tokenizer, read_checkpoint


@dataclass(frozen=True)
class Request:
    """What to judge: videos, or a checkpoint to sample them from, or both (the checkpoint's
    tokenizer is judged too).
    """

    protocol: Protocol
    reference: Path
    judge: Path
    output: Path
    checkpoint: Path | None = None
    videos: Path | None = None
    device: str = "cpu"


def evaluate(request: Request) -> dict[str, Any]:
    """Sample where that is asked for, score, and write the report; give it.

    Raises ``ValueError`` naming what is wrong before any video is sampled or judged.
    """
    judge, checkpoint = load_judge(request.judge), _checkpoint(request)
    reference = read_entries(request.reference)
    _check(request, reference, checkpoint)
    started = time.monotonic()
    if request.videos is None:
        _sample(request)
    entries = read_folder(request.videos or request.output / "videos")
    clips = request.protocol.clips
    generated = _clips(entries, [_decode(e, clips) for e in _bar(entries, "read videos")], judge)
    fitted = [_fit(_decode(e, clips), clips) for e in _bar(reference, "read reference")]
    real = _clips(reference, fitted, judge)
    reconstructed = None
    if request.checkpoint is not None:
        videos = _through_tokenizer(request.checkpoint, request.device, real.videos)
        reconstructed = replace(real, videos=videos)
    scores, rows = _score(judge.judge, generated, real, reconstructed, request.protocol.scores)
    report = {
        "scores": {name: score.value for name, score in scores.items()},
        "details": {name: asdict(score) for name, score in scores.items()},
        **_record(request, judge, checkpoint, entries, reference),
        "videos": [
            {"path": str(e.path), "prompt": e.prompt, **e.sampling, **row}
            for e, row in zip(entries, rows, strict=True)
        ],
        "seconds": round(time.monotonic() - started, 1),
    }
    paired = real.videos if real.prompts == generated.prompts else None
    write_report(report, generated.videos, paired, clips.fps, request.output)
    return report


def _checkpoint(request: Request) -> dict[str, Any] | None:
    if request.checkpoint is None:
        return None
    content = read_checkpoint(request.checkpoint)
    return {
        "path": str(request.checkpoint),
        "sha256": file_sha256(request.checkpoint),
        "step": int(content.get("global_step", 0)),
    }


def _check(
    request: Request, reference: Sequence[VideoEntry], checkpoint: dict[str, Any] | None
) -> None:
    """All that can be known to be wrong before the first minute is spent."""
    if checkpoint is None and request.videos is None:
        raise ValueError("neither --checkpoint nor --videos is given: there is nothing to judge")
    if request.output.is_file():
        raise ValueError(f"--output {request.output}: is a file; it must be a folder")
    _check_entries(reference, request.protocol, request.reference)
    if request.videos is None:
        return
    entries = read_folder(request.videos)
    _check_entries(entries, request.protocol, request.videos)
    sources = {
        e.sampling["checkpoint_sha256"] for e in entries if "checkpoint_sha256" in e.sampling
    }
    if checkpoint is not None and sources - {checkpoint["sha256"]}:
        raise ValueError(
            f"--videos {request.videos}: were sampled from a checkpoint of sha256 "
            f"{min(sources)}, and {request.checkpoint} has {checkpoint['sha256']}; "
            "sample again, or leave --checkpoint out"
        )


def _check_entries(entries: Sequence[VideoEntry], protocol: Protocol, origin: Path) -> None:
    if len(entries) < protocol.scores.least_videos:
        raise ValueError(
            f"{origin}: holds {len(entries)} videos; "
            f"protocol {protocol.name} needs at least {protocol.scores.least_videos}"
        )
    if protocol.scores.alignment:
        for entry in entries:
            parse_prompt(entry.prompt)


def _sample(request: Request) -> None:
    """One video for each row of the reference, by the library's own command, which goes on where it
    stopped.
    """
    assert request.checkpoint is not None
    clips, sampling = request.protocol.clips, request.protocol.sampling
    sample(
        checkpoint=request.checkpoint,
        output=request.output / "videos",
        prompts=request.reference,
        size=",".join(clips.sizes),
        num_frames=clips.num_frames,
        seed=sampling.seed,
        num_steps=sampling.num_steps,
        guidance_scale=sampling.guidance_scale,
        device=request.device,
    )


def _bar(entries: Sequence[VideoEntry], description: str) -> tqdm[VideoEntry]:
    return tqdm(entries, desc=description, unit="video")


def _decode(entry: VideoEntry, clips: ClipSpec) -> Video:
    return read_video(entry.path, clips.num_frames, clips.fps)


def _fit(video: Video, clips: ClipSpec) -> Video:
    return cover(video, *nearest_size(video, clips.heights_and_widths))


def _clips(entries: Sequence[VideoEntry], videos: list[Video], judge: SavedJudge) -> Clips:
    features = torch.stack(in_batches(judge.judge.features, videos, "features"))
    return Clips(videos, [entry.prompt for entry in entries], features)


def _through_tokenizer(checkpoint: Path, device: str, videos: Sequence[Video]) -> list[Video]:
    """Real clips encoded and decoded by the tokenizer that the checkpoint holds."""
    tokenizer = load_tokenizer(checkpoint).to(device).eval()

    def reconstruct(batch: UInt8[Tensor, "b 3 F H W"]) -> UInt8[Tensor, "b F H W 3"]:
        pixels = tokenizer.decode(tokenizer.encode(batch.to(device).float() / 127.5 - 1))
        frames = rearrange(pixels.cpu(), "b c F H W -> b F H W c")
        return ((frames + 1) * 127.5).round().clamp(0, 255).byte()

    return [video.numpy() for video in in_batches(reconstruct, videos, "reconstruct")]


def _score(
    judge: TinyJudge,
    generated: Clips,
    real: Clips,
    reconstructed: Clips | None,
    spec: ScoreSpec,
) -> tuple[dict[str, Score], list[dict[str, Any]]]:
    """Scores by name, in the report's order; and a row of findings for each generated video."""
    scores: dict[str, Score] = {}
    by_clip, of_each = clip_scores(judge, generated, real, spec)
    rows: list[dict[str, Any]] = [{"clip_score-tiny": round(float(s), 2)} for s in of_each]
    if spec.alignment:
        seen = look(generated, "find shapes")
        scores |= alignment_scores(seen, "")
        for row, one in zip(rows, seen, strict=True):
            row |= {"found": [str(shape) for shape in one.found], **asdict(one.alignment)}
    scores |= frechet_scores(generated.features, real.features, spec) | by_clip
    if reconstructed is not None:
        scores |= tokenizer_scores(real.videos, reconstructed.videos, spec)
    if spec.alignment:
        scores |= alignment_scores(look(real, "find shapes, real"), "reference/")
        if reconstructed is not None:
            again = look(reconstructed, "find shapes, reconstructed")
            scores |= alignment_scores(again, "reconstruction/")
    return scores, rows


def _numbers_first(value: float | str) -> tuple[bool, float | str]:
    return isinstance(value, str), value


def _record(
    request: Request,
    judge: SavedJudge,
    checkpoint: dict[str, Any] | None,
    entries: Sequence[VideoEntry],
    reference: Sequence[VideoEntry],
) -> dict[str, Any]:
    """What was measured and with what. ``settings`` is all that moves a score but the model; its
    hash is the fingerprint.
    """
    settings = request.protocol.settings()
    # What the videos' own rows say of their sampling counts, not what the protocol would have done.
    settings["sampling"] = {
        key: sorted({e.sampling.get(key, "unknown") for e in entries}, key=_numbers_first)
        for key in ("seed", "num_steps", "guidance_scale")
    }
    settings["extractor"] = {"name": "tiny", "sha256": judge.sha256}
    settings["prompts_sha256"] = texts_sha256([e.prompt for e in entries])
    settings["reference_sha256"] = texts_sha256([file_sha256(e.path) + e.prompt for e in reference])
    settings["num_videos"], settings["num_reference"] = len(entries), len(reference)
    packages = ("torch", "torchmetrics", "numpy", "scipy", "av")
    return {
        "protocol": request.protocol.name,
        "fingerprint": fingerprint(settings),
        "settings": settings,
        "checkpoint": checkpoint,
        "judge": {"path": str(request.judge), "sha256": judge.sha256, **judge.notes},
        "reference": str(request.reference),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "device": request.device,
    }
