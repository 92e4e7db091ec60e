"""Inputs of the tasks: real clips with one shape, and pairs of rendered videos of one shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from evaluation.inputs import cover, nearest_size, read_entries, read_video
from evaluation.metrics.alignment import ExpectedShape, parse_prompt
from sora_lightning.data.synthetic.render import render
from sora_lightning.data.synthetic.scenes import (
    DIRECTIONS,
    MARGIN,
    MovingShape,
    Scene,
    captions,
    random_scene,
    triples,
)

Video = UInt8[np.ndarray, "F H W 3"]
_OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


@dataclass(frozen=True)
class Case:
    """A video of one shape with its prompt, and the shape that the prompt describes.

    ``second_video`` is for tasks that take two. ``source_prompt`` describes the video if ``prompt``
    describes another one.
    """

    video: Video
    prompt: str
    expected: ExpectedShape
    second_video: Video | None = None
    source_prompt: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.video.shape[1], self.video.shape[2]


def real_cases(
    reference: Path,
    number: int,
    num_frames: int,
    fps: float,
    sizes: Sequence[tuple[int, int]],
    root: str | None = None,
) -> list[Case]:
    """Return the first ``number`` clips of a JSONL that show one shape, each in its nearest size.

    Raises ``ValueError`` if there are fewer.
    """
    listed = read_entries(reference, root=root)
    entries = [e for e in listed if len(parse_prompt(e.prompt)) == 1]
    if len(entries) < number:
        raise ValueError(
            f"--reference {reference}: holds {len(entries)} videos of one shape; --cases is "
            f"{number}"
        )
    cases = []
    for entry in entries[:number]:
        video = read_video(entry.file, num_frames, fps)
        fitted = cover(video, *nearest_size(video.shape[1:3], sizes))
        cases.append(Case(fitted, entry.prompt, parse_prompt(entry.prompt)[0]))
    return cases


def pairs_to_connect(
    number: int,
    num_frames: int,
    gap: int,
    fps: int,
    sizes: Sequence[tuple[int, int]],
    seed: int = 0,
) -> list[Case]:
    """Return pairs of rendered videos of one shape, from a combination held out of the training.

    Each video has ``num_frames`` frames. The second begins where the first's motion would be after
    ``gap`` more frames, and moves in any direction that has room.
    """
    rng = np.random.default_rng(seed)
    held_out = triples(held_out=True)
    contents = [held_out[i % len(held_out)] for i in range(number)]
    cases = []
    for content in contents:
        scene, wordings = _roomy_scene(content, num_frames + gap, fps, rng)
        first = scene.shapes[0]
        second = _turned(_moved(first, (num_frames + gap) / fps), (num_frames - 1) / fps, rng)
        videos = [
            render(replace(scene, shapes=(shape,), fps=fps, num_frames=num_frames))
            for shape in (first, second)
        ]
        size = nearest_size(videos[0].shape[1:3], sizes)
        fitted = [cover(video, *size) for video in videos]
        cases.append(Case(fitted[0], wordings[0], parse_prompt(wordings[0])[0], fitted[1]))
    return cases


def in_colour(case: Case, colour: str) -> Case:
    """Return the case with a prompt that names another colour."""
    prompt = case.prompt.replace(case.expected.colour, colour)
    expected = replace(case.expected, colour=colour)
    return replace(case, prompt=prompt, expected=expected, source_prompt=case.prompt)


def turned_round(case: Case) -> Case:
    """Return the case with a simple prompt that names the opposite direction."""
    expected = replace(case.expected, direction=_OPPOSITE[case.expected.direction])
    prompt = f"a {expected.colour} {expected.shape} moves {expected.direction}"
    return replace(case, prompt=prompt, expected=expected)


def _roomy_scene(
    content: tuple[str, str, str], num_frames: int, fps: float, rng: np.random.Generator
) -> tuple[Scene, list[str]]:
    """A scene whose shape stays inside the image for ``num_frames`` frames."""
    while True:
        scene = random_scene([content], rng)  # type: ignore[list-item]
        if scene.num_frames / scene.fps >= num_frames / fps:
            return scene, captions(scene, rng)


def _moved(shape: MovingShape, duration_s: float) -> MovingShape:
    """The shape after ``duration_s`` seconds of motion."""
    dx, dy = DIRECTIONS[shape.direction]
    way = shape.rate * duration_s
    return replace(shape, x=shape.x + dx * way, y=shape.y + dy * way)


def _turned(shape: MovingShape, duration_s: float, rng: np.random.Generator) -> MovingShape:
    """The shape with a random direction in which it stays inside the image for ``duration_s``."""
    low, high = shape.diameter / 2 + MARGIN, 1 - shape.diameter / 2 - MARGIN
    options = [replace(shape, direction=direction) for direction in DIRECTIONS]
    ends = [_moved(option, duration_s) for option in options]
    room = [
        option
        for option, end in zip(options, ends, strict=True)
        if low <= end.x <= high and low <= end.y <= high
    ]
    return room[int(rng.integers(len(room)))]
