"""From a checkpoint or a folder of videos to a report: beside ``tasks`` the one file of the judge
that imports the library.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import UInt8
from torch import Tensor
from tqdm import tqdm

from evaluation.features import Clip
from evaluation.metrics.alignment import parse_prompt
from evaluation.networks import Judges, build_judges, score_name
from evaluation.protocol import (
    ClipSpec,
    Protocol,
    ScoreSpec,
    file_sha256,
    fingerprint,
    texts_sha256,
)
from evaluation.reference import cached_features
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
    motion_and_variety,
    tokenizer_scores,
)
from evaluation.videos import (
    VideoEntry,
    check_length,
    cover,
    nearest_size,
    read_entries,
    read_folder,
    read_video,
    video_times,
)
from sora_lightning.cli.sampling import sample
from sora_lightning.tokenizers.load import load_tokenizer, read_checkpoint
from sora_lightning.types import as_levels


@dataclass(frozen=True)
class Request:
    """What to judge: videos, or a checkpoint to sample them from, or both (the checkpoint's
    tokenizer is judged too).
    """

    protocol: Protocol
    reference: Path
    output: Path
    judge: Path | None = None
    checkpoint: Path | None = None
    videos: Path | None = None
    device: str = "cpu"


def evaluate(request: Request) -> dict[str, Any]:
    """Sample where that is asked for, score, and write the report; give it.

    Raises ``ValueError`` naming what is wrong before any video is sampled or judged.
    """
    checkpoint = _checkpoint(request)
    judges = build_judges(request.protocol, request.judge, request.device)
    reference, num_short = _reference(request)
    _check(request, reference, checkpoint, judges)
    started = time.monotonic()
    if request.videos is None:
        _sample(request)
    entries = read_folder(request.videos or request.output / "videos")
    entries = entries[: request.protocol.scores.num_generated]
    clips, seed = request.protocol.clips, request.protocol.scores.seed
    window = clips.generated_window
    videos = [
        _decode(e, clips, window, seed, i) for i, e in enumerate(_bar(entries, "read videos"))
    ]
    generated = _clips(entries, videos, judges)
    window = clips.reference_window
    fitted = [
        _fit(_decode(e, clips, window, seed, i), clips)
        for i, e in enumerate(_bar(reference, "read reference"))
    ]
    sha256 = texts_sha256([file_sha256(e.path) + e.prompt for e in reference])
    real = _real_clips(request, reference, fitted, judges, sha256)
    reconstructed = None
    if request.checkpoint is not None:
        videos = _through_tokenizer(request.checkpoint, request.device, real.videos)
        reconstructed = replace(real, videos=videos)
    scores, rows = _score(judges, generated, real, reconstructed, request.protocol.scores)
    record = _record(request, judges, checkpoint, entries, reference, sha256)
    report = {
        "scores": {name: score.value for name, score in scores.items()},
        "details": {name: asdict(score) for name, score in scores.items()},
        **record,
        "num_short_reference": num_short,
        "videos": [
            {"path": str(e.path), "prompt": e.prompt, **e.sampling, **row}
            for e, row in zip(entries, rows, strict=True)
        ],
        "seconds": round(time.monotonic() - started, 1),
    }
    paired = real.videos if real.prompts == generated.prompts else None
    fps = clips.fps or _rate(entries[0])
    write_report(report, generated.videos, paired, fps, request.output)
    torch.save(
        {"generated": generated.features.float(), "reference": real.features.float()},
        request.output / "features.pt",
    )
    return report


def _rate(entry: VideoEntry) -> float:
    times, end = video_times(entry.path)
    return len(times) / max(end - times[0], 1e-6)


def _reference(request: Request) -> tuple[list[VideoEntry], int]:
    """The real videos to judge by, and how many were left out for being too short."""
    protocol = request.protocol
    entries = read_entries(request.reference)
    whole = len(entries)
    if protocol.clips.drop_short_reference:
        entries = [e for e in entries if _long_enough(e, protocol.clips)]
    num_short = whole - len(entries)
    return entries[: protocol.scores.num_reference], num_short


def _long_enough(entry: VideoEntry, clips: ClipSpec) -> bool:
    times, end = video_times(entry.path)
    try:
        check_length(entry.path, times, end, clips.num_frames, clips.fps)
    except ValueError:
        return False
    return True


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
    request: Request,
    reference: Sequence[VideoEntry],
    checkpoint: dict[str, Any] | None,
    judges: Judges,
) -> None:
    """All that can be known to be wrong before the first minute is spent."""
    if checkpoint is None and request.videos is None:
        raise ValueError("neither --checkpoint nor --videos is given: there is nothing to judge")
    if request.output.is_file():
        raise ValueError(f"--output {request.output}: is a file; it must be a folder")
    protocol = request.protocol
    for height, width in protocol.clips.heights_and_widths:
        judges.videos.check_size(protocol.clips.num_frames, height, width)
    if judges.frames is not None and judges.frames_per_video > protocol.clips.num_frames:
        raise ValueError(
            f"networks.frames_per_video = {judges.frames_per_video}: "
            f"clips have {protocol.clips.num_frames} frames"
        )
    _check_entries(reference, protocol, request.reference, protocol.scores.num_reference)
    if request.videos is None:
        return
    entries = read_folder(request.videos)
    _check_entries(entries, protocol, request.videos, protocol.scores.num_generated)
    sources = {
        e.sampling["checkpoint_sha256"] for e in entries if "checkpoint_sha256" in e.sampling
    }
    if checkpoint is not None and sources - {checkpoint["sha256"]}:
        raise ValueError(
            f"--videos {request.videos}: were sampled from a checkpoint of sha256 "
            f"{min(sources)}, and {request.checkpoint} has {checkpoint['sha256']}; "
            "sample again, or leave --checkpoint out"
        )


def _check_entries(
    entries: Sequence[VideoEntry], protocol: Protocol, origin: Path, number: int | None
) -> None:
    least = number or protocol.scores.least_videos
    if len(entries) < least:
        raise ValueError(
            f"{origin}: holds {len(entries)} videos; "
            f"protocol {protocol.name} needs at least {least}"
        )
    clips = protocol.clips
    for entry in entries[:number]:
        times, end = video_times(entry.path)
        check_length(entry.path, times, end, clips.num_frames, clips.fps)
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


def _decode(entry: VideoEntry, clips: ClipSpec, window: str, seed: int, place: int) -> Video:
    draw = float(np.random.default_rng([seed, place]).random()) if window == "random" else 0.5
    return read_video(entry.path, clips.num_frames, clips.fps, window, draw)


def _fit(video: Video, clips: ClipSpec) -> Video:
    return cover(video, *nearest_size(video, clips.heights_and_widths))


def _clips(entries: Sequence[VideoEntry], videos: list[Video], judges: Judges) -> Clips:
    clips = Clips(
        videos,
        [entry.prompt for entry in entries],
        torch.stack(in_batches(judges.features, videos, "features")),
    )
    return _seen_by_others(clips, judges)


def _seen_by_others(clips: Clips, judges: Judges) -> Clips:
    """With frames' features and embeddings, where the protocol names networks for them."""
    if judges.frames is not None:
        frames = torch.stack(in_batches(judges.of_frames, clips.videos, "features of frames"))
        clips = replace(clips, frames=frames)
    if judges.texts is not None:
        embeddings = torch.stack(in_batches(judges.embeddings, clips.videos, "embeddings"))
        clips = replace(clips, embeddings=embeddings)
    return clips


