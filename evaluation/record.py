"""What was measured and with what, for the report: two reports compare by it."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from evaluation.features.networks import Judges
from evaluation.inputs import SAMPLING_KEYS, VideoEntry
from evaluation.protocol import fingerprint, texts_sha256
from evaluation.request import Request
from evaluation.vbench import vbench_version

_PACKAGES = ("torch", "torchmetrics", "numpy", "scipy", "av")


def dataset_sha256(entries: Sequence[VideoEntry]) -> str:
    """Of the videos' contents and prompts, in their order, wherever they lie."""
    return texts_sha256([entry.file.sha256() + entry.prompt for entry in entries])


def record(
    request: Request,
    judges: Judges,
    checkpoint: dict[str, Any] | None,
    entries: Sequence[VideoEntry],
    reference: Sequence[VideoEntry],
    reference_sha256: str,
) -> dict[str, Any]:
    """``settings`` is all that moves a score but the model; its hash is the fingerprint."""
    settings = request.protocol.settings()
    # What the videos' own rows say of their sampling counts, not what the protocol would have done.
    settings["sampling"] = {
        key: sorted({_said(e, key) for e in entries}, key=_numbers_first)
        for key in ("seed", "num_steps", "guidance_scale", *_options(entries))
    }
    settings["networks"] = judges.record()
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
        "judge": {
            "name": judges.videos.label,
            "path": str(request.judge or ""),
            "sha256": judges.videos.sha256,
            **judges.notes,
        },
        "reference": str(request.reference),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in _PACKAGES},
        "device": request.device,
    }


def _said(entry: VideoEntry, key: str) -> float | str:
    return entry.sampling.get(key, "unknown" if key in SAMPLING_KEYS else "unset")


def _options(entries: Sequence[VideoEntry]) -> list[str]:
    """The recorded options of sampling that one of the videos has."""
    return sorted({key for e in entries for key in e.sampling} - set(SAMPLING_KEYS))


def _numbers_first(value: float | str) -> tuple[bool, float | str]:
    return isinstance(value, str), value
