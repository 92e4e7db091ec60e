"""Captions by people and by a captioner: which rows take part, how often each kind is served."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from sora_lightning.data import Captions, Removal, VideoDataModule, read_manifest
from sora_lightning.data.batching.windows import EvenWindows, RandomWindows
from sora_lightning.data.manifest.memory_mapped import open_manifest
from sora_lightning.data.manifest.tables import read_rows, write_rows
from tests.data.modules import data_module
from tests.data.test_datamodule import Recorder, trainer

MIXED = Captions(synthetic="caption_synthetic", synthetic_share=0.5)
KINDS = {
    "both": {"caption": "by people", "caption_synthetic": "synthetic"},
    "people": {"caption": "by people"},
    "synthetic": {"caption_synthetic": "synthetic"},
    "none": {},
}


def write(folder: Path, suffix: str = ".jsonl", kinds: dict[str, Any] = KINDS) -> Path:
    for name in kinds:
        (folder / f"{name}.mp4").touch()
    rows = [{"path": f"{name}.mp4", **row} for name, row in kinds.items()]
    write_rows(folder / f"clips{suffix}", rows)
    return folder / f"clips{suffix}"


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".arrow"])
def test_a_row_has_the_captions_of_the_chosen_columns(suffix: str, tmp_path: Path) -> None:
    records = open_manifest(write(tmp_path, suffix), Captions(synthetic="caption_synthetic"))
    found = {record.path.stem: (record.captions, record.weights) for record in records}
    assert found["both"][0] == ("by people", "synthetic")
    assert found["both"][1] == pytest.approx((0.05, 0.95))
    assert found["people"] == (("by people",), (1.0,))
    assert found["synthetic"] == (("synthetic",), (1.0,))
    assert found["none"] == ((), ())
    alone = open_manifest(tmp_path / f"clips{suffix}", Captions(required=False))
    assert [record.captions for record in alone] == [("by people",)] * 2 + [("",)] * 2


def test_wordings_share_the_weight_of_their_column(tmp_path: Path) -> None:
    wordings = [{"text": "short", "weight": 3}, {"text": "long", "weight": 1}]
    manifest = write(tmp_path, kinds={"a": {"caption": wordings, "caption_synthetic": ["x", "y"]}})
    (record,) = read_manifest(manifest, MIXED)
    assert record.captions == ("short", "long", "x", "y")
    assert record.weights == pytest.approx((0.375, 0.125, 0.25, 0.25))


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".arrow", ".jsonl"])
def test_further_captions_may_be_lists_in_every_format(suffix: str, tmp_path: Path) -> None:
    kinds = {"a": {"caption": "x", "caption_descriptive": ["one", "two"]}, "b": {"caption": "7"}}
    captions = Captions("caption_descriptive")
    first, second = open_manifest(write(tmp_path, suffix, kinds), captions)
    assert first.captions == ("one", "two")
    assert second.captions == ()
    assert [row["caption"] for _, row in read_rows(tmp_path / f"clips{suffix}")] == ["x", "7"]


def test_the_share_is_that_of_the_draws_and_validation_sees_people(tmp_path: Path) -> None:
    record, *_ = read_manifest(write(tmp_path), Captions(synthetic="caption_synthetic"))
    drawn = Counter(RandomWindows(0)(record, repeat).caption for repeat in range(2000))
    # Six standard deviations of a binomial count.
    assert drawn["synthetic"] / 2000 == pytest.approx(0.95, abs=6 * (0.95 * 0.05 / 2000) ** 0.5)
    assert EvenWindows(1)(record, 0).caption == "by people"
    for share, always in ((0.0, "by people"), (1.0, "synthetic")):
        captions = Captions(synthetic="caption_synthetic", synthetic_share=share)
        record, *_ = read_manifest(tmp_path / "clips.jsonl", captions)
        assert {RandomWindows(0)(record, repeat).caption for repeat in range(20)} == {always}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"synthetic_share": 1.5}, r"synthetic_share = 1\.5: must lie in \[0, 1\]"),
        (
            {"synthetic": "caption"},
            "synthetic = 'caption': is the column of the captions by people",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Captions(**arguments)


def test_an_empty_caption_stays_an_error(tmp_path: Path) -> None:
    manifest = write(tmp_path, kinds={"a": {"caption": "x", "caption_synthetic": " "}})
    with pytest.raises(ValueError, match=r"clips.jsonl:1: caption_synthetic = ' ': .* not a capt"):
        read_manifest(manifest, MIXED)


@pytest.fixture
def mixed(shapes: dict[str, Path]) -> Path:
    """Clips of which a third have both captions, a third one kind each, and three have none."""
    lines = shapes["train"].read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for i, row in enumerate(rows):
        row.pop("caption")
        row |= {"caption": f"people {i}"} if i % 3 != 1 else {}
        row |= {"caption_synthetic": f"synthetic {i}"} if i % 3 != 2 else {}
    for row in rows[:3]:
        row.pop("caption", None)
        row.pop("caption_synthetic", None)
    path = shapes["train"].with_name("mixed.jsonl")
    write_rows(path, rows)
    return path


def module(manifest: Path, **settings: Any) -> VideoDataModule:
    sizes, budget = ["9x16x16", "9x12x20", "9x20x12"], 4 * 9 * 16 * 16
    return data_module(manifest, sizes, pixels_per_batch=budget, captions=MIXED, **settings)


def fed(data: VideoDataModule, folder: Path, steps: int, resume: Path | None = None) -> list:
    recorder = Recorder()
    saving = ModelCheckpoint(folder, "last", every_n_train_steps=1)
    one = trainer(folder, max_steps=steps, callbacks=[saving], enable_checkpointing=True)
    one.fit(recorder, data, ckpt_path=resume)
    return [
        (clip, text)
        for ids, texts, _ in recorder.fed
        for clip, text in zip(ids, texts, strict=True)
    ]


def test_a_resumed_run_draws_the_captions_of_an_uninterrupted_one(
    mixed: Path, tmp_path: Path
) -> None:
    whole = fed(module(mixed, steps_per_epoch=4), tmp_path / "whole", 20)
    first = fed(module(mixed, steps_per_epoch=4), tmp_path / "parts", 9)
    last = tmp_path / "parts" / "last.ckpt"
    second = fed(module(mixed, steps_per_epoch=4, num_workers=1), tmp_path / "parts", 20, last)
    assert first + second == whole
    of_clip: dict[str, set[str]] = {}
    for clip, text in whole:
        of_clip.setdefault(clip, set()).add(text)
    assert max(map(len, of_clip.values())) == 2  # a clip with both is shown with each
    assert {text.split()[0] for texts in of_clip.values() for text in texts} == {
        "people",
        "synthetic",
    }


def test_two_ranks_together_see_the_captions_that_one_sees(mixed: Path) -> None:
    def served(rank: int, num_ranks: int, num_batches: int) -> list:
        data = module(mixed, run_length=2, steps_per_epoch=num_batches)
        data.setup("fit")
        data._ranks = lambda: (rank, num_ranks)  # type: ignore[method-assign]
        batches = list(data.train_dataloader())
        return [pair for b in batches for pair in zip(b.clip_ids, b.captions, strict=True)]

    assert sorted(served(0, 2, 8) + served(1, 2, 8)) == sorted(served(0, 1, 16))


def test_clips_without_a_caption_are_counted_and_predict_serves_them(mixed: Path) -> None:
    data = module(mixed)
    (assignment,) = data.check().values()
    assert len(assignment.removed[Removal.NO_CAPTION]) == 3
    assert "3 left out: no caption in the columns of data.captions" in str(assignment)
    data.setup("predict")
    texts = [text for batch in data.predict_dataloader() for text in batch.captions]
    assert len(texts) == 30
    assert texts.count("") == 3


@pytest.mark.parametrize("suffix", [".jsonl", ".arrow"])
def test_a_column_that_no_row_has_is_named(suffix: str, mixed: Path, tmp_path: Path) -> None:
    manifest = mixed.with_suffix(suffix)
    if suffix == ".arrow":
        write_rows(manifest, [row for _, row in read_rows(mixed)])
    data = module(manifest)
    data.captions = Captions(synthetic="caption_syntetic")
    message = f"{manifest.name}: no row has the column that data.captions.synthetic = 'caption_synt"
    with pytest.raises(ValueError, match=message):
        data.setup("fit")
    data.setup("predict")  # which reads no captions
