"""Clips that lie in a litdata dataset are the clips of the folder, in the same order."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from sora_lightning.data import ClipRecord, DecodeError, read_manifest
from sora_lightning.data.decoding.checksums import Checksums
from sora_lightning.data.decoding.readers import probe
from sora_lightning.data.decoding.shards import ShardFiles
from sora_lightning.types import VideoBatch
from tests.data.modules import data_module

SIZES = {"sizes": ["9x16x16", "9x12x20"], "pixels_per_batch": 4 * 9 * 16 * 16}


class Listed:
    """In the place of litdata's dataset: the items named by its ``index.json``."""

    opened: list[str]

    def __init__(self, folder: str, serializers: dict[str, object]) -> None:
        self.files = json.loads(Path(folder, "index.json").read_text())
        self.subsampled_files: list[str] = []
        self.opened.append(folder)

    def __getitem__(self, number: int) -> object:
        if number >= len(self.files):
            raise ValueError(f"The provided index {number} didn't find a match")
        content = Path(self.files[number]).read_bytes()
        return [{"video": content}, content][number % 2]


def replaced(record: ClipRecord, **columns: object) -> ClipRecord:
    return replace(record, columns={**record.columns, **columns})


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> type[Listed]:
    monkeypatch.setattr(Listed, "opened", [], raising=False)
    module = ModuleType("litdata")
    module.StreamingDataset = Listed  # type: ignore[attr-defined]
    module.streaming = SimpleNamespace(serializers=SimpleNamespace(_SERIALIZERS={}))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "litdata", module)
    return Listed


def write_list(folder: Path, files: list[Path]) -> None:
    (folder / "index.json").write_text(json.dumps([str(file) for file in files]))


def write_with_litdata(folder: Path, files: list[Path]) -> None:
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_size=7)
    for number, file in enumerate(files):
        writer[number] = {"video": file.read_bytes(), "name": file.name}
    writer.done()
    writer.merge()


def in_dataset(
    manifest: Path, folder: Path, write: Callable[[Path, list[Path]], None]
) -> tuple[Path, list[Path]]:
    """The rows of a manifest, their files in a dataset in reverse."""
    (folder / "clips").mkdir()
    files = [record.path for record in read_manifest(manifest)]
    write(folder / "clips", files[::-1])
    rows = []
    for number, record in enumerate(read_manifest(manifest)):
        place = {"litdata": "clips", "item": len(files) - 1 - number}
        rows.append({**record.columns, **vars(record.metadata or probe(record.path)), **place})
    (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "clips.jsonl", files


def batches(manifest: Path, workers: int, start: dict | None = None) -> tuple[list, dict]:
    data = data_module(manifest, **SIZES, num_workers=workers, steps_per_epoch=3)  # type: ignore[arg-type]
    data.setup("fit")
    loader = data.train_dataloader()
    if start is not None:
        loader.load_state_dict(start)
    return list(loader), loader.state_dict()


def assert_equal(some: list[VideoBatch], others: list[VideoBatch]) -> None:
    for one, other in zip(some, others, strict=True):
        assert (one.clip_ids, one.captions) == (other.clip_ids, other.captions)
        assert torch.equal(one.pixels, other.pixels)


def assert_the_dataset_serves_what_the_folder_does(folder: Path, dataset: Path) -> None:
    """With workers and without, and after a resume."""
    whole, state = batches(folder, 0)
    rest, _ = batches(folder, 0, state)
    for workers in (0, 2):
        begun, state = batches(dataset, workers)
        assert_equal(begun, whole)
        assert_equal(batches(dataset, workers, state)[0], rest)


def test_litdata_serves_the_batches_of_the_folder(shapes: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("litdata", reason="the extra litdata is not installed")
    manifest, files = in_dataset(shapes["train"], tmp_path, write_with_litdata)
    assert len(list((tmp_path / "clips").glob("*.bin"))) > 2
    assert_the_dataset_serves_what_the_folder_does(shapes["train"], manifest)
    record = read_manifest(manifest)[0]
    beyond = replaced(record, item=len(files))
    with pytest.raises(DecodeError, match=rf"clips: item {len(files)} cannot be read"):
        ShardFiles().local(beyond)


def test_any_dataset_of_items_does(
    listed: type[Listed], shapes: dict[str, Path], tmp_path: Path
) -> None:
    manifest, files = in_dataset(shapes["train"], tmp_path, write_list)
    assert_the_dataset_serves_what_the_folder_does(shapes["train"], manifest)
    kept = ShardFiles()
    listed.opened.clear()
    for record, file in zip(read_manifest(manifest), files, strict=True):
        content = file.read_bytes()
        assert kept.local(record).read_bytes() == content
        assert kept.local(record).suffix == file.suffix
    assert len(listed.opened) == 1
    assert Checksums().of(record) == hashlib.sha256(content).hexdigest()
    stamp = {"num_bytes": 3, "modified_ns": (tmp_path / "clips/index.json").stat().st_mtime_ns}
    assert Checksums().of(replaced(record, content="recorded", **stamp)) == "recorded"
    stamp["modified_ns"] -= 1
    assert Checksums().of(replaced(record, content="recorded", **stamp)) == Checksums().of(record)


def test_an_item_that_is_no_file_is_named(
    listed: type[Listed], shapes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, files = in_dataset(shapes["train"], tmp_path, write_list)
    record = read_manifest(manifest)[0]
    with pytest.raises(DecodeError, match=rf"clips: item {len(files)} cannot be read: The"):
        ShardFiles().local(replaced(record, item=len(files)))
    monkeypatch.setattr(Listed, "__getitem__", lambda self, number: {"image": b""})
    with pytest.raises(DecodeError, match=r"clips: item 29: must be the bytes of a video file"):
        ShardFiles().local(record)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"litdata": 3}, "litdata = 3: must name a folder of litdata"),
        ({"litdata": "absent"}, r"litdata = 'absent': no such file: .*absent/index\.json"),
        ({"item": None}, "item = None: must be the number of the clip in the dataset, from 0"),
        ({"item": 1.5}, r"item = 1\.5: must be the number"),
        ({"item": -1}, "item = -1: must be finite and at least 0"),
        ({"fps": None}, "litdata = 'clips': the row needs num_frames, fps, height and width"),
        ({"shard": "a.tar"}, "litdata = 'clips': shard is given as well"),
    ],
)
def test_rows_that_cannot_be_are_refused(
    change: dict, message: str, listed: type[Listed], shapes: dict[str, Path], tmp_path: Path
) -> None:
    manifest, _ = in_dataset(shapes["train"], tmp_path, write_list)
    row = json.loads(manifest.read_text().splitlines()[0])
    manifest.write_text(json.dumps({**row, **change}))
    with pytest.raises(ValueError, match=rf"clips\.jsonl:1: {message}"):
        read_manifest(manifest)


def test_without_litdata_the_row_names_the_extra(
    shapes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "litdata", None)
    manifest, _ = in_dataset(shapes["train"], tmp_path, write_list)
    message = r"clips\.jsonl:1: litdata = 'clips': .* needs litdata .*\[litdata\]"
    with pytest.raises(ValueError, match=message):
        read_manifest(manifest)