def _real_clips(
    request: Request,
    entries: Sequence[VideoEntry],
    videos: list[Video],
    judges: Judges,
    dataset_sha256: str,
) -> Clips:
    """The features are kept between runs, beside the report's folder."""
    settings = {
        "clips": request.protocol.settings()["clips"],
        "seed": request.protocol.scores.seed,
        "network": judges.videos.record(),
    }
    features = cached_features(
        request.output.parent / "reference_features",
        judges.videos.label,
        dataset_sha256,
        settings,
        lambda: torch.stack(in_batches(judges.features, videos, "features of the reference")),
    )
    return _seen_by_others(Clips(videos, [e.prompt for e in entries], features), judges)


def _through_tokenizer(checkpoint: Path, device: str, videos: Sequence[Video]) -> list[Video]:
    """Real clips encoded and decoded by the tokenizer that the checkpoint holds."""
    tokenizer = load_tokenizer(checkpoint).to(device).eval()

    def reconstruct(batch: UInt8[Tensor, "b 3 F H W"]) -> UInt8[Tensor, "b F H W 3"]:
        pixels = tokenizer.decode(tokenizer.encode(batch.to(device).float() / 127.5 - 1))
        return rearrange(as_levels(pixels.cpu()), "b c F H W -> b F H W c")

    return [video.numpy() for video in in_batches(reconstruct, videos, "reconstruct")]


