"""Scenes of moving shapes that synthetic clips show, their captions, and
the held-out combinations.

Lengths are fractions of a clip's short side. Every shape stays inside the central square of that
side, so that a caption stays true whatever a centre crop to another aspect ratio cuts off; only
``off_centre`` moves it away from there.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (225, 30, 30),
    "green": (30, 170, 50),
    "blue": (35, 60, 230),
    "yellow": (240, 220, 30),
    "purple": (165, 35, 215),
    "cyan": (30, 205, 225),
}
BACKGROUNDS = {"black": 16, "gray": 128, "white": 236}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

# Short sides per second, and of a shape's box. The ranges do not touch, so that each word has one
# meaning.
SPEEDS = {"slowly": (0.085, 0.105), "medium": (0.14, 0.16), "quickly": (0.2, 0.215)}
DIAMETERS = {"small": (0.31, 0.35), "large": (0.39, 0.47)}
LARGEST_IN_A_LANE = 0.40
MARGIN = 0.02
LANE_MARGIN = 0.05
# Time of a first turn and of a second, if any, as shares of a clip.
TURNS = ((0.2, 0.5), (0.55, 0.8))

# Rows x columns. decord 0.6.0 fails on frames 16, 24, 48 or 72 columns wide (the rows of its
# buffers are padded).
FRAME_SIZES = (
    *((56, 56), (64, 64), (80, 80)),  # 1:1
    *((48, 80), (54, 90), (60, 100)),  # 5:3
    *((90, 54), (95, 57), (100, 60)),  # 3:5
)
FRAME_RATES = (8, 12, 16, 24, 30)
DURATIONS_S = (2.2, 3.4)

VERBS = ("moves", "drifts", "glides", "travels", "slides")
TOWARDS = {
    "left": ("left", "to the left"),
    "right": ("right", "to the right"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
}


class Triple(NamedTuple):
    """Combination of shape, colour and direction by which clips are held out."""

    shape: str
    colour: str
    direction: str


class Turn(NamedTuple):
    """From ``time_s`` on a shape moves in ``direction``."""

    time_s: float
    direction: str


@dataclass(frozen=True)
class MovingShape:
    """One shape on a path that is straight but for its ``turns``. ``diameter``, ``x``, ``y`` (the
    box's centre in the first frame, from the upper left of the central square) in short sides,
    ``rate`` in short sides per second."""

    shape: str
    colour: str
    direction: str
    speed: str
    size: str
    diameter: float
    x: float
    y: float
    rate: float
    turns: tuple[Turn, ...] = ()

    def moved(self, time_s: Float32[np.ndarray, " F"]) -> Float32[np.ndarray, "F 2"]:
        """Return the shape's displacement (right, down) at these times, in short sides."""
        legs = [Turn(0.0, self.direction), *self.turns]
        ends = [turn.time_s for turn in self.turns] + [np.inf]
        way = np.zeros((len(time_s), 2), np.float32)
        for (start_s, direction), end_s in zip(legs, ends, strict=True):
            way += np.outer(np.clip(time_s, start_s, end_s) - start_s, DIRECTIONS[direction])
        return self.rate * way


@dataclass(frozen=True)
class Scene:
    """The ground truth of a clip. ``level`` is the grey level of the plain background, 0 to 255."""

    background: str
    level: int
    shapes: tuple[MovingShape, ...]
    num_frames: int
    height: int
    width: int
    fps: int


def triples(held_out: bool) -> list[Triple]:
    """The 12 combinations kept for testing, or the 60 others.

    Of the 24 pairs of a colour and a direction every second one, as on a chessboard, holds out one
    of the three shapes, by a Latin square. So every pair of two attributes still occurs in
    training, and each shape, colour and direction is held out equally often.
    """
    indices = itertools.product(range(len(SHAPES)), range(len(COLOURS)), range(len(DIRECTIONS)))
    colours, directions = tuple(COLOURS), tuple(DIRECTIONS)
    return [
        Triple(SHAPES[s], colours[c], directions[d])
        for s, c, d in indices
        if ((s + c + d) % 3 == 0 and (c + d) % 2 == 0) == held_out
    ]


def random_scene(content: Sequence[Triple], rng: np.random.Generator) -> Scene:
    """A scene that shows one or two given combinations, everything else drawn at random.

    Two shapes move in lanes of their own and never touch, which needs two colours and a common axis
    of motion.
    """
    assert len(content) == 1 or can_share(*content)
    height, width = FRAME_SIZES[rng.integers(len(FRAME_SIZES))]
    fps = int(rng.choice(FRAME_RATES))
    background = str(rng.choice(tuple(BACKGROUNDS)))
    looks = [_look(alone=len(content) == 1, rng=rng) for _ in content]
    # The fastest and largest shape decides how long the clip can be before it would leave the
    # frame.
    room = min((1 - 2 * MARGIN - look.diameter) / look.rate for look in looks)
    duration_s = rng.uniform(DURATIONS_S[0], min(DURATIONS_S[1], room))
    num_frames = int(np.ceil(duration_s * fps))
    lanes: list[int | None] = [None] if len(content) == 1 else list(rng.permutation(2))
    shapes = tuple(
        _placed(triple, look, lane, duration_s, rng)
        for triple, look, lane in zip(content, looks, lanes, strict=True)
    )
    level = BACKGROUNDS[background] + int(rng.integers(-8, 9))
    return Scene(background, level, shapes, num_frames, height, width, fps)


def turning_scene(content: Triple, rng: np.random.Generator) -> Scene:
    """A scene of one shape that turns to another side once or twice, everything else drawn at
    random.

    ``content`` names the side to which it moves first. It never turns to a side with which its
    shape and colour are held out.
    """
    held_out = set(triples(held_out=True))
    allowed = [side for side in DIRECTIONS if content._replace(direction=side) not in held_out]
    scene = random_scene([content], rng)
    (shape,) = scene.shapes
    low, high = shape.diameter / 2 + MARGIN, 1 - shape.diameter / 2 - MARGIN
    while True:
        duration_s = rng.uniform(*DURATIONS_S)
        turns: list[Turn] = []
        for first, last in TURNS[: rng.integers(1, len(TURNS) + 1)]:
            now = turns[-1].direction if turns else shape.direction
            sides = [side for side in allowed if side != now]
            side = sides[rng.integers(len(sides))]
            turns.append(Turn(rng.uniform(first, last) * duration_s, side))
        turning = replace(shape, turns=tuple(turns))
        times_s = [0.0, *(turn.time_s for turn in turns), duration_s]
        corners = turning.moved(np.array(times_s, np.float32))
        start_low, start_high = low - corners.min(axis=0), high - corners.max(axis=0)
        if (start_low <= start_high).all():
            x, y = rng.uniform(start_low, start_high)
            num_frames = int(np.ceil(duration_s * scene.fps))
            placed = replace(turning, x=float(x), y=float(y))
            return replace(scene, shapes=(placed,), num_frames=num_frames)


def off_centre(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return the scene with its shapes moved together along the long side, by as much as keeps them
    whole in view. The central square may then cut them off.
    """
    times_s = np.arange(scene.num_frames, dtype=np.float32) / scene.fps
    axis = int(scene.height > scene.width)
    reach = [(s, (s.x, s.y)[axis] + s.moved(times_s)[:, axis]) for s in scene.shapes]
    first = min(float(path.min()) - shape.diameter / 2 for shape, path in reach)
    last = max(float(path.max()) + shape.diameter / 2 for shape, path in reach)
    short, long = sorted((scene.height, scene.width))
    outside = (long / short - 1) / 2 - MARGIN  # of the central square, on either side
    shift = float(rng.uniform(-outside - first, 1 + outside - last)) if long > short else 0.0
    dx, dy = (0.0, shift) if axis else (shift, 0.0)
    moved = tuple(replace(shape, x=shape.x + dx, y=shape.y + dy) for shape in scene.shapes)
    return replace(scene, shapes=moved)


def can_share(first: Triple, second: Triple) -> bool:
    """Return True if two combinations fit into one clip: different colours, and both horizontal or
    both vertical.
    """
    same_axis = DIRECTIONS[first.direction][0] ** 2 == DIRECTIONS[second.direction][0] ** 2
    return first.colour != second.colour and same_axis


class _Look(NamedTuple):
    speed: str
    size: str
    rate: float
    diameter: float


def _look(alone: bool, rng: np.random.Generator) -> _Look:
    speed, size = str(rng.choice(tuple(SPEEDS))), str(rng.choice(tuple(DIAMETERS)))
    smallest, largest = DIAMETERS[size]
    largest = largest if alone else min(largest, LARGEST_IN_A_LANE)
    return _Look(speed, size, rng.uniform(*SPEEDS[speed]), rng.uniform(smallest, largest))


def _placed(
    triple: Triple, look: _Look, lane: int | None, duration_s: float, rng: np.random.Generator
) -> MovingShape:
    radius = look.diameter / 2
    dx, dy = DIRECTIONS[triple.direction]
    travel = look.rate * duration_s
    low, high = radius + MARGIN, 1 - radius - MARGIN
    along = rng.uniform(low, high - travel) if dx + dy > 0 else rng.uniform(low + travel, high)
    if lane is None:
        across = rng.uniform(low, high)
    else:
        across = lane / 2 + rng.uniform(radius + LANE_MARGIN, 0.5 - radius - LANE_MARGIN)
    x, y = (along, across) if dx else (across, along)
    return MovingShape(*triple, look.speed, look.size, look.diameter, x, y, look.rate)


def captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Return four wordings that are all true of the scene, from short to descriptive; ``rng``
    chooses among synonyms.

    Colour, shape and directions are always named, in order of the scene's shapes. Speed is named
    unless it is medium; size and background in the longer wordings alone.
    """
    short = " and ".join(_clause(s, VERBS[0], TOWARDS[s.direction][0], False) for s in scene.shapes)
    varied = [_clause(s, _verb(rng), _towards(s, rng), False) for s in scene.shapes]
    sized = [_clause(s, _verb(rng), _towards(s, rng), True) for s in scene.shapes]
    plain = [_clause(s, _verb(rng), _towards(s, rng), True) for s in scene.shapes]
    return [
        short,
        _sentence(" while ".join(varied)),
        _sentence(f"{' and '.join(plain)} on a {scene.background} background"),
        _sentence(f"on a {scene.background} background, {' while '.join(sized)}"),
    ]


def _verb(rng: np.random.Generator) -> str:
    return VERBS[rng.integers(len(VERBS))]


def _towards(shape: MovingShape, rng: np.random.Generator) -> str:
    words = TOWARDS[shape.direction]
    return words[rng.integers(len(words))]


def _clause(shape: MovingShape, verb: str, towards: str, with_size: bool) -> str:
    adjectives = f"{shape.size} {shape.colour}" if with_size else shape.colour
    speed = "" if shape.speed == "medium" else f"{shape.speed} "
    turns = "".join(f", then {turn.direction}" for turn in shape.turns)
    return f"a {adjectives} {shape.shape} {verb} {speed}{towards}{turns}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def edits_of(target: Triple) -> list[Triple]:
    """Return the training combinations that differ from a combination in one word."""
    seen = triples(held_out=False)
    return [one for one in seen if sum(a != b for a, b in zip(one, target, strict=True)) == 1]


def edited(scene: Scene, target: Triple) -> Scene:
    """Return the scene of one shape with another combination. If the direction changes, its path is
    rotated about the frame's centre or mirrored, and so stays inside.
    """
    (shape,) = scene.shapes
    (dx, dy), (new_dx, new_dy) = DIRECTIONS[shape.direction], DIRECTIONS[target.direction]
    along, across = (shape.x, shape.y) if dx else (shape.y, shape.x)
    if dx + dy != new_dx + new_dy:
        along = 1 - along
    x, y = (along, across) if new_dx else (across, along)
    return replace(scene, shapes=(replace(shape, **target._asdict(), x=x, y=y),))


def instructions(source: Triple, target: Triple, rng: np.random.Generator) -> list[str]:
    """Return four wordings of the instruction that changes one combination into the other, by
    whichever of shape, colour and direction differs; ``rng`` chooses among synonyms.
    """
    shape, colour, thing = target.shape, target.colour, f"the {source.colour} {source.shape}"
    if source.shape != shape:
        return [
            f"turn the {source.shape} into a {shape}",
            f"make it a {shape}",
            f"Replace {thing} with a {shape}.",
            f"It should be a {shape}.",
        ]
    if source.colour != colour:
        return [
            f"make it {colour}",
            f"make the {source.shape} {colour}",
            f"Turn {thing} {colour}.",
            f"Change its colour to {colour}.",
        ]
    ways = TOWARDS[target.direction]
    towards = [ways[i] for i in rng.integers(len(ways), size=3)]
    return [
        f"make it move {ways[0]}",
        f"make the {source.shape} move {towards[0]}",
        f"Let {thing} move {towards[1]}.",
        f"It should move {towards[2]}.",
    ]
