"""The synthetic clips show what their captions say, and hold out what they promise."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sora_lightning.data import read_manifest, write_dataset
from sora_lightning.data.decoding.readers import PyAVReader
from sora_lightning.data.decoding.timeline import read_timeline
from sora_lightning.data.synthetic.render import render
from sora_lightning.data.synthetic.scenes import (
    COLOURS,
    SHAPES,
    SPEEDS,
    TOWARDS,
    Scene,
    Triple,
    captions,
    edited,
    edits_of,
    instructions,
    off_centre,
    random_scene,
    triples,
    turning_scene,
)

# Columns grow to the right and rows downwards.
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def scenes(count: int, pairs: bool = False) -> list[Scene]:
    rng = np.random.default_rng(7)
    every = triples(False) + triples(True)
    content = [[every[i % len(every)]] for i in range(count)]
    if pairs:
        red, blue = Triple("circle", "red", "left"), Triple("square", "blue", "right")
        up, down = Triple("triangle", "cyan", "up"), Triple("circle", "yellow", "down")
        content = [[red, blue] if i % 2 else [up, down] for i in range(count)]
    return [random_scene(one, rng) for one in content]


def masks(scene: Scene, frames: np.ndarray) -> np.ndarray:
    """Where each shape is: pixels nearer to its colour than to the others on show. S F H W"""
    palette = [np.full(3, scene.level), *(COLOURS[s.colour] for s in scene.shapes)]
    distance = np.abs(frames[None].astype(int) - np.array(palette)[:, None, None, None]).sum(-1)
    return np.stack([distance.argmin(0) == i + 1 for i in range(len(scene.shapes))])


def test_held_out_combinations_leave_every_pair_to_training() -> None:
    held_out, seen = triples(True), triples(False)
    assert len(held_out) == 12
    assert len(seen) == 60
    assert not set(held_out) & set(seen)
    for a, b in itertools.combinations(range(3), 2):
        values = (SHAPES, tuple(COLOURS), tuple(STEPS))
        every = set(itertools.product(values[a], values[b]))
        assert {(t[a], t[b]) for t in seen} == every
        assert {(t[a], t[b]) for t in held_out} <= every
    for axis in range(3):
        assert len(set(Counter(t[axis] for t in held_out).values())) == 1


@pytest.mark.parametrize("pairs", [False, True])
def test_the_image_shows_what_the_scene_says(pairs: bool) -> None:
    for scene in scenes(72 if not pairs else 20, pairs):
        where = masks(scene, render(scene))
        side = min(scene.height, scene.width)
        columns = slice((scene.width - side) // 2, (scene.width + side + 1) // 2)
        rows = slice((scene.height - side) // 2, (scene.height + side + 1) // 2)
        for shape, mask in zip(scene.shapes, where, strict=True):
            assert mask[:, rows, columns].sum() == mask.sum()  # inside the central square
            assert not mask[:, [0, -1]].any()
            assert not mask[:, :, [0, -1]].any()
            area = mask.sum((1, 2)) / (shape.diameter * side) ** 2
            expected = {"circle": np.pi / 4, "square": 0.81, "triangle": 3**0.5 / 4}
            np.testing.assert_allclose(area, expected[shape.shape], rtol=0.2)
            frame, y, x = np.nonzero(mask)
            centre = np.stack([np.bincount(frame, axis) / np.bincount(frame) for axis in (x, y)])
            travelled = (centre[:, -1] - centre[:, 0]) / side
            expected_travel = shape.rate * (scene.num_frames - 1) / scene.fps
            along = travelled @ STEPS[shape.direction]
            assert abs(along - expected_travel) < 0.05
            assert np.abs(travelled).sum() - along < 0.05
            assert SPEEDS[shape.speed][0] <= shape.rate <= SPEEDS[shape.speed][1]


def test_a_turning_shape_keeps_to_its_caption_and_to_the_image() -> None:
    rng = np.random.default_rng(3)
    counts = Counter()
    for content in triples(False) * 2:
        scene = turning_scene(content, rng)
        (shape,) = scene.shapes
        sides = [shape.direction, *(turn.direction for turn in shape.turns)]
        counts[len(shape.turns)] += 1
        for wording in captions(scene, rng):
            words = wording.lower().replace(",", "").replace(".", "").split()
            assert [w.removesuffix("wards") for w in words if w.removesuffix("wards") in STEPS] == (
                sides
            )
        (mask,) = masks(scene, render(scene))
        side = min(scene.height, scene.width)
        columns = slice((scene.width - side) // 2, (scene.width + side + 1) // 2)
        rows = slice((scene.height - side) // 2, (scene.height + side + 1) // 2)
        assert mask[:, rows, columns].sum() == mask.sum()  # inside the central square
        frame, y, x = np.nonzero(mask)
        centre = np.stack([np.bincount(frame, axis) / np.bincount(frame) for axis in (x, y)])
        ends = [0.0, *(turn.time_s for turn in shape.turns), (scene.num_frames - 1) / scene.fps]
        for (start, end), way in zip(itertools.pairwise(ends), sides, strict=True):
            # Frames at or inside the leg's ends.
            a, b = int(np.ceil(start * scene.fps)), int(end * scene.fps)
            moved = (centre[:, b] - centre[:, a]) / side
            expected = shape.rate * (b - a) / scene.fps * np.array(STEPS[way])
            np.testing.assert_allclose(moved, expected, atol=0.03)
    assert counts.keys() == {1, 2}


@pytest.mark.parametrize("turns", [0.0, 0.35, 1.0])
def test_no_training_clip_shows_a_held_out_combination(turns: float, tmp_path: Path) -> None:
    """Nor does a caption name one: a caption names the sides of its scene."""
    paths = write_dataset(tmp_path, 40, 1, 1, num_workers=1, turns=turns)
    shown = {
        Triple(shape["shape"], shape["colour"], side)
        for line in paths["train"].read_text().splitlines()
        for shape in json.loads(line)["scene"]["shapes"]
        for side in (shape["direction"], *(side for _, side in shape["turns"]))
    }
    assert not shown & set(triples(held_out=True))


def test_turns_reach_all_sides_but_the_held_out_ones() -> None:
    rng = np.random.default_rng(2)
    held_out, reached = set(triples(held_out=True)), set()
    for content in triples(held_out=False) * 20:
        (shape,) = turning_scene(content, rng).shapes
        reached |= {content._replace(direction=turn.direction) for turn in shape.turns}
    assert reached == set(triples(held_out=False))
    assert not reached & held_out


def test_turns_are_those_of_the_training_alone(tmp_path: Path) -> None:
    paths = write_dataset(tmp_path, 20, 4, 4, num_workers=1, turns=0.5)
    turning = {
        split: [
            sum(bool(shape["turns"]) for shape in json.loads(line)["scene"]["shapes"])
            for line in path.read_text().splitlines()
        ]
        for split, path in paths.items()
    }
    assert sum(turning["train"][:16]) == 8
    assert not any(turning["train"][16:] + turning["val"] + turning["test"])
    with pytest.raises(ValueError, match=r"turns = 1\.5: must lie in \[0, 1\]"):
        write_dataset(tmp_path, 1, 0, 0, turns=1.5)
    with pytest.raises(ValueError, match=r"turns = 0\.5, edits = True"):
        write_dataset(tmp_path, 1, 0, 0, edits=True, turns=0.5)


def test_two_shapes_never_touch() -> None:
    for scene in scenes(40, pairs=True):
        first, second = masks(scene, render(scene))
        side = min(scene.height, scene.width)
        axis = 1 if STEPS[scene.shapes[0].direction][0] else 2
        reach = [np.nonzero(m.any((0, 3 - axis)))[0] for m in (first, second)]
        gap = max(reach[0].min() - reach[1].max(), reach[1].min() - reach[0].max())
        assert gap > 0.06 * side


def test_captions_are_true_and_differ() -> None:
    rng = np.random.default_rng(0)
    for scene in [*scenes(72), *scenes(10, pairs=True)]:
        wordings = captions(scene, rng)
        assert len(set(wordings)) == len(wordings) == 4
        for wording in wordings:
            words = wording.lower().strip(".").replace(",", "").split()
            said = [word for word in words if word in COLOURS or word in SHAPES]
            assert said == [w for s in scene.shapes for w in (s.colour, s.shape)]
            ways = {word for d, ws in TOWARDS.items() for w in ws for word in [w.split()[-1]]}
            expected = [s.direction for s in scene.shapes]
            named = [d for w in words if w in ways for d in TOWARDS if w.startswith(d)]
            assert named == expected
            speeds = [s.speed for s in scene.shapes if s.speed != "medium"]
            assert [w for w in words if w in SPEEDS] == speeds
            if "background" in words:
                assert words[words.index("background") - 1] == scene.background
                assert [w for w in words if w in ("small", "large")] == [
                    s.size for s in scene.shapes
                ]


def content(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    settings = {"num_train": 6, "num_val": 2, "num_test": 5}
    write_dataset(tmp_path / "a", **settings, num_workers=1)
    write_dataset(tmp_path / "b", **settings, num_workers=3)
    write_dataset(tmp_path / "c", **settings, seed=1)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert content(tmp_path / "a") != content(tmp_path / "c")
    hashes = list(content(tmp_path / "a").values())
    assert len(set(hashes)) == len(hashes)


def test_no_two_scenes_are_alike_in_any_split_or_seed(tmp_path: Path) -> None:
    places = []
    for seed in (0, 1):
        for path in write_dataset(tmp_path / str(seed), 4, 4, 4, seed=seed).values():
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            places += [(shape["x"], shape["y"]) for row in rows for shape in row["scene"]["shapes"]]
    assert len(places) == len(set(places)) == 24


def test_the_splits_keep_to_their_combinations(shapes: dict[str, Path]) -> None:
    seen, held_out = set(triples(False)), set(triples(True))
    for split, allowed, pairs in (("train", seen, 6), ("val", seen, 1), ("test", held_out, 2)):
        rows = [json.loads(line) for line in shapes[split].read_text().splitlines()]
        shown = [
            [Triple(s["shape"], s["colour"], s["direction"]) for s in row["scene"]["shapes"]]
            for row in rows
        ]
        assert {triple for clip in shown for triple in clip} <= allowed
        assert sum(len(clip) == 2 for clip in shown) == pairs


def test_the_manifest_tells_the_truth_about_the_files(shapes: dict[str, Path]) -> None:
    for record in read_manifest(shapes["train"]):
        timeline = read_timeline(record.path)
        frames = PyAVReader().read(record.path, timeline, [0])
        metadata = record.metadata
        assert metadata is not None
        assert len(timeline) == metadata.num_frames
        assert timeline.end_s == pytest.approx(metadata.duration_s, abs=1e-3)
        assert frames.shape[1:3] == (metadata.height, metadata.width)
        assert timeline.decord_objection is None
        assert metadata.duration_s >= 2.2


def test_colours_survive_the_codec(shapes: dict[str, Path]) -> None:
    rows = [json.loads(line) for line in shapes["train"].read_text().splitlines()]
    for row in rows[:6]:
        path = shapes["train"].parent / row["path"]
        timeline = read_timeline(path)
        (frame,) = PyAVReader().read(path, timeline, [len(timeline) // 2])
        for shape in row["scene"]["shapes"]:
            difference = np.abs(frame.astype(int) - COLOURS[shape["colour"]]).max(-1)
            area = 0.25 * (shape["diameter"] * min(frame.shape[:2])) ** 2
            assert (difference <= 8).sum() > area


def test_a_negative_number_of_clips_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_val = -1"):
        write_dataset(tmp_path, num_val=-1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pairs", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_off_centre_shapes_stay_whole_and_most_leave_the_square_crop(pairs: bool) -> None:
    rng = np.random.default_rng(3)
    cut = []
    for scene in scenes(60, pairs):
        moved = off_centre(scene, rng)
        side = min(scene.height, scene.width)
        if scene.height == scene.width:
            assert moved == scene
            continue
        shown = masks(moved, render(moved))
        before = masks(scene, render(scene))
        assert np.allclose(shown.sum((2, 3)), before.sum((2, 3)), rtol=0.12)  # as large as it was
        assert not shown[..., [0, -1], :].any()
        assert not shown[..., [0, -1]].any()
        top, left = (scene.height - side) // 2, (scene.width - side) // 2
        crop = shown[..., top : top + side, left : left + side]
        cut.append(crop.sum() < 0.99 * shown.sum())
    assert 0.3 < np.mean(cut) < 0.9


def test_clips_with_shapes_anywhere_have_the_captions_of_those_in_the_centre(
    tmp_path: Path,
) -> None:
    counts = {"num_train": 6, "num_val": 0, "num_test": 0}
    near, far = (
        [json.loads(line) for line in paths["train"].read_text().splitlines()]
        for paths in (
            write_dataset(tmp_path / "near", **counts),
            write_dataset(tmp_path / "far", **counts, anywhere=True),
        )
    )
    assert [row["caption"] for row in near] == [row["caption"] for row in far]
    assert [row["scene"] for row in near] != [row["scene"] for row in far]
    with pytest.raises(ValueError, match="anywhere = True, edits = True"):
        write_dataset(tmp_path / "edits", edits=True, anywhere=True)


def test_an_edit_changes_one_thing_and_stays_in_the_image() -> None:
    rng = np.random.default_rng(0)
    seen = set(triples(False))
    for target in triples(False) + triples(True):
        for source in edits_of(target):
            before = random_scene([source], rng)
            after = edited(before, target)
            (old,), (new,) = before.shapes, after.shapes
            assert source in seen
            assert Triple(new.shape, new.colour, new.direction) == target
            assert sum(a != b for a, b in zip(source, target, strict=True)) == 1
            same = replace(new, **source._asdict(), x=old.x, y=old.y)
            assert replace(after, shapes=(same,)) == before
            if source.direction == target.direction:
                assert (new.x, new.y) == (old.x, old.y)
                continue
            if target.colour not in ("red", "green"):  # an image of each would take long
                continue
            (mask,) = masks(after, render(after))
            assert mask.any((1, 2)).all()
            assert not mask[:, [0, -1]].any()
            assert not mask[:, :, [0, -1]].any()


def test_instructions_name_what_is_to_change_and_never_what_stays() -> None:
    rng = np.random.default_rng(0)
    new = {phrase.split()[-1] for phrases in TOWARDS.values() for phrase in phrases}
    for target in triples(False) + triples(True):
        for source in edits_of(target):
            wordings = instructions(source, target, rng)
            assert len({w.lower().strip(".") for w in wordings}) >= 3
            for wording in wordings:
                words = wording.lower().strip(".").split()
                new = {
                    w for way in TOWARDS.values() for phrase in way for w in [phrase.split()[-1]]
                }
                for kind, known in enumerate((SHAPES, COLOURS)):
                    named = [word for word in words if word in known]
                    if source[kind] != target[kind]:
                        assert named[-1] == target[kind]
                        assert set(named) <= {source[kind], target[kind]}
                    else:
                        assert set(named) <= {source[kind]}
                ways = [word for word in words if word in new]
                changed = source.direction != target.direction
                assert all(way.startswith(target.direction) for way in ways)
                assert bool(ways) == changed


def test_pairs_hold_out_the_same_combinations(tmp_path: Path) -> None:
    manifests = write_dataset(tmp_path, 12, 4, 26, edits=True)
    seen, held_out = set(triples(False)), set(triples(True))
    for split, allowed in (("train", seen), ("val", seen), ("test", held_out)):
        rows = [json.loads(line) for line in manifests[split].read_text().splitlines()]
        for row in rows:
            source, target = (
                Triple(*(row[key]["shapes"][0][name] for name in Triple._fields))
                for key in ("source_scene", "scene")
            )
            assert target in allowed
            assert source in seen & set(edits_of(target))
        assert all((tmp_path / row["source"]).is_file() for row in rows)
        assert len({row["path"] for row in rows} | {row["source"] for row in rows}) == 2 * len(rows)
        kinds = {row["caption"][0].split()[-1] for row in rows}
        assert split != "test" or kinds & set(COLOURS)
        assert split != "test" or kinds & set(SHAPES)
