"""A dataset of moving shapes with exact captions: real mp4 files and JSONL manifests."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8
from tqdm import tqdm

from sora_lightning.checks import require_at_least, require_in, require_seed
from sora_lightning.data.decoding.encode import write_video
from sora_lightning.data.synthetic.scenes import (
    COLOURS,
    MovingShape,
    Scene,
    Triple,
    can_share,
    captions,
    edited,
    edits_of,
    instructions,
    off_centre,
    random_scene,
    triples,
    turning_scene,
)

SPLITS = ("train", "val", "test")


def render(scene: Scene) -> UInt8[np.ndarray, "F H W 3"]:
    """Return the scene's RGB frames, anti-aliased: a pixel's coverage follows from its distance to
    the shape's edge.
    """
    frames = np.full((scene.num_frames, scene.height, scene.width, 3), scene.level, np.float32)
    for shape in scene.shapes:
        coverage = _coverage(shape, scene)[..., None]
        frames += coverage * (np.array(COLOURS[shape.colour], np.float32) - frames)
    return np.rint(frames).astype(np.uint8)


def _coverage(shape: MovingShape, scene: Scene) -> Float32[np.ndarray, "F H W"]:
    side = min(scene.height, scene.width)
    way = shape.moved(np.arange(scene.num_frames, dtype=np.float32) / scene.fps)
    centre_x = (scene.width - side) / 2 + side * (shape.x + way[:, 0, None, None])
    centre_y = (scene.height - side) / 2 + side * (shape.y + way[:, 1, None, None])
    x = np.arange(scene.width, dtype=np.float32)[None, None, :] + 0.5 - centre_x
    y = np.arange(scene.height, dtype=np.float32)[None, :, None] + 0.5 - centre_y
    distance = _OUTLINES[shape.shape](x, y, shape.diameter * side)
    return np.clip(0.5 - distance, 0, 1)


def _circle(x: np.ndarray, y: np.ndarray, diameter: float) -> np.ndarray:
    return np.sqrt(x**2 + y**2) - diameter / 2


def _square(x: np.ndarray, y: np.ndarray, diameter: float) -> np.ndarray:
    # A little smaller than its box, so that it does not outweigh the circle of the same diameter.
    return np.maximum(np.abs(x), np.abs(y)) - 0.45 * diameter


def _triangle(x: np.ndarray, y: np.ndarray, diameter: float) -> np.ndarray:
    height = diameter * np.sqrt(0.75, dtype=np.float32)
    flank = (height * np.abs(x) - diameter / 2 * (y + height / 2)) / np.hypot(height, diameter / 2)
    return np.maximum(flank, y - height / 2)


_OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
}


def write_dataset(
    root: Path,
    num_train: int = 1920,
    num_val: int = 48,
    num_test: int = 120,
    seed: int = 0,
    num_workers: int = 2,
    edits: bool = False,
    turns: float = 0.0,
    anywhere: bool = False,
) -> dict[str, Path]:
    """Render ``train``, ``val`` and ``test`` below ``root``; return the paths of the three
    manifests by split.

    Training and validation show the 60 combinations of shape, colour and direction that are not
    held out, one clip in five with two shapes. Testing shows only held-out combinations: four
    fifths of its clips with one shape, cycling through the 12 combinations (each with a new
    background, speed and wording), then clips with two of them. The same arguments give the same
    files, for any ``num_workers``.

    Args:
        root: The folder of the clips and manifests.
        num_train: Clips to train on.
        num_val: Clips to validate on.
        num_test: Clips of held-out combinations.
        seed: Seed of what the clips show.
        num_workers: Processes that render.
        edits: Each clip shows one shape and has a ``source``: the same scene with another shape,
            colour or direction, a combination of the training in every split. The captions are
            instructions, and the edited clips of the test split are held out.
        turns: Share of the training's clips of one shape in which it turns once or twice.
        anywhere: Shapes move anywhere in the frame, and a square crop cuts many of them off; by
            default they stay in its central square.

    Raises:
        ValueError: For a negative number of clips and for settings that exclude one another.
    """
    counts = dict(zip(SPLITS, (num_train, num_val, num_test), strict=True))
    require_at_least(0, num_train=num_train, num_val=num_val, num_test=num_test)
    require_at_least(1, num_workers=num_workers)
    require_in("[0, 1]", turns=turns)
    require_seed(seed)
    if turns and edits:
        raise ValueError(f"turns = {turns}, edits = {edits}: edited shapes keep to one direction")
    if anywhere and edits:
        raise ValueError(
            f"anywhere = {anywhere}, edits = {edits}: edited shapes stay in the centre"
        )
    root = Path(root)
    jobs = []
    for split, count in counts.items():
        (root / split).mkdir(parents=True, exist_ok=True)
        contents = (_edits if edits else _contents)(split, count, seed)
        jobs += [(split, index, content) for index, content in enumerate(contents)]
    rows: dict[str, list[dict[str, object]]] = {split: [] for split in SPLITS}
    write = partial(_write_pair, root, seed)
    if not edits:
        write = partial(_write_clip, root, seed, turns, anywhere)
    with ThreadPoolExecutor(num_workers) as pool:
        written = pool.map(write, jobs)
        for (split, _, _), row in zip(
            jobs, tqdm(written, "clips", len(jobs), unit="clip"), strict=True
        ):
            rows[split].append(row)
    manifests = {split: root / f"{split}.jsonl" for split in SPLITS}
    for split, path in manifests.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[split]), encoding="utf-8")
    return manifests


def _contents(split: str, count: int, seed: int) -> list[list[Triple]]:
    """Draw the combinations of each clip of a split, each equally often, reshuffled every round."""
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    allowed = triples(held_out=split == "test")
    num_pairs = count // 5
    firsts = _in_rounds(allowed, count, rng)
    contents = [[first] for first in firsts[: count - num_pairs]]
    for first in firsts[count - num_pairs :]:
        partners = [second for second in allowed if can_share(first, second)]
        contents.append([first, partners[rng.integers(len(partners))]])
    return contents


def _edits(split: str, count: int, seed: int) -> list[list[Triple]]:
    """Draw the source and the target of each pair, each target equally often."""
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    targets = _in_rounds(triples(held_out=split == "test"), count, rng)
    sources = map(edits_of, targets)
    return [[near[rng.integers(len(near))], t] for near, t in zip(sources, targets, strict=True)]


def _in_rounds(allowed: list[Triple], count: int, rng: np.random.Generator) -> list[Triple]:
    rounds = [rng.permutation(len(allowed)) for _ in range(count // len(allowed) + 1)]
    return [allowed[i] for i in np.concatenate(rounds)[:count]]


def _write_clip(
    root: Path, seed: int, turns: float, anywhere: bool, job: tuple[str, int, list[Triple]]
) -> dict[str, object]:
    split, index, content = job
    rng = np.random.default_rng([seed, SPLITS.index(split), 1 + index])
    may_turn = split == "train" and len(content) == 1
    # Spread evenly, so that each combination turns equally often.
    turning = may_turn and int((index + 1) * turns) > int(index * turns)
    scene = turning_scene(content[0], rng) if turning else random_scene(content, rng)
    wordings = captions(scene, rng)
    scene = off_centre(scene, rng) if anywhere else scene
    path = Path(split) / f"{index:05d}.mp4"
    write_video(root / path, render(scene), scene.fps)
    return _row(path, scene, _turned(wordings, split, index))


def _write_pair(root: Path, seed: int, job: tuple[str, int, list[Triple]]) -> dict[str, object]:
    split, index, (source, target) = job
    rng = np.random.default_rng([seed, SPLITS.index(split), 1 + index])
    before = random_scene([source], rng)
    after = edited(before, target)
    wordings = _turned(instructions(source, target, rng), split, index)
    paths = [Path(split) / f"{index:05d}{end}.mp4" for end in ("-source", "")]
    for path, scene in zip(paths, (before, after), strict=True):
        write_video(root / path, render(scene), scene.fps)
    pair = {"source": paths[0].as_posix(), "source_scene": asdict(before)}
    return _row(paths[1], after, wordings) | pair


def _turned(wordings: list[str], split: str, index: int) -> list[str]:
    """Rotate the wordings of a test clip, whose first one is the prompt, so that all are used."""
    shift = index // len(triples(held_out=True)) % len(wordings) if split == "test" else 0
    return wordings[shift:] + wordings[:shift]


def _row(path: Path, scene: Scene, wordings: list[str]) -> dict[str, object]:
    return {
        "path": path.as_posix(),
        "caption": wordings,
        "fps": scene.fps,
        "num_frames": scene.num_frames,
        "height": scene.height,
        "width": scene.width,
        "scene": asdict(scene),
    }
