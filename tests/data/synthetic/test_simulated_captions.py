"""Simulated captions are right but for the faults that were asked for."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from evaluation.metrics.alignment import parse_prompt
from sora_lightning.captioner.captioned_manifest import CaptionedManifest
from sora_lightning.data import Captions, read_manifest, write_dataset
from sora_lightning.data.synthetic import hide_captions, simulate_captions
from sora_lightning.data.synthetic.scenes import COLOURS


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    return write_dataset(root, num_train=120, num_val=0, num_test=0)["train"]


def rows(manifest: Path, output: Path, **options: object) -> list[dict]:
    simulate_captions(manifest, output, **options)  # type: ignore[arg-type]
    return [json.loads(line) for line in output.read_text().splitlines()]


def named(text: str) -> list[tuple]:
    return [(one.colour, one.shape, one.direction) for one in parse_prompt(text)]


def shown(row: dict) -> list[tuple]:
    shapes = row["scene"]["shapes"]
    return [(one["colour"], one["shape"], one["direction"]) for one in shapes]


def test_every_caption_says_what_the_clip_shows(manifest: Path, tmp_path: Path) -> None:
    for row in rows(manifest, tmp_path / "new" / "train.jsonl"):
        short = row["caption"]
        for text in (*short, row["caption_descriptive"], row["caption_synthetic"]):
            assert named(text) == shown(row)
        assert max(map(len, short)) < len(row["caption_descriptive"])
    captions = Captions(synthetic="caption_synthetic")
    records = read_manifest(tmp_path / "new" / "train.jsonl", captions, str(manifest.parent))
    originals = read_manifest(manifest)
    assert [one.path.resolve() for one in records] == [one.path.resolve() for one in originals]


def test_the_share_by_people_is_exact(manifest: Path, tmp_path: Path) -> None:
    found = rows(manifest, tmp_path / "x.jsonl", by_people=1 / 3)
    assert sum("caption" in row for row in found) == 40
    assert all(("caption" in row) == ("caption_descriptive" in row) for row in found)
    assert all("caption_synthetic" in row for row in found)
    captioned = CaptionedManifest(tmp_path / "x.jsonl", tmp_path / "y.jsonl")  # not by people
    with pytest.raises(ValueError, match=r"by captioner simulated with colour_errors=0\.0"):
        captioned.require("another", "Greedy")


def test_colours_are_exchanged_at_the_rate_and_nothing_else_is(
    manifest: Path, tmp_path: Path
) -> None:
    found = rows(manifest, tmp_path / "x.jsonl", colour_errors=0.3)
    wrong = Counter()
    for row in found:
        assert [named(text) for text in row["caption"]] == [shown(row)] * 2
        for said, true in zip(named(row["caption_synthetic"]), shown(row), strict=True):
            assert said[1:] == true[1:]
            wrong[said[0] != true[0]] += 1
    # Five standard deviations of a binomial count.
    assert wrong[True] / wrong.total() == pytest.approx(0.3, abs=5 * (0.21 / wrong.total()) ** 0.5)
    assert rows(manifest, tmp_path / "y.jsonl", colour_errors=0.3) == found
    assert rows(manifest, tmp_path / "z.jsonl", colour_errors=0.3, seed=1) != found


def test_a_colour_is_never_named(manifest: Path, tmp_path: Path) -> None:
    found = rows(manifest, tmp_path / "x.jsonl", unnamed="red")
    assert not any("red" in row["caption_synthetic"] for row in found)
    assert any("red" in row["caption"][0] for row in found)
    others = [row for row in found if "red" not in row["caption"][0]]
    assert all(named(row["caption_synthetic"]) == shown(row) for row in others)
    assert set(COLOURS) - {"red"} == {
        n[0] for row in others for n in named(row["caption_synthetic"])
    }


def test_a_part_of_the_clips_keeps_its_captions_unchanged(manifest: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "third.jsonl"
    hide_captions(manifest, output, kept=1 / 3)
    originals = read_manifest(manifest)
    records = read_manifest(output, Captions(), str(manifest.parent))
    assert [one.path.resolve() for one in records] == [one.path.resolve() for one in originals]
    kept = [(a.captions, b.captions) for a, b in zip(records, originals, strict=True) if a.captions]
    assert len(kept) == 40
    assert all(after == before for after, before in kept)
    with pytest.raises(ValueError, match=r"kept = 1.5: must lie in \[0, 1\]"):
        hide_captions(manifest, output, kept=1.5)


def test_a_manifest_is_not_overwritten_by_its_copy(manifest: Path) -> None:
    before = manifest.read_bytes()
    for write in (simulate_captions, partial(hide_captions, kept=0.5)):
        with pytest.raises(ValueError, match=r"output = .*train.jsonl: is the manifest itself"):
            write(manifest, manifest.parent / "." / manifest.name)
    assert manifest.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by_people": 2.0}, r"by_people = 2.0: must lie in \[0, 1\]"),
        ({"colour_errors": -0.1}, r"colour_errors = -0.1: must lie in \[0, 1\]"),
        ({"unnamed": "pink"}, "unnamed = pink: must be one of red, green"),
    ],
)
def test_faults_that_cannot_be_are_refused(
    options: dict, message: str, manifest: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        simulate_captions(manifest, tmp_path / "x.jsonl", **options)


def test_clips_without_a_scene_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"path": "a.mp4", "caption": "x"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl:1: scene: is missing: captions follow from it"):
        simulate_captions(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
