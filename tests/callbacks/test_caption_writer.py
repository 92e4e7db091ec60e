"""Captions of a manifest's clips are gone on with where they were left, by one rank or several, and
overwrite nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sora_lightning.callbacks import CaptionWriter
from sora_lightning.captioner.captioned_manifest import CaptionedManifest, Written
from sora_lightning.captioner.decoding import Decoding, Greedy, Nucleus
from sora_lightning.data import Captions, VideoDataModule, read_manifest
from sora_lightning.data.manifest.tables import Row
from sora_lightning.systems import CaptionerSystem, RecaptioningSystem
from sora_lightning.types import VideoBatch
from tests.captioner.networks import coca
from tests.data.conftest import shapes
from tests.data.modules import data_module
from tests.data.test_datamodule import trainer

__all__ = ["shapes"]
COLUMNS = ("caption_synthetic", "caption_synthetic_model", "caption_synthetic_decoding")


class Counting(CaptionerSystem):
    """Counts the clips that it captions, and may stop midway."""

    def __init__(
        self,
        stop: int = 10**9,
        words: str = "",
        decoding: Decoding | None = None,
        captions_per_clip: int = 1,
    ) -> None:
        network, decoding = coca(), decoding or Greedy(max_tokens=2)
        if words:
            network.bpe.train_on([words])
        super().__init__(network, decoding=decoding, captions_per_clip=captions_per_clip)
        self.stop, self.captioned = stop, 0

    def predict_step(
        self, batch: VideoBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> list[list[str]]:
        if self.captioned >= self.stop:
            raise RuntimeError("power cut")
        self.captioned += len(batch)
        written = super().predict_step(batch, batch_idx)
        pairs = zip(written, batch.clip_ids, strict=True)
        return [[f"{caption} {clip}" for caption in captions] for captions, clip in pairs]


def predict(
    system: CaptionerSystem,
    manifest: Path,
    place: tuple[int, int] = (0, 1),
    output: str = "captioned.jsonl",
    fps: float = 8.0,
) -> None:
    class Share(VideoDataModule):
        def _ranks(self) -> tuple[int, int]:
            return place

    data = data_module(
        manifest, ["9x16x16", "9x16x24"], fps, 4 * 9 * 16 * 24, Share, windows_per_clip=2,
        captions=Captions(), max_bad_share=0.2,
    )  # fmt: skip
    writer = CaptionWriter(manifest.parent / output)
    trainer(manifest.parent, callbacks=[writer]).predict(system, data, return_predictions=False)


def rows_of(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def manifest(shapes: dict[str, Path], tmp_path: Path) -> Iterator[Path]:
    """A third of the clips have captions by people."""
    shutil.copytree(shapes["train"].parent / "train", tmp_path / "train")
    rows = [row | {"note": 1.5} for row in rows_of(shapes["train"])]
    for index, row in enumerate(rows):
        if index % 3:
            del row["caption"]
    write(tmp_path / "clips.jsonl", rows)
    yield tmp_path / "clips.jsonl"
    assert rows_of(tmp_path / "clips.jsonl") == rows  # as people wrote it


def captions_of(manifest: Path) -> list[str]:
    """The captions in the copy, whose other columns are those of the manifest."""
    rows = rows_of(manifest.with_name("captioned.jsonl"))
    others = [{k: v for k, v in row.items() if k not in COLUMNS} for row in rows]
    assert others == rows_of(manifest)
    assert len({row[COLUMNS[1]] for row in rows}) == 1
    how = "Greedy(max_tokens=2), seed=0, captions_per_clip=1, fps=8, sizes=9x16x16,9x16x24"
    assert {row[COLUMNS[2]] for row in rows} == {how}
    return [row[COLUMNS[0]] for row in rows]


def test_a_predict_cut_short_goes_on_and_captions_nothing_twice(manifest: Path) -> None:
    first, second, third = Counting(stop=12), Counting(), Counting()
    with pytest.raises(RuntimeError, match="power cut"):
        predict(first, manifest)
    assert not manifest.with_name("captioned.jsonl").exists()
    (part,) = manifest.parent.glob(".captioned.jsonl.captions-*")
    part.write_text(part.read_text() + '["0123", "cut of')
    predict(second, manifest)
    parts = captions_of(manifest)
    assert first.captioned + second.captioned == 30 == len(set(parts))
    predict(third, manifest)
    assert third.captioned <= 6  # one batch, which shows that the captioner is still the same
    assert captions_of(manifest) == parts
    assert not list(manifest.parent.glob(".captioned*"))
    manifest.with_name("captioned.jsonl").unlink()
    predict(Counting(), manifest)
    assert captions_of(manifest) == parts


def test_ranks_share_the_work_and_a_run_of_another_number_ends_it(manifest: Path) -> None:
    first, second = Counting(), Counting()
    predict(first, manifest, (0, 2))
    assert 0 < first.captioned < 30
    predict(second, manifest)
    assert first.captioned + second.captioned == 30 == len(set(captions_of(manifest)))


def test_one_missing_caption_leaves_no_rank_without_a_batch(manifest: Path) -> None:
    predict(Counting(), manifest)
    whole = captions_of(manifest)
    output = manifest.with_name("captioned.jsonl")
    rows = rows_of(output)
    rows[7] = rows_of(manifest)[7]
    write(output, rows)
    for rank in (1, 0):
        predict(one := Counting(), manifest, (rank, 2))
        assert 0 < one.captioned <= 6
    assert captions_of(manifest) == whole


def test_a_clip_that_cannot_be_read_loses_its_caption_alone_and_is_named(manifest: Path) -> None:
    rows = rows_of(manifest)
    bad = manifest.with_name("bad.mp4")
    bad.write_bytes(b"no video")
    rows[4]["path"] = bad.name
    copy = manifest.with_name("with_bad.jsonl")
    write(copy, rows)
    predict(Counting(), copy)
    captioned = rows_of(manifest.with_name("captioned.jsonl"))
    assert captioned[4] == rows[4]
    assert [COLUMNS[0] in row for row in captioned] == [index != 4 for index in range(30)]
    assert [row["path"] for row in rows_of(manifest.with_name("bad_clips.jsonl"))] == [str(bad)]


def test_several_captions_of_a_clip_are_draws_of_which_each_repeat_is_served_one(
    manifest: Path,
) -> None:
    several = {"decoding": Nucleus(max_tokens=6, top_p=1.0), "captions_per_clip": 3}
    with pytest.raises(RuntimeError, match="power cut"):
        predict(Counting(stop=12, **several), manifest)
    predict(Counting(**several), manifest)
    rows = rows_of(manifest.with_name("captioned.jsonl"))
    assert {len(row[COLUMNS[0]]) for row in rows} == {3}
    assert any(len(set(row[COLUMNS[0]])) > 1 for row in rows)
    manifest.with_name("captioned.jsonl").unlink()
    predict(Counting(**several), manifest)  # in one go
    assert rows_of(manifest.with_name("captioned.jsonl")) == rows
    predict(
        again := Counting(**several), manifest.with_name("captioned.jsonl"), output="more.jsonl"
    )
    assert again.captioned <= 6
    served = read_manifest(
        manifest.with_name("captioned.jsonl"), Captions(synthetic=COLUMNS[0], synthetic_share=1.0)
    )
    assert list(served[1].captions) == rows[1][COLUMNS[0]]
    assert served[1].weights == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize(
    ("decoding", "number", "message"),
    [
        (Greedy(), 4, "captions_per_clip = 4: Greedy would write the same caption each time"),
        (Nucleus(), 0, "captions_per_clip = 0: must be at least 1"),
    ],
)
def test_captions_that_would_be_equal_or_none_are_refused(
    decoding: Decoding, number: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RecaptioningSystem(coca(), decoding, captions_per_clip=number)


@pytest.mark.parametrize(
    ("other", "fps"),
    [
        ({"words": "another vocabulary"}, 8.0),
        ({"decoding": Greedy(max_tokens=3)}, 8.0),
        ({"decoding": Nucleus(max_tokens=2), "captions_per_clip": 2}, 8.0),
        ({}, 4.0),
    ],
)
def test_another_captioner_is_refused_before_it_captions(
    manifest: Path, other: dict[str, Any], fps: float
) -> None:
    predict(Counting(), manifest)
    before = manifest.with_name("captioned.jsonl").read_bytes()
    system = Counting(**other)
    with pytest.raises(ValueError, match=r"was written by captioner .* and this is"):
        predict(system, manifest, fps=fps)
    assert system.captioned == 0
    assert manifest.with_name("captioned.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("clips.jsonl", "is the manifest itself"),
        ("train/captioned.jsonl", "must lie in"),
        ("captioned.txt", "must end in one of .jsonl"),
        ("people.jsonl", "people.jsonl:1: differs from .* would be overwritten"),
    ],
)
def test_an_output_that_would_lose_work_is_refused(
    manifest: Path, output: str, message: str
) -> None:
    write(manifest.with_name("people.jsonl"), [row | {"note": 2} for row in rows_of(manifest)])
    system = Counting()
    with pytest.raises(ValueError, match=message):
        predict(system, manifest, output=output)
    assert system.captioned == 0


def test_captions_by_people_are_not_taken_for_a_captioners(manifest: Path) -> None:
    people = manifest.with_name("people.jsonl")
    write(people, [row | {"caption_synthetic": "by hand"} for row in rows_of(manifest)])
    with pytest.raises(ValueError, match=r":1: caption_synthetic = 'by hand': no caption_synthe"):
        CaptionedManifest(people, manifest.with_name("captioned.jsonl"))
    with pytest.raises(ValueError, match=r"captions.column = 'caption': must begin with"):
        CaptionedManifest(people, manifest.with_name("captioned.jsonl"), "caption")


def test_an_empty_caption_is_no_caption(manifest: Path) -> None:
    captioned = CaptionedManifest(manifest, manifest.with_name("captioned.jsonl"))
    first, second = (record.clip_id for record in read_manifest(manifest, Captions())[:2])
    captioned.add(0, {first: Written(["", ""], "m", "d"), second: Written(["one", ""], "m", "d")})
    assert captioned.write().endswith(": 1 of 30 clips have a caption_synthetic")
    assert [row.get(COLUMNS[0]) for row in rows_of(captioned.output)][:2] == [None, "one"]


def test_a_caption_that_no_manifest_may_hold_is_mended(manifest: Path) -> None:
    captioned = CaptionedManifest(manifest, manifest.with_name("captioned.jsonl"))
    first = read_manifest(manifest, Captions())[0].clip_id
    captioned.add(0, {first: Written(["red\0 \ud800circle"], "m", "d")})
    captioned.write()
    served = read_manifest(captioned.output, Captions(synthetic=COLUMNS[0], synthetic_share=1.0))
    assert served[0].captions[-1] == "red\ufffd \ufffdcircle"
