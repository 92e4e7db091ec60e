"""No byte of a clip is served that is not the one that was indexed, where this is asked for; and no
file is hashed twice.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from sora_lightning.data import (
    ClipRecord,
    DecodeError,
    Packing,
    read_manifest,
    write_shards,
)
from sora_lightning.data.batching.clip_reader import ClipReader
from sora_lightning.data.batching.size_assignment import LatentKeys
from sora_lightning.data.decoding import checksums as checksums_module
from sora_lightning.data.decoding import shards as shards_module
from sora_lightning.data.decoding.checksums import Checksums
from sora_lightning.data.decoding.readers import default_reader
from sora_lightning.data.decoding.subprocess_decoding import SubprocessReader
from sora_lightning.data.manifest.index import index
from sora_lightning.files import file_sha256
from sora_lightning.types import VideoSize
from tests.data.decoding.spoil import spoiled
from tests.data.decoding.test_damaged_files import CLIPS, fixtures
from tests.data.modules import data_module

__all__ = ["fixtures"]
STEADY = list(range(0, 30 * 40, 40))
SIZE = VideoSize(3, 32, 64)
# Codecs whose streams have no checksums, by the names of their files.
WEAK = {
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "12", "qscale": "2"}},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "keyint=12:log-level=0"}},
    "vp9.webm": {
        "codec": "libvpx-vp9",
        "options": {"g": "12", "deadline": "realtime", "cpu-used": "8"},
    },
    "colours.gif": {"codec": "gif", "pix_fmt": "rgb8"},
}


def indexed_copies(sources: Sequence[Path], num_files: int, folder: Path) -> Path:
    """The manifest of so many copies of the sources in turn, as ``index`` writes it."""
    folder.mkdir()
    rows = []
    for number in range(num_files):
        source = sources[number % len(sources)]
        shutil.copy(source, folder / f"{number}{source.suffix}")
        rows.append({"path": f"{number}{source.suffix}", "caption": "x"})
    (folder / "raw.jsonl").write_text("\n".join(map(json.dumps, rows)))
    index(folder / "raw.jsonl", folder / "clips.jsonl", num_workers=2)
    return folder / "clips.jsonl"


def replace_in_place(path: Path, content: bytes) -> None:
    """Other bytes under the same name and time."""
    state = path.stat()
    assert content != path.read_bytes()
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def flipped(content: bytes, rng: np.random.Generator) -> bytes:
    """A few bits other than they were; as many bytes."""
    damaged = bytearray(content)
    for place in rng.choice(len(damaged), 5, replace=False):
        damaged[place] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def refusals(records: Sequence[ClipRecord], verify: bool) -> list[str]:
    """Why clips are refused, of those that are."""
    subprocess_reader = SubprocessReader(default_reader(), timeout_s=60.0)
    reader = ClipReader(subprocess_reader, 5.0, Checksums(verify))
    reasons = []
    for record in records:
        try:
            reader.read(record, SIZE, 0.5)
        except DecodeError as error:
            reasons.append(str(error))
    subprocess_reader.caller.close()
    return reasons


def test_damage_that_leaves_size_and_time_is_refused_where_content_is_verified(
    barcodes: Callable[..., Path], tmp_path: Path
) -> None:
    """On 20 files of the codecs that decode damaged bits to frames like any other."""
    sources = [barcodes(name, STEADY, **settings) for name, settings in WEAK.items()]
    records = read_manifest(indexed_copies(sources, 24, tmp_path / "clips"))
    assert not refusals(records, verify=True)
    rng = np.random.default_rng(0)
    damaged, whole = records[:20], records[20:]
    for record in damaged:
        replace_in_place(record.path, flipped(record.path.read_bytes(), rng))
    without = refusals(records, verify=False)
    assert len(without) < 16  # the others are served: nothing but a hash can tell
    assert not any("has changed" in reason or "is damaged" in reason for reason in without)
    reasons = refusals(records, verify=True)
    assert [reason.partition(": ")[0] for reason in reasons] == [str(r.path) for r in damaged]
    assert all(": is damaged: its bytes are not those that were" in reason for reason in reasons)
    assert not refusals(whole, verify=True)


@pytest.mark.slow
def test_a_thousand_damaged_files_are_refused_where_content_is_verified(
    fixtures: list[Path],
    barcodes: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Spoiled after they were indexed, with their times kept; some keep their size, some do not."""
    gif = barcodes("colours.gif", STEADY, **WEAK["colours.gif"])
    real = sorted((CLIPS / "train").iterdir()) if CLIPS.is_dir() else []
    small = [path for path in real if path.stat().st_size < 2**21]
    sources = [*fixtures, gif] * 5 + small
    records = read_manifest(indexed_copies(sources, 1000, tmp_path / "clips"))
    assert len(records) == 1000
    good = len(refusals(records, verify=True))
    assert good < 50  # shorter or slower than the window that is asked for
    for number, record in enumerate(records):
        content, rng = record.path.read_bytes(), np.random.default_rng([number, 7])
        while (damaged := spoiled(content, rng)) == content:
            pass
        replace_in_place(record.path, damaged)
    started = time.monotonic()
    without = refusals(records, verify=False)
    between = time.monotonic()
    reasons = refusals(records, verify=True)
    print(f"without content: {len(without)} refused, {between - started:.1f} s")
    print(f"with content: {len(reasons)} refused, {time.monotonic() - between:.1f} s")
    assert len(reasons) == 1000
    assert len(without) < 1000
    kinds = Counter("is damaged" in reason or "has changed" in reason for reason in reasons)
    assert kinds[False] == 0


