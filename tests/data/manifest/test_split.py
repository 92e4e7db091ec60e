"""Files held out of a training stay out, whatever the rows say of them."""

import json

import pytest

from sora_lightning.__main__ import main
from sora_lightning.data import Captions, read_manifest
from sora_lightning.data.decoding.shards import ShardFiles, write_shards
from sora_lightning.data.manifest.split import split
from sora_lightning.data.synthetic import hide_captions

ROOT = "/"  # the halves lie apart from the clips


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    rows = []
    for number in range(10):
        (folder / f"{number}.mp4").touch()
        rows += [
            {"path": f"{number}.mp4", "caption": "one", "start_s": 0, "end_s": 1},
            {"path": f"{number}.mp4", "caption": "two", "start_s": 1, "end_s": 2},
        ]
    (folder / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "all.jsonl"


def files(manifest):
    return {record.path.resolve() for record in read_manifest(manifest, root=ROOT)}


def test_no_file_stands_on_both_sides_and_none_is_lost(source, tmp_path):
    output = tmp_path / "deep" / "er"
    arguments = ("--source", str(source), "--output", str(output), "--num-held-out", "3")
    assert main(["split", *arguments]) == 0
    train, test = files(output / "train.jsonl"), files(output / "test.jsonl")
    assert not train & test
    assert len(test) == 3
    assert train | test == files(source)
    assert len(read_manifest(output / "test.jsonl", root=ROOT)) == 6


def test_the_draw_is_of_names_and_seed(source, tmp_path):
    lines = source.read_text().splitlines()
    split(source, tmp_path / "a", 3)
    source.write_text("\n".join(reversed(lines)))
    split(source, tmp_path / "b", 3)
    split(source, tmp_path / "c", 3, seed=1)
    drawn = [files(tmp_path / part / "test.jsonl") for part in "abc"]
    assert drawn[0] == drawn[1] != drawn[2]


def test_clips_in_shards_keep_their_names_and_are_read_from_another_folder(barcodes, tmp_path):
    for frames, name in enumerate("abc", start=8):  # files of one content would count as one
        barcodes(f"{name}.mp4", range(0, 100 * frames, 100))
    (tmp_path / "all.jsonl").write_text(
        "".join(json.dumps({"path": f"{name}.mp4", "caption": name}) + "\n" for name in "abc")
    )
    sharded = write_shards(tmp_path / "all.jsonl", tmp_path / "shards")
    output = tmp_path / "deep" / "er"
    split(sharded, output, 1)
    parts = [read_manifest(output / f"{part}.jsonl", root=ROOT) for part in ("train", "test")]
    assert [len(part) for part in parts] == [2, 1]
    files = ShardFiles()
    originals = {record.clip_id: record.path for record in read_manifest(tmp_path / "all.jsonl")}
    contents = {name: path.read_bytes() for name, path in originals.items()}
    held = {record.clip_id: files.local(record).read_bytes() for part in parts for record in part}
    assert held == contents
    hide_captions(sharded, output / "few.jsonl", kept=0.5)
    few = read_manifest(output / "few.jsonl", Captions(), ROOT)
    assert {record.clip_id: files.local(record).read_bytes() for record in few} == contents


@pytest.mark.parametrize("number", [0, 10])
def test_both_sides_hold_a_file(source, tmp_path, number):
    with pytest.raises(ValueError, match=rf"num_held_out = {number}: must be from 1 to 9"):
        split(source, tmp_path / "out", number)
    assert not (tmp_path / "out").exists()
