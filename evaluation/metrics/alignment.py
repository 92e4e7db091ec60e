"""Alignment of videos with prompts: colour, shape and direction, detected in the pixels.

``parse_prompt`` reads the prompt, ``find_shapes`` the video, and ``align`` compares them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from scipy.optimize import linear_sum_assignment

from evaluation.metrics.bank import RowBank
from evaluation.metrics.shapes import COLOURS, DIRECTIONS, SHAPES, FoundShape, find_shapes

ATTRIBUTES = ("colour", "direction", "shape")
SHARES = (*ATTRIBUTES, "nearest_shape")


@dataclass(frozen=True)
class ExpectedShape:
    """A shape described by a prompt."""

    shape: str
    colour: str
    direction: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape} {self.direction}"


@dataclass(frozen=True)
class Alignment:
    """Result of comparing a video with its prompt: which attributes are right for all shapes.

    ``nearest_shape`` asks only which of the three shapes is nearest, where ``shape`` asks for a
    clear outline. ``num_extra`` counts the shapes found that the prompt does not mention.
    """

    colour: bool
    direction: bool
    shape: bool
    nearest_shape: bool
    num_expected: int
    num_extra: int


def parse_prompt(text: str) -> list[ExpectedShape]:
    """Return the moving shapes described by a prompt, in its order. Any wording is accepted.

    The colour of a shape is the last one before it, ignoring the colour of a background. Its
    direction is the first one after it (``leftwards``, ``to the left`` and ``left`` are equal). For
    the first shape, the direction may also come before it ("to the left glides a red circle").
    Raises ``ValueError`` for a prompt without a shape, and for a shape without a colour or a
    direction.
    """
    words = re.findall(r"[a-z]+", text.lower())
    nouns = [i for i, word in enumerate(words) if word in SHAPES]
    if not nouns:
        raise ValueError(f"prompt {text!r}: names no shape; one of {', '.join(SHAPES)} is needed")
    ends = [*nouns[1:], len(words)]
    starts = [0, *(i + 1 for i in nouns[:-1])]
    expected = []
    for start, noun, end in zip(starts, nouns, ends, strict=True):
        colours = [
            word
            for word, following in zip(words[start:noun], words[start + 1 : noun + 1], strict=True)
            if word in COLOURS and following != "background"
        ]
        directions = _directions(words[noun + 1 : end])
        if start == 0:
            directions += _directions(words[:noun])
        for what, options, known in (
            ("colour", colours, COLOURS),
            ("direction", directions, DIRECTIONS),
        ):
            if not options:
                raise ValueError(
                    f"prompt {text!r}: the {words[noun]} has no {what}; "
                    f"one of {', '.join(known)} is needed"
                )
        expected.append(ExpectedShape(words[noun], colours[-1], directions[0]))
    return expected


def _directions(words: Sequence[str]) -> list[str]:
    """Directions among words, which may be ``left``, ``leftward``, ``leftwards`` and so on."""
    stems = (re.fullmatch(rf"({'|'.join(DIRECTIONS)})(wards?)?", word) for word in words)
    return [stem.group(1) for stem in stems if stem]


def align(found: Sequence[FoundShape], expected: Sequence[ExpectedShape]) -> Alignment:
    """Compare the shapes found in a video with those expected from its prompt.

    Expected and found shapes are matched one to one, so that as many colours, then shapes, then
    directions agree as possible. An expected shape without a match is wrong in every attribute. An
    additional shape makes the whole video wrong; otherwise a video with all shapes would match any
    prompt.
    """
    if not expected:
        raise ValueError("nothing is expected: alignment needs at least one shape")
    agreement = np.array([[_agreement(e, f) for f in found] for e in expected])
    agreement = agreement.reshape(len(expected), len(found), len(ATTRIBUTES))
    weights = np.array([4, 1, 2])  # in the order of ATTRIBUTES: colour, then shape, then direction
    pairs = linear_sum_assignment(-(agreement @ weights))
    num_extra = max(0, len(found) - len(expected))
    complete = len(pairs[0]) == len(expected) and num_extra == 0
    right = agreement[pairs].all(axis=0) & complete
    colour, direction, shape = map(bool, right)
    nearest = complete and all(
        expected[e].shape == found[f].nearest for e, f in zip(*pairs, strict=True)
    )
    return Alignment(colour, direction, shape, nearest, len(expected), num_extra)


def _agreement(expected: ExpectedShape, found: FoundShape) -> list[bool]:
    return [getattr(expected, name) == getattr(found, name) for name in ATTRIBUTES]


class ShapeAlignment(RowBank):
    """Share of videos that show the colours, shapes and directions of their prompts.

    ``compute`` returns shares in 0..1: ``alignment/colour``, ``alignment/direction``,
    ``alignment/shape``, ``alignment/nearest_shape``, and ``alignment/all`` for the first three,
    over prompts with one shape, and ``alignment/two_shapes/...`` over prompts with several, where
    an attribute must be right for each of them. Kinds of prompts that do not occur are omitted.
    """

    def __init__(self) -> None:
        super().__init__({"evaluated": len(SHARES) + 2})

    def update(
        self,
        videos: Sequence[UInt8[np.ndarray, "F H W 3"]],
        prompts: Sequence[str],
        ids: Sequence[int],
    ) -> None:
        """Add videos of any sizes, in the format of ``find_shapes``; each id is counted once."""
        rows = [
            astuple(align(find_shapes(v), parse_prompt(p)))
            for v, p in zip(videos, prompts, strict=True)
        ]
        self.add("evaluated", ids, torch.tensor(rows).reshape(len(rows), len(SHARES) + 2))

    def compute(self) -> dict[str, float]:
        rows = self.rows("evaluated")
        right, num_expected = rows[:, : len(SHARES)].bool(), rows[:, len(SHARES)]
        scores = {}
        for prefix, chosen in (("", num_expected == 1), ("two_shapes/", num_expected > 1)):
            if not chosen.any():
                continue
            for column, name in enumerate(SHARES):
                scores[f"alignment/{prefix}{name}"] = right[chosen, column].double().mean().item()
            every = right[chosen, : len(ATTRIBUTES)].all(dim=1)
            scores[f"alignment/{prefix}all"] = every.double().mean().item()
        return scores