@pytest.mark.parametrize("kind", ["dense", "packed", "shards"])
def test_damaged_clips_are_left_out_of_training_and_named(
    kind: str, barcodes: Callable[..., Path], tmp_path: Path
) -> None:
    sources = [barcodes("mpeg4.avi", STEADY, **WEAK["mpeg4.avi"])]
    manifest = indexed_copies(sources, 6, tmp_path / "clips")
    if kind == "shards":
        manifest = write_shards(manifest, tmp_path / "shards")
    records = read_manifest(manifest)
    rng = np.random.default_rng(1)
    for record in records[:2]:
        spoil_clip(record, rng)
    settings = {"sizes": ["3x32x64"], "pixels_per_batch": 2 * 3 * 32 * 64}
    if kind == "packed":
        settings = {"packing": Packing(64, "1x8x8", 3, 32 * 64, (1, 2, 2))}
    bad = {}
    for verify in (False, True):
        data = data_module(manifest, fps=5.0, max_bad_share=0.5, verify_content=verify, **settings)
        data.setup("fit")
        loader = data.train_dataloader()
        served = {name for batch in loader for name in batch.clip_ids}
        clips = loader.dataset.clips
        one = clips if kind == "packed" else next(iter(clips.values()))
        bad[verify] = one.bad_clips.reasons
        assert served == {record.clip_id for record in records} - set(bad[verify])
    assert set(bad[True]) == {record.clip_id for record in records[:2]}
    assert len(bad[False]) < 2
    assert all("is damaged" in reason for reason in bad[True].values())


def spoil_clip(record: ClipRecord, rng: np.random.Generator) -> None:
    """Flip bits in the data of a clip's frames, wherever it lies; its file keeps its time."""
    columns = record.columns
    path = Path(columns.get("shard", record.path))
    start, size = columns.get("offset", 0), columns["num_bytes"]
    content = bytearray(path.read_bytes())
    middle = slice(start + size // 2, start + size // 2 + 200)
    content[middle] = flipped(bytes(content[middle]), rng)
    replace_in_place(path, bytes(content))


def test_rows_without_a_hash_are_refused_where_content_is_verified(
    barcodes: Callable[..., Path], tmp_path: Path
) -> None:
    manifest = indexed_copies([barcodes("a.mp4", STEADY)], 3, tmp_path / "clips")
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    del rows[1]["content"]
    manifest.write_text("\n".join(map(json.dumps, rows)))
    settings = {"sizes": ["3x32x64"], "pixels_per_batch": 2 * 3 * 32 * 64}
    data_module(manifest, fps=5.0, **settings).setup("fit")
    with pytest.raises(
        ValueError,
        match=r"clips\.jsonl: content is missing in the row of 1\.mp4: "
        r"data\.reading\.verify_content = true needs the SHA-256 of each file: run "
        r"sora-lightning index",
    ):
        data_module(manifest, fps=5.0, verify_content=True, **settings).setup("fit")
    with pytest.raises(ValueError, match="verify_content and sources are both given"):
        data_module(manifest, fps=5.0, verify_content=True, sources=True, **settings)


def test_a_file_is_hashed_once_for_as_long_as_it_stays(
    barcodes: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks: the keys of its windows, the reader at each of them. What is written in place
    is another file, size and time or not."""
    manifest = indexed_copies([barcodes("a.mp4", STEADY)], 2, tmp_path / "clips")
    hashed: list[Path] = []

    def counted(path: Path) -> str:
        hashed.append(path)
        return file_sha256(path)

    for module in (checksums_module, shards_module):
        monkeypatch.setattr(module, "file_sha256", counted)
    hashed_clip, other = read_manifest(manifest)
    unhashed = ClipRecord(other.path, other.captions, other.clip_id)
    checksums = Checksums(verify=True)
    reader, keys = ClipReader(default_reader(), 5.0, checksums), LatentKeys(5.0, 3, checksums)
    for window in range(3):
        reader.read(hashed_clip, SIZE, window / 2)
        assert keys(unhashed, SIZE, window) in keys.of_windows(unhashed, SIZE)
        assert keys(hashed_clip, SIZE, window) == keys(unhashed, SIZE, window)
    assert hashed == [hashed_clip.path, other.path]
    time.sleep(0.05)  # the clock of the file system ticks by hundredths of a second
    content = hashed_clip.path.read_bytes()
    replace_in_place(hashed_clip.path, flipped(content, np.random.default_rng(2)))
    with pytest.raises(DecodeError, match="is damaged"):
        reader.read(hashed_clip, SIZE, 0.5)
    replace_in_place(hashed_clip.path, content)
    reader.read(hashed_clip, SIZE, 0.5)
    assert hashed == [hashed_clip.path, other.path, hashed_clip.path, hashed_clip.path]


def test_shards_are_not_made_of_damaged_files(
    barcodes: Callable[..., Path], tmp_path: Path
) -> None:
    """Else their rows would call the damage what was indexed."""
    manifest = indexed_copies([barcodes("a.mp4", STEADY)], 2, tmp_path / "clips")
    path = read_manifest(manifest)[1].path
    replace_in_place(path, flipped(path.read_bytes(), np.random.default_rng(3)))
    with pytest.raises(DecodeError, match=r"1\.mp4: has changed since it was indexed"):
        write_shards(manifest, tmp_path / "shards")
