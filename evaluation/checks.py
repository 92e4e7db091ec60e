"""Inputs of an evaluation, and the checks that are made before it starts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from evaluation.inputs import (
    PROMPTS_FILE,
    VideoEntry,
    check_length,
    long_enough,
    nearest_size,
    read_folder,
    read_listing,
)
from evaluation.metrics.alignment import parse_prompt
from evaluation.metrics.reconstruction import check_side
from evaluation.networks import FeatureExtractors
from evaluation.protocol import Protocol
from evaluation.vbench import check_entries, vbench_version

LEAST_VIDEOS = 4  # for any score


@dataclass(frozen=True)
class Request:
    """Inputs of an evaluation: videos, or a checkpoint to sample from, or both.

    With both, the tokenizer of the checkpoint is evaluated too. ``reference`` is a folder or a
    listing of real videos. ``root`` is a further folder in which listings may name files.
    ``prompt_column`` is the reference's column of prompts, ``expand`` the model that expands them
    before they are sampled from.
    """

    protocol: Protocol
    reference: Path
    output: Path
    networks: Path | None = None
    checkpoint: Path | None = None
    videos: Path | None = None
    device: str = "cpu"
    overwrite: bool = False
    root: str | None = None
    prompt_column: str | None = None
    expand: Path | None = None

    @property
    def prompts(self) -> Path:
        """File with the captions to sample."""
        return self.reference / PROMPTS_FILE if self.reference.is_dir() else self.reference


def read_reference(request: Request) -> tuple[list[VideoEntry], int]:
    """Return the real videos, and how many were left out because they are too short."""
    entries, num_short = _listed(request)
    return entries[: request.protocol.scores.num_reference], num_short


def read_spare(request: Request, num_generated: int, num_reference: int) -> list[VideoEntry]:
    """Return as many further real videos as were generated, for floors with the scores' sample
    size.

    The list is empty if there are not enough that are long enough.
    """
    entries, _ = _listed(request)
    rest = (e for e in entries[num_reference:] if long_enough(e, request.protocol.clips))
    spare = list(islice(rest, num_generated))
    return spare if len(spare) == num_generated else []


def _listed(request: Request) -> tuple[list[VideoEntry], int]:
    """Return all real videos, without those that the protocol drops as too short, and the number
    of these.
    """
    protocol = request.protocol
    entries = read_listing(
        request.reference, protocol.reads_prompts, request.root, request.prompt_column
    )
    if not protocol.clips.drop_short_reference:
        return entries, 0
    kept = [e for e in entries if long_enough(e, protocol.clips)]
    return kept, len(entries) - len(kept)


def read_generated(request: Request) -> list[VideoEntry]:
    """Return the videos to evaluate."""
    protocol, folder = request.protocol, request.videos or request.output / "videos"
    entries = read_folder(folder, protocol.reads_prompts, request.root)
    return entries[: protocol.scores.num_generated]


def check(
    request: Request,
    reference: Sequence[VideoEntry],
    checkpoint_sha256: str | None,
    extractors: FeatureExtractors,
) -> None:
    """Raise ``ValueError`` naming what cannot be evaluated."""
    if request.output.is_file():
        raise ValueError(f"--output {request.output}: is a file; it must be a folder")
    _check_output(request, checkpoint_sha256)
    protocol = request.protocol
    if protocol.scores.vbench:
        vbench_version()
    for height, width in protocol.clips.heights_and_widths:
        extractors.check_size(protocol.clips.num_frames, height, width)
        if request.checkpoint is not None:
            check_side(height, width)
    _check_entries(reference, protocol, request.reference, protocol.scores.num_reference)
    if request.videos is None:
        _check_prompts(request)
        return
    entries = read_generated(request)
    _check_entries(entries, protocol, request.videos, protocol.scores.num_generated)
    _check_sizes(entries, protocol)
    if protocol.scores.vbench:
        check_entries(entries)
    sources = {
        e.sampling["checkpoint_sha256"] for e in entries if "checkpoint_sha256" in e.sampling
    }
    if checkpoint_sha256 is not None and sources - {checkpoint_sha256}:
        raise ValueError(
            f"--videos {request.videos}: were sampled from a checkpoint of sha256 "
            f"{min(sources)}, and {request.checkpoint} has {checkpoint_sha256}; "
            "sample again, or leave --checkpoint out"
        )


def _check_output(request: Request, checkpoint_sha256: str | None) -> None:
    """Raise ``ValueError`` if the report of another checkpoint would be overwritten."""
    path = request.output / "report.json"
    if request.overwrite or not path.is_file():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("checkpoint") or {}
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{path}: is no report ({error}); give another --output") from error
    if found.get("sha256") != checkpoint_sha256:
        of = found.get("path", "a folder of videos")
        raise ValueError(
            f"--output {request.output}: holds the report of {of}; give another --output, or "
            "--overwrite"
        )


def _check_entries(
    entries: Sequence[VideoEntry], protocol: Protocol, origin: Path, number: int | None
) -> None:
    least = number or (LEAST_VIDEOS if protocol.scores.few_videos else protocol.scores.least_videos)
    if len(entries) < least:
        raise ValueError(
            f"{origin}: holds {len(entries)} videos; "
            f"protocol {protocol.name} needs at least {least}"
        )
    clips = protocol.clips
    for entry in entries:
        times, end = entry.file.times()
        check_length(entry.file, times, end, clips.num_frames, clips.fps)
    if protocol.scores.alignment:
        for entry in entries:
            parse_prompt(entry.prompt)


def _check_sizes(entries: Sequence[VideoEntry], protocol: Protocol) -> None:
    """Raise ``ValueError`` for videos smaller than the protocol's size.

    Larger videos are resized as real ones are. Enlarging smaller ones would blur them, and the
    scores would measure that blur.
    """
    for entry in entries:
        height, width = entry.file.check()
        size = nearest_size((height, width), protocol.clips.heights_and_widths)
        if height < size[0] or width < size[1]:
            raise ValueError(
                f"{entry.path}: is {height}x{width} pixels, and protocol {protocol.name} evaluates "
                f"{size[0]}x{size[1]}: too small"
            )


def _check_prompts(request: Request) -> None:
    if not request.prompts.is_file():
        raise ValueError(
            f"--reference {request.reference}: holds no {PROMPTS_FILE}, whose captions are sampled"
        )
    number = request.protocol.scores.num_generated
    held = len(
        read_listing(request.reference, root=request.root, prompt_column=request.prompt_column)
    )
    if number is not None and held < number:
        raise ValueError(
            f"--reference {request.reference}: holds {held} captions to sample from; "
            f"protocol {request.protocol.name} evaluates {number} videos"
        )
