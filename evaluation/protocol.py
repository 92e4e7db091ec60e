"""What is measured and how, as one frozen value with a fingerprint: scores compare only where
fingerprints agree.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

WINDOWS = ("start", "middle", "random")
# Those that VBench documents for videos of one's own prompts.
VBENCH_DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
SHIPPED = Path(__file__).parent / "protocols"
T = TypeVar("T")


@dataclass(frozen=True)
class ClipSpec:
    """The clips that are evaluated: ``num_frames`` at ``fps`` from a window of a video.

    Reference videos are cut about the centre to the proportions of the nearest of ``sizes``
    (height x width) and resized to it (bilinear, antialiased). Sampled videos stand at such a size
    already. Where ``fps`` is null, frames follow one another as the file has them. Windows are one
    of ``WINDOWS``; a random one is drawn by ``scores.seed`` and the video's place.
    ``drop_short_reference`` leaves out real videos that are too short, and the report counts them;
    otherwise they are an error, as short generated videos always are.
    """

    num_frames: int
    fps: float | None
    sizes: tuple[str, ...]
    reference_window: str = "middle"
    generated_window: str = "middle"
    drop_short_reference: bool = False

    def __post_init__(self) -> None:
        _require(self.num_frames >= 4, "clips.num_frames", self.num_frames, "must be at least 4")
        fits = self.fps is None or 0 < self.fps < math.inf
        _require(fits, "clips.fps", self.fps, "must be positive")
        for side in ("reference_window", "generated_window"):
            window = getattr(self, side)
            rule = f"must be one of {', '.join(WINDOWS)}"
            _require(window in WINDOWS, f"clips.{side}", window, rule)
        _require(
            len(self.sizes) > 0, "clips.sizes", list(self.sizes), "must name at least one size"
        )
        for index, size in enumerate(self.sizes):
            rule = "must be height x width, e.g. 32x48"
            _require(re.fullmatch(r"[1-9]\d*x[1-9]\d*", size), f"clips.sizes[{index}]", size, rule)

    @property
    def heights_and_widths(self) -> list[tuple[int, int]]:
        pairs = (size.split("x") for size in self.sizes)
        return [(int(height), int(width)) for height, width in pairs]


@dataclass(frozen=True)
class SamplingSpec:
    """How videos are sampled from a checkpoint, one for each prompt of the reference; prompt i has
    ``seed`` + i.
    """

    seed: int
    num_steps: int
    guidance_scale: float

    def __post_init__(self) -> None:
        _require(self.num_steps >= 1, "sampling.num_steps", self.num_steps, "must be at least 1")
        _require(
            0 <= self.guidance_scale < math.inf,
            "sampling.guidance_scale",
            self.guidance_scale,
            "must not be negative",
        )


@dataclass(frozen=True)
class ScoreSpec:
    """Which scores are made and how their intervals are.

    ``alignment`` reads moving shapes from pixels, for prompts about them alone. ``least_videos`` is
    the smallest number of videos on either side; with ``few_videos`` fewer are scored too, without
    distances. ``seed`` draws halves, groups and shuffles.
    ``num_generated`` and ``num_reference`` are how many are evaluated, the first of the list; all
    without them. ``covariance_ddof`` is 1 for the unbiased covariance, 0 for that of the set, which
    some public code takes. ``vbench`` names those of ``VBENCH_DIMENSIONS`` to have measured by
    VBench's own package.
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
        _require(
            self.least_videos >= 8, "scores.least_videos", self.least_videos, "must be at least 8"
        )
        rule = "must be at least 2"
        _require(self.jackknife_groups >= 2, "scores.jackknife_groups", self.jackknife_groups, rule)
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
class Part:
    """A class and its arguments, as in the YAML of an experiment."""

    class_path: str
    init_args: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Networks:
    """Whose features are compared: of ``videos`` for FVD, of single ``frames`` for FID, and of
    frames and ``texts`` for the CLIP score; and which ``perceptual`` network says how different a
    tokenizer's reconstruction looks. Without ``videos`` the small networks
    of ``paths.networks`` serve, for texts too.
    """

    videos: Part | None = None
    frames: Part | None = None
    texts: Part | None = None
    perceptual: Part | None = None
    frames_per_video: int = 8

    def __post_init__(self) -> None:
        number = self.frames_per_video
        _require(number >= 1, "networks.frames_per_video", number, "must be at least 1")


@dataclass(frozen=True)
class Paths:
    """Where things are by default. No part of the fingerprint: contents are hashed, not places."""

    reference: Path | None = None
    networks: Path | None = None


@dataclass(frozen=True)
class Protocol:
    """One way to evaluate. Every field but ``paths`` moves scores and enters the fingerprint."""

    name: str
    clips: ClipSpec
    sampling: SamplingSpec
    scores: ScoreSpec
    paths: Paths = dataclasses.field(default_factory=Paths)
    networks: Networks = dataclasses.field(default_factory=Networks)

    @property
    def reads_prompts(self) -> bool:
        """Whether a score depends on what videos should show."""
        named = self.networks
        return self.scores.alignment or named.texts is not None or named.videos is None

    def settings(self) -> dict[str, Any]:
        """All that moves a score, as plain values."""
        settings = dataclasses.asdict(self)
        # Networks are recorded by what they are, weights' hashes and all, not by where they lie.
        del settings["paths"], settings["networks"]
        return json.loads(json.dumps(settings))


def load_protocol(name_or_path: str) -> Protocol:
    """A shipped protocol by name (``demo``), or any YAML file by path.

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
        return _build(Protocol, yaml.safe_load(path.read_text(encoding="utf-8")), "")
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error


def fingerprint(record: dict[str, Any]) -> str:
    """sha256 of a record's canonical JSON: keys in order, no spaces, no NaN."""
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def texts_sha256(texts: Sequence[str]) -> str:
    """Of texts in their order."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def _require(holds: object, key: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"{key} = {value!r}: {rule}")


def _build(kind: type[T], values: Any, at: str) -> T:
    """A dataclass from nested mappings, every key and type checked."""
    if not isinstance(values, dict):
        raise ValueError(f"{at or 'the file'} is {values!r}: must be a mapping of keys to values")
    types_of = typing.get_type_hints(kind)
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    names = [field.name for field in fields]
    needed = [
        field.name
        for field in fields
        if field.default is field.default_factory is dataclasses.MISSING
    ]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            meant = f"did you mean {at}{near[0]}?" if near else f"known are {', '.join(names)}"
            raise ValueError(f"{at}{key} is no key of a protocol; {meant}")
    for name in needed:
        if name not in values:
            raise ValueError(f"{at}{name} is missing")
    given = [name for name in names if name in values]
    return kind(**{name: _convert(types_of[name], values[name], f"{at}{name}") for name in given})


def _convert(kind: Any, value: Any, at: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(typing.cast(type, kind), value, f"{at}.")
    if isinstance(kind, types.UnionType):
        return None if value is None else _convert(kind.__args__[0], value, at)
    if typing.get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{at} = {value!r}: must be a mapping")
        return value
    if isinstance(kind, types.GenericAlias):
        if not isinstance(value, list):
            raise ValueError(f"{at} = {value!r}: must be a list")
        return tuple(_convert(kind.__args__[0], v, f"{at}[{i}]") for i, v in enumerate(value))
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) is int:
        return float(value)
    # bool is a kind of int to Python, but true is no number of steps.
    if type(value) is not kind:
        raise ValueError(f"{at} = {value!r}: must be of type {kind.__name__}")
    return value