def _score(
    judges: Judges,
    generated: Clips,
    real: Clips,
    reconstructed: Clips | None,
    spec: ScoreSpec,
) -> tuple[dict[str, Score], list[dict[str, Any]]]:
    """Scores by name, in the report's order; and a row of findings for each generated video."""
    scores: dict[str, Score] = {}
    by_clip: dict[str, Score] = {}
    rows: list[dict[str, Any]] = [{} for _ in generated.videos]
    if judges.texts is not None:
        by_clip = _text_scores(judges, generated, real, spec, rows)
    if spec.alignment:
        seen = look(generated, "find shapes")
        scores |= alignment_scores(seen, "")
        for row, one in zip(rows, seen, strict=True):
            row |= {"found": [str(shape) for shape in one.found], **asdict(one.alignment)}
    names = score_name("fvd", judges.videos), score_name("kvd", judges.videos)
    scores |= frechet_scores(generated.features, real.features, spec, names) | by_clip
    if judges.frames is not None and generated.frames is not None and real.frames is not None:
        names = score_name("fid", judges.frames), score_name("kid", judges.frames)
        fakes, reals = (
            rearrange(clips, "n k d -> (n k) d") for clips in (generated.frames, real.frames)
        )
        scores |= frechet_scores(fakes, reals, spec, names, judges.frames_per_video)
    motion, values = motion_and_variety(generated, real, spec)
    for index, row in enumerate(rows):
        row |= {name: round(float(column[index]), 6) for name, column in values.items()}
    if reconstructed is not None:
        scores |= tokenizer_scores(real.videos, reconstructed.videos, spec)
    if spec.alignment:
        scores |= alignment_scores(look(real, "find shapes, real"), "reference/")
        if reconstructed is not None:
            again = look(reconstructed, "find shapes, reconstructed")
            scores |= alignment_scores(again, "reconstruction/")
    return scores | motion, rows


def _text_scores(
    judges: Judges, generated: Clips, real: Clips, spec: ScoreSpec, rows: list[dict[str, Any]]
) -> dict[str, Score]:
    assert judges.texts is not None
    # The network is part of what the score means.
    name = f"clip_score-{judges.texts.label.removeprefix('clip-')}"
    scores, of_each = clip_scores(name, judges.texts_embedded, generated, real, spec)
    for row, value in zip(rows, of_each, strict=True):
        row[name] = round(float(value), 4)
    if isinstance(judges.texts, Clip):
        cut = judges.texts.truncated(generated.prompts)
        scores[f"{name}/truncated"] = Score(
            sum(cut) / len(cut),
            len(cut),
            "Part of prompts longer than the network reads; what it cannot read does not count.",
            "",
        )
    return scores


def _numbers_first(value: float | str) -> tuple[bool, float | str]:
    return isinstance(value, str), value


def _record(
    request: Request,
    judges: Judges,
    checkpoint: dict[str, Any] | None,
    entries: Sequence[VideoEntry],
    reference: Sequence[VideoEntry],
    reference_sha256: str,
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
    settings["networks"] = judges.record()
    settings["extractor"] = settings["networks"]["videos"]
    settings["prompts_sha256"] = texts_sha256([e.prompt for e in entries])
    settings["reference_sha256"] = reference_sha256
    settings["num_videos"], settings["num_reference"] = len(entries), len(reference)
    packages = ("torch", "torchmetrics", "numpy", "scipy", "av")
    return {
        "protocol": request.protocol.name,
        "fingerprint": fingerprint(settings),
        "settings": settings,
        "checkpoint": checkpoint,
        "judge": {
            "name": judges.videos.label,
            "path": str(request.judge or ""),
            "sha256": judges.videos.sha256,
            **judges.notes,
        },
        "reference": str(request.reference),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "device": request.device,
    }
