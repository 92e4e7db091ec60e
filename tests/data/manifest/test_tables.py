"""Every format of a table gives the same rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sora_lightning.data import read_manifest
from sora_lightning.data.batching.windows import RandomWindows
from sora_lightning.data.manifest.tables import read_rows, write_rows

ROWS = [
    {"path": "a.mp4", "caption": 'a "red", round ball', "fps": 8.0, "num_frames": 20, "height": 64,
     "width": 48, "motion": 0.5, "label": "ball"},
    {"path": "b.mp4", "caption": [{"text": "one", "weight": 3}, {"text": "two", "weight": 1}],
     "start_s": 1.0, "motion": 2},
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    return tmp_path


def read(path: Path) -> list:
    return [
        (r, r.columns.get("motion"), r.metadata, r.weights, r.label) for r in read_manifest(path)
    ]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".arrow"])
def test_every_format_holds_the_same_rows(suffix: str, folder: Path) -> None:
    if suffix != ".csv":
        pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    write_rows(folder / "clips.jsonl", ROWS)
    write_rows(folder / f"clips{suffix}", ROWS)
    assert read(folder / f"clips{suffix}") == read(folder / "clips.jsonl")
    assert read(folder / "clips.jsonl")[1][3] == (0.75, 0.25)


def test_the_columns_of_open_sora(folder: Path) -> None:
    (folder / "clips.csv").write_text(
        "path,text,num_frames,height,width,aspect_ratio,fps\n"
        'a.mp4,"a cat, asleep",51,480,640,0.75,25.5\nb.mp4,42,1,90,90,1.0,\n'
    )
    first, second = read_manifest(folder / "clips.csv")
    assert first.captions == ("a cat, asleep",)
    assert first.metadata is not None
    assert (first.metadata.num_frames, first.metadata.fps) == (51, 25.5)
    assert first.columns["aspect_ratio"] == 0.75
    assert second.captions == ("42",)
    assert second.metadata is None


def test_a_folder_of_media_with_texts_beside_them(folder: Path) -> None:
    (folder / "a.txt").write_text("first\n")
    (folder / "b.txt").write_text("second")
    (folder / "deep").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "deep" / "c.png")
    (folder / "deep" / "c.txt").write_text("third")
    (folder / "notes.pdf").touch()
    records = read_manifest(folder)
    assert [r.path.relative_to(folder).as_posix() for r in records] == [
        "a.mp4", "b.mp4", "deep/c.png",
    ]  # fmt: skip
    assert [r.captions for r in records] == [("first",), ("second",), ("third",)]
    (folder / "b.txt").unlink()
    with pytest.raises(ValueError, match=r"b.mp4: caption: must be"):
        read_manifest(folder)


def test_a_clip_is_the_same_clip_in_every_format(folder: Path) -> None:
    write_rows(folder / "clips.jsonl", [{"path": "a.mp4", "caption": "x"}])
    write_rows(folder / "clips.csv", [{"path": "a.mp4", "caption": "x"}])
    ids = {read_manifest(folder / f"clips{s}")[0].clip_id for s in (".jsonl", ".csv")}
    assert len(ids) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,caption\na.mp4,x,y\n", "clips.csv:2: does not have the 2 cells"),
        ("path,caption\na.mp4\n", "clips.csv:2: does not have the 2 cells"),
        ("path,caption\na.mp4,x\na.mp4,y\n", "clips.csv:3: path .* is in line 2"),
        ("path,caption,fps\na.mp4,x,fast\n", "clips.csv:2: fps = 'fast': must be a number"),
        ('path,caption\na.mp4,"x\n', "clips.csv:1: not CSV"),
        ("path,caption\n", "clips.csv: the manifest has no rows"),
        ("path, caption\na.mp4,x\n", "clips.csv:1: ' caption': a column's name must not begin"),
        ("path,caption,caption\na.mp4,x,y\n", "clips.csv:1: the column 'caption' stands twice"),
        ("Path,Caption\na.mp4,x\n", "path: must name .*; the row has 'Path', 'Caption'"),
    ],
)
def test_a_wrong_csv_is_named_by_its_line(content: str, message: str, folder: Path) -> None:
    (folder / "clips.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_manifest(folder / "clips.csv")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"caption": [{"text": "x", "weight": -1}]}, "weight = -1: must be finite and at least 0"),
        ({"caption": [{"text": "x", "weight": "2"}]}, "weight = '2': must be a number"),
        ({"caption": [{"text": "x", "weight": 0}]}, "the weights are all 0"),
        ({"caption": [{"words": "x"}]}, "is not a caption"),
        ({"caption": "x", "label": 1.5}, "label = 1.5: must be"),
        ({"caption": "x", "decoder": "vlc"}, "decoder = 'vlc': must be decord or pyav"),
    ],
)
def test_wrong_captions_labels_and_decoders(columns: dict, message: str, folder: Path) -> None:
    (folder / "clips.jsonl").write_text(json.dumps({"path": "a.mp4", **columns}))
    with pytest.raises(ValueError, match=f"clips.jsonl:1: .*{message}"):
        read_manifest(folder / "clips.jsonl")


def test_a_file_that_is_no_parquet_is_named(folder: Path) -> None:
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    (folder / "clips.parquet").write_text("no")
    with pytest.raises(ValueError, match=r"clips.parquet: not a Parquet file"):
        list(read_rows(folder / "clips.parquet"))
    with pytest.raises(
        ValueError, match=r"clips.txt: must end in one of .jsonl, .csv, .parquet, .arrow"
    ):
        write_rows(folder / "clips.txt", ROWS)


def test_wordings_are_drawn_by_their_weights(folder: Path) -> None:
    write_rows(folder / "clips.jsonl", ROWS)
    record = read_manifest(folder / "clips.jsonl")[1]
    drawn = [RandomWindows(0)(record, repeat).caption for repeat in range(2000)]
    assert abs(drawn.count("one") / 2000 - 0.75) < 0.04  # four standard deviations
