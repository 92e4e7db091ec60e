"""A manifest names files in its own folder, or under the root that its reader allows, and no other:
in every command that reads one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evaluation.features.tiny import TinyFile
from evaluation.inputs import read_folder, read_listing
from evaluation.models.frame_tasks.cases import real_cases
from evaluation.protocol import load_protocol
from evaluation.train_tiny import TinyTraining, train_tiny
from evaluation.training_scores import FVD
from sora_lightning.__main__ import main
from sora_lightning.cli.check import check
from sora_lightning.data import VideoDataModule, read_manifest, write_shards
from sora_lightning.data.manifest import read_prompts
from sora_lightning.data.manifest.index import index
from sora_lightning.data.manifest.memory_mapped import open_manifest
from sora_lightning.data.manifest.roots import Roots
from sora_lightning.data.manifest.split import split
from sora_lightning.data.manifest.tables import write_rows
from sora_lightning.data.settings import Batching, Reading
from sora_lightning.data.synthetic import hide_captions, simulate_captions

OUTSIDE = "lies outside of the manifest's folder"
FACTS = {"num_frames": 1, "fps": 8, "height": 32, "width": 32}


def module(manifest: Path, root: str | None) -> None:
    batching = Batching(["1x32x32"], 1024)
    VideoDataModule(manifest, batching=batching, reading=Reading(root=root)).setup("fit")


def pairs(manifest: Path, root: str | None) -> None:
    batching, reading = Batching(["1x32x32"], 1024), Reading(root=root, sources=True)
    VideoDataModule(manifest, batching=batching, reading=reading).setup("fit")


def arrow(manifest: Path, root: str | None) -> None:
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    write_rows(manifest.with_suffix(".arrow"), rows)
    open_manifest(manifest.with_suffix(".arrow"), root=root)


def generated(manifest: Path, root: str | None) -> None:
    (manifest.parent / "prompts.jsonl").write_text(manifest.read_text())
    read_folder(manifest.parent, root=root)


def distance(manifest: Path, root: str | None) -> None:
    scores = FVD(TinyFile("random"), manifest, cache=manifest.parent / "cache", root=root)
    scores.prepare(["a red circle"] * 8, 4, 32, 32, 8.0)


def small_networks(manifest: Path, root: str | None) -> None:
    clips = load_protocol("demo").clips
    train_tiny(manifest, manifest.with_name("tiny.pt"), None, clips, TinyTraining(), root)


Reader = Callable[[Path, str | None], Any]
READERS: dict[str, Reader] = {
    "read_manifest": lambda manifest, root: read_manifest(manifest, root=root),
    "arrow": arrow,
    "module": module,
    "pairs": pairs,
    "check": lambda manifest, root: check(manifest=manifest, root=root),
    "index": lambda m, root: index(m, m.with_name("out.jsonl"), num_workers=1, root=root),
    "split": lambda m, root: split(m, m.parent / "out", 1, root=root),
    "simulate": lambda m, root: simulate_captions(m, m.with_name("out.jsonl"), root=root),
    "hide": lambda m, root: hide_captions(m, m.with_name("out.jsonl"), 1.0, root=root),
    "write_shards": lambda m, root: write_shards(m, m.parent / "out", root=root),
    "reference": lambda m, root: read_listing(m, root=root),
    "generated": generated,
    "distance": distance,
    "small_networks": small_networks,
    "tasks": lambda m, root: real_cases(m, 1, 1, 8.0, [(32, 32)], root),
}
# Those that read a column that others pass over.
OF_SOURCES = ("pairs", "read_manifest", "index", "split", "write_shards")
OF_SHARDS = ("read_manifest", "arrow", "module", "check", "split", "hide")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder of a clip, a link out of it, and a file beside it that it must not reach."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for path in (folder / "a.png", tmp_path / "secret.png"):
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(path)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "there").symlink_to(tmp_path)
    (folder / "clips-of-others").mkdir()
    yield folder
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "tiny.pt"]
    kept = {"a.png", "secret.png", "link.png", "clips.jsonl", "prompts.jsonl", "clips.arrow"}
    assert {path.name for path in written} <= kept  # what is refused leaves nothing behind


def manifest_of(folder: Path, *rows: dict) -> Path:
    path = folder / "clips.jsonl"
    scene = {"scene": None, "caption": "a red circle"}
    path.write_text("".join(json.dumps(scene | row) + "\n" for row in rows))
    return path


PATHS = {
    "absolute": "/etc/passwd",
    "parent": "../secret.png",
    "hidden": "./clips-of-others/../../secret.png",
    "link": "link.png",
    "link of a folder": "there/secret.png",
    "address": "file:///etc/passwd",
    "local": "local:///etc/passwd",
    "absent": "../absent.png",
    "the folder above": "..",
    "no name": "\0/etc/passwd",
    "half a letter": "\ud800.png",
}


@pytest.mark.parametrize("name", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("reader", READERS)
def test_a_path_outside_is_refused(reader: str, name: str, place: Path) -> None:
    if reader == "arrow" and "\ud800" in name:
        pytest.skip("Arrow holds no such text")
    manifest = manifest_of(place, {"path": name}, {"path": "a.png"})
    with pytest.raises(ValueError, match=OUTSIDE) as refused:
        READERS[reader](manifest, None)
    listing = {"generated": "prompts.jsonl", "arrow": "clips.arrow"}.get(reader, "clips.jsonl")
    assert f"{place / listing}:1: path = {name!r}: {OUTSIDE} {place};" in str(refused.value)
    assert "data.reading.root" in str(refused.value)
    assert "--root" in str(refused.value)


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret.png", "link.png"])
@pytest.mark.parametrize("reader", OF_SOURCES)
def test_a_source_outside_is_refused(reader: str, name: str, place: Path) -> None:
    manifest = manifest_of(place, {"path": "a.png", "source": name})
    with pytest.raises(ValueError, match=f"source = .*{OUTSIDE}"):
        READERS[reader](manifest, None)


@pytest.mark.parametrize(
    "holder",
    [
        *(f"{protocol}://host/clips" for protocol in ("s3", "gs", "http", "https", "memory")),
        *("file:///etc/passwd", "simplecache::file:///etc/passwd", "/etc/passwd", "../x.tar"),
    ],
)
@pytest.mark.parametrize("column", ["shard", "litdata"])
@pytest.mark.parametrize("reader", OF_SHARDS)
def test_a_shard_outside_is_refused_before_it_is_asked_for(
    reader: str, column: str, holder: str, place: Path
) -> None:
    part = {"offset": 0, "size": 9, "item": 0} | FACTS
    manifest = manifest_of(place, {"path": "a.png", column: holder} | part)
    with pytest.raises(ValueError, match=f"{column} = .*{OUTSIDE}"):
        READERS[reader](manifest, None)


def test_a_folder_is_no_way_out(place: Path) -> None:
    (place / "there").unlink()
    (place / "a.txt").write_text("a red circle")
    with pytest.raises(ValueError, match=rf"link\.png: path = 'link.png': {OUTSIDE}"):
        read_manifest(place)
    (place / "link.png").unlink()
    (place / "a.txt").unlink()
    (place / "a.txt").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match=rf"a\.txt: path = 'a.txt': {OUTSIDE}"):
        read_manifest(place)
    (place / "a.txt").unlink()


@pytest.mark.parametrize("spelled", ["", "/", "/."])
def test_a_root_is_one_folder_more(spelled: str, place: Path) -> None:
    root = f"{place.parent}{spelled}"
    names = ("a.png", "../secret.png", "link.png", f"{place.parent}/secret.png")
    manifest = manifest_of(place, *({"path": name, "start_s": n} for n, name in enumerate(names)))
    assert len(read_manifest(manifest, root=root)) == len(names)
    assert len(read_manifest(manifest, root="/")) == len(names)
    with pytest.raises(ValueError, match=r"clips\.jsonl:2: .* and of root = "):
        read_manifest(manifest, root=str(place / "clips-of-others"))
    manifest_of(place, {"path": "/etc/passwd"})
    with pytest.raises(ValueError, match=f"{OUTSIDE} .* and of root = {root};"):
        read_manifest(manifest, root=root)


@pytest.mark.parametrize(
    ("root", "inside", "outside"),
    [
        ("/data/clips", ["/data/clips/a.mp4"], ["/data/clips2/a.mp4", "s3://clips/a", "/data"]),
        (
            "s3://bucket/clips",
            ["s3://bucket/clips/a.tar", "s3://bucket/clips/b/..c"],
            [
                *("s3://bucket/clips2/a", "s3://bucket/clips/../a", "s3://bucket/clips/%2E%2e/a"),
                *("s3://other/a", "gs://bucket/clips/a", "s3://bucket/clips/a::file:///etc/passwd"),
                *("simplecache::s3://bucket/clips/a", "/etc/passwd", "file:///etc/passwd"),
            ],
        ),
        ("https://host", ["https://host/a"], ["https://host.others.org/a", "http://host/a"]),
        ("file:///data", ["/data/a", "file:///data/a"], ["/dat/a", "file:///data/../a"]),
    ],
)
def test_what_is_inside(root: str, inside: list[str], outside: list[str], tmp_path: Path) -> None:
    roots = Roots(tmp_path / "clips.jsonl", root)
    assert all(map(roots.inside, [*inside, "here.mp4"]))
    assert not any(map(roots.inside, outside))


def test_a_provenance_and_a_clip_in_a_shard_name_what_they_like(place: Path) -> None:
    (place / "x.tar").write_bytes(b"x" * 99)
    row = {"path": "/raw/a.png", "shard": "x.tar", "offset": 0, "size": 9} | FACTS
    manifest = manifest_of(place, row, {"path": "a.png", "source": "https://library.org/a.png"})
    assert [record.path.name for record in read_manifest(manifest)] == ["a.png", "a.png"]
    with pytest.raises(ValueError, match=r"shard = 'x.tar': only files of their own"):
        index(manifest, place / "out.jsonl")
    (place / "x.tar").unlink()


def test_prompts_are_read_of_a_manifest_whose_clips_lie_elsewhere(place: Path) -> None:
    rows = read_prompts(manifest_of(place, {"path": "/etc/passwd", "caption": "a red circle"}))
    assert [row.first_caption() for row in rows] == ["a red circle"]


def test_commands_refuse_in_a_sentence_and_take_a_root(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = manifest_of(place, {"path": "../secret.png"}, {"path": "a.png"})
    given = partial(main, ["check", "--manifest", str(manifest)])
    assert given() == 2
    printed = capsys.readouterr()
    assert OUTSIDE in printed.err
    assert "Traceback" not in printed.err
    assert main(["check", "--manifest", str(manifest), "--root", str(place.parent)]) == 0
