"""Protocols: everything that determines a score, as one frozen dataclass with a fingerprint.

Scores are comparable only if their fingerprints are equal.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from evaluation.features import Extractor, Lpips, VideoTextExtractor
from sora_lightning.checks import require_at_least, require_in, require_positive
from sora_lightning.cli.explain import build
from sora_lightning.files import load_yaml
from sora_lightning.types import height_and_width

WINDOWS = ("start", "middle", "random")
# Dimensions that VBench supports for custom prompts.
VBENCH_DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
SHIPPED = Path(__file__).parent / "protocols"


@dataclass(frozen=True)
class ClipSpec:
    """Clips to evaluate: ``num_frames`` frames at ``fps`` from a window of each video.

    Reference videos are center-cropped to the aspect ratio of the nearest of ``sizes`` (height x
    width) and resized to it (bilinear, antialiased). Sampled videos have one of these sizes
    already. If ``fps`` is null, the frames are successive frames of the file. Windows are one of
    ``WINDOWS``; the position of a random window depends on ``scores.seed`` and the video's index.
    With ``drop_short_reference``, real videos that are too short are left out and counted in the
    report; otherwise they are an error. Short generated videos are always an error.
    """

    num_frames: int
    fps: float | None
    sizes: tuple[str, ...]
    reference_window: str = "middle"
    generated_window: str = "middle"
    drop_short_reference: bool = False

    def __post_init__(self) -> None:
        require_at_least(4, where="clips.", num_frames=self.num_frames)
        require_positive(where="clips.", fps=self.fps)
        for side in ("reference_window", "generated_window"):
            window = getattr(self, side)
            rule = f"must be one of {', '.join(WINDOWS)}"
            _require(window in WINDOWS, f"clips.{side}", window, rule)
        _require(
            len(self.sizes) > 0, "clips.sizes", list(self.sizes), "must name at least one size"
        )
        for index, size in enumerate(self.sizes):
            height_and_width(size, f"clips.sizes[{index}]")

    @property
    def heights_and_widths(self) -> list[tuple[int, int]]:
        return [height_and_width(size, "clips.sizes") for size in self.sizes]


@dataclass(frozen=True)
class SamplingSpec:
    """Options for sampling one video for each prompt of the reference from a checkpoint.

    Prompt i is sampled with the seed ``seed`` + i.
    """

    seed: int
    num_steps: int
    guidance_scale: float

    def __post_init__(self) -> None:
        require_at_least(1, where="sampling.", num_steps=self.num_steps)
        require_in("[0, inf)", where="sampling.", guidance_scale=self.guidance_scale)


@dataclass(frozen=True)
class ScoreSpec:
    """Which scores to compute, and options for their intervals.

    ``alignment`` detects moving shapes in the pixels; every prompt must describe moving shapes.
    ``least_videos`` is the smallest number of videos on either side. With ``few_videos``, smaller
    sets are also scored, but without distances. ``seed`` is used to draw halves, groups and
    shuffles. ``num_generated`` and ``num_reference`` limit the evaluation to the first videos of a
    list; None means all. ``covariance_ddof`` is 1 for unbiased covariances and 0 for division by n,
    which some public code uses. ``vbench`` lists those of ``VBENCH_DIMENSIONS`` that VBench's own
    package computes.
    """

    alignment: bool
    least_videos: int
    jackknife_groups: int
    seed: int
    num_generated: int | None = None
    num_reference: int | None = None
    covariance_ddof: int = 1
    vbench: tuple[str, ...] = ()
    few_videos: bool = False

    def __post_init__(self) -> None:
        require_at_least(8, where="scores.", least_videos=self.least_videos)
        require_at_least(2, where="scores.", jackknife_groups=self.jackknife_groups)
        for name in ("num_generated", "num_reference"):
            number = getattr(self, name)
            fits = number is None or number >= self.least_videos
            _require(fits, f"scores.{name}", number, "must be at least scores.least_videos")
        ddof = self.covariance_ddof
        _require(ddof in (0, 1), "scores.covariance_ddof", ddof, "must be 0 or 1")
        rule = f"must be one of {', '.join(VBENCH_DIMENSIONS)}"
        for index, name in enumerate(self.vbench):
            _require(name in VBENCH_DIMENSIONS, f"scores.vbench[{index}]", name, rule)


@dataclass(frozen=True)
class Networks:
    """Networks that extract features, built when they are called.

    ``videos`` is for FVD, ``frames`` for FID, ``texts`` for the CLIP score, and ``perceptual`` for
    LPIPS of a tokenizer's reconstructions. Without ``videos``, the small networks of
    ``paths.networks`` are used, also for texts.
    """

    videos: Callable[[], Extractor] | None = None
    frames: Callable[[], Extractor] | None = None
    texts: Callable[[], VideoTextExtractor] | None = None
    perceptual: Callable[[], Lpips] | None = None
    frames_per_video: int = 8

    def __post_init__(self) -> None:
        require_at_least(1, where="networks.", frames_per_video=self.frames_per_video)


@dataclass(frozen=True)
class Paths:
    """Default paths. They are not part of the fingerprint, which hashes file contents instead."""

    reference: Path | None = None
    networks: Path | None = None


@dataclass(frozen=True)
class Protocol:
    """An evaluation protocol. Every field except ``paths`` affects scores and enters the
    fingerprint.
    """

    name: str
    clips: ClipSpec
    sampling: SamplingSpec
    scores: ScoreSpec
    paths: Paths = field(default_factory=Paths)
    networks: Networks = field(default_factory=Networks)

    @property
    def reads_prompts(self) -> bool:
        """Return True if a score depends on the prompts."""
        named = self.networks
        return self.scores.alignment or named.texts is not None or named.videos is None

    def settings(self) -> dict[str, Any]:
        """All settings that affect scores, as plain values."""
        # Networks are recorded with the hashes of their weights, not by path.
        settings = {
            "name": self.name,
            "clips": asdict(self.clips),
            "sampling": asdict(self.sampling),
            "scores": asdict(self.scores),
        }
        return json.loads(json.dumps(settings))


def load_protocol(name_or_path: str) -> Protocol:
    """Load a shipped protocol by name (``demo``), or any YAML file by path.

    Raises ``ValueError`` naming the file and the key's full path for an unknown key, a missing one,
    a wrong type or a value out of range.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = SHIPPED / f"{name_or_path}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.yaml")))
        raise ValueError(f"protocol {name_or_path!r}: no such file; shipped are {shipped}")
    try:
        return build(Protocol, load_yaml(path.read_text(encoding="utf-8")))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error


def _require(holds: object, key: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"{key} = {value!r}: {rule}")
