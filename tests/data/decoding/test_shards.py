"""Clips streamed from tar shards are the clips of the folder: same order, same pixels, on one rank
or two.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import socket
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sora_lightning.data import ClipRecord, DecodeError, Packing, VideoDataModule, read_manifest
from sora_lightning.data.batching.sampler import StreamLoader
from sora_lightning.data.decoding.checksums import Checksums
from sora_lightning.data.decoding.shards import FILES_KEPT, ShardFiles, within, write_shards
from sora_lightning.types import PackedBatch
from tests.data.modules import data_module


@pytest.fixture(scope="module")
def sharded(shapes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(shapes["train"], tmp_path_factory.mktemp("shards"), 40_000)


def rows(manifest: Path) -> list[dict]:
    return [json.loads(line) for line in manifest.read_text().splitlines()]


def loader(manifest: Path, packed: bool, place: tuple[int, int], **options: Any) -> StreamLoader:
    class Share(VideoDataModule):
        def _ranks(self) -> tuple[int, int]:
            return place

    sizes = (
        {"packing": Packing(30, "4x4x4", 17, 32 * 40, (1, 4, 4))}
        if packed
        else {"sizes": ["9x16x16", "9x12x20"], "pixels_per_batch": 4 * 9 * 16 * 16}
    )
    data = data_module(manifest, of=Share, **sizes, fixed_windows=True, **options)  # type: ignore[arg-type]
    data.setup("fit")
    return data.train_dataloader()


def test_the_shards_are_tar_files_and_the_rows_say_where_the_clips_lie(
    sharded: Path, shapes: dict[str, Path]
) -> None:
    names = sorted({row["shard"] for row in rows(sharded)})
    assert len(names) > 2
    members = []
    for name in names:
        with tarfile.open(sharded.parent / name) as shard:
            members += [(name, m.offset_data, m.size) for m in shard.getmembers()]
    assert members == [(row["shard"], row["offset"], row["size"]) for row in rows(sharded)]
    files = ShardFiles()
    pairs = zip(read_manifest(sharded), read_manifest(shapes["train"]), strict=True)
    for clip, original in pairs:
        assert clip.clip_id == original.clip_id
        assert clip.metadata == original.metadata
        assert files.local(clip).read_bytes() == original.path.read_bytes()
        assert files.local(original) == original.path
        content = hashlib.sha256(original.path.read_bytes()).hexdigest()
        assert Checksums().of(clip) == Checksums().of(original) == content


def test_every_change_of_a_file_is_noticed_and_no_file_is_hashed_twice(tmp_path: Path) -> None:
    content = bytearray(np.random.default_rng(0).bytes(300_000))
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    hashed = Checksums().of(ClipRecord(path, ("x",), "0"))
    state = path.stat()
    row = {"content": "recorded", "num_bytes": state.st_size, "modified_ns": state.st_mtime_ns}
    assert Checksums().of(ClipRecord(path, ("x",), "0", columns=row)) == "recorded"
    content[150_000] ^= 1  # in the middle, at the same length
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    changed = Checksums().of(ClipRecord(path, ("x",), "0", columns=row))
    assert changed == Checksums().of(ClipRecord(path, ("x",), "0"))
    assert changed == hashlib.sha256(content).hexdigest() != hashed
    path.write_bytes(content + b"x")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert Checksums().of(ClipRecord(path, ("x",), "0", columns=row)) not in (
        "recorded",
        hashed,
        changed,
    )
    path.unlink()
    with pytest.raises(DecodeError, match=r"a\.mp4: No such file"):
        Checksums().of(ClipRecord(path, ("x",), "0", columns=row))


def test_a_shard_that_was_written_anew_is_read_anew(sharded: Path, tmp_path: Path) -> None:
    record = read_manifest(sharded)[0]
    with_hash = ClipRecord(
        record.path, ("x",), "0", columns={**record.columns, "content": "recorded"}
    )
    assert Checksums().of(with_hash) == "recorded"
    copy = tmp_path / "shard.tar"
    copy.write_bytes(Path(str(record.columns["shard"])).read_bytes())
    moved = ClipRecord(record.path, ("x",), "0", columns={**with_hash.columns, "shard": str(copy)})
    assert Checksums().of(moved) == record.columns["content"]
    remote = ClipRecord(
        record.path, ("x",), "0", columns={**with_hash.columns, "shard": "s3://a/b.tar"}
    )
    assert Checksums().of(remote) == "recorded"


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_two_ranks_stream_what_the_clips_show_and_resume(
    packed: bool, workers: int, sharded: Path, shapes: dict[str, Path]
) -> None:
    whole, alone = {}, []
    for rank in range(2):
        one = loader(sharded, packed, (rank, 2), num_workers=workers, steps_per_epoch=4)
        batches = list(one)
        again = loader(sharded, packed, (rank, 2), steps_per_epoch=2)
        begun = loader(sharded, packed, (rank, 2), num_workers=workers, steps_per_epoch=2)
        list(begun)
        again.load_state_dict(begun.state_dict())
        for a, b in zip(batches[2:], again, strict=True):
            assert a.clip_ids == b.clip_ids
            for x, y in zip(pixels_of(a), pixels_of(b), strict=True):
                assert torch.equal(x, y)
        whole[rank] = batches
    alone = list(loader(sharded, packed, (0, 1), steps_per_epoch=8))
    together = [batch for step in zip(*whole.values(), strict=True) for batch in step]
    assert [b.clip_ids for b in together] == [b.clip_ids for b in alone]
    by_name = {}
    for batch in loader(shapes["train"], packed, (0, 1), steps_per_epoch=16, run_length=1):
        by_name |= dict(zip(batch.clip_ids, pixels_of(batch), strict=True))
    compared = 0
    for batch in alone:
        for name, video in zip(batch.clip_ids, pixels_of(batch), strict=True):
            assert torch.equal(video, by_name[name])
            compared += 1
    assert compared >= 10


def pixels_of(batch) -> list[torch.Tensor]:
    return batch.videos if isinstance(batch, PackedBatch) else list(batch.video)


def test_a_process_keeps_few_files_and_shares_none(sharded: Path) -> None:
    files = ShardFiles()
    records = read_manifest(sharded)
    first = files.local(records[0])
    for index in range(FILES_KEPT + 5):
        row = {**records[1].columns, "offset": index, "size": 10}
        files.local(ClipRecord(Path("a.mp4"), ("x",), "0", columns=row))
    assert not first.exists()
    assert len(list(first.parent.iterdir())) == FILES_KEPT
    copy = pickle.loads(pickle.dumps(files))
    assert copy.local(records[0]).parent != first.parent
    folder = first.parent
    del files
    assert not folder.exists()


def test_the_folders_of_workers_go_with_them(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    one = loader(sharded, False, (0, 1), num_workers=2, steps_per_epoch=2)
    clips = next(iter(one.dataset.clips.values()))  # type: ignore[attr-defined]
    clips.readers[0].files.local(read_manifest(sharded)[0])
    (own,) = tmp_path.glob("clips-*")
    assert len(list(one)) == 2
    assert len(list(tmp_path.glob("clips-*"))) == 3
    assert len(list(own.iterdir())) == 1
    one._iterator._shutdown_workers()  # type: ignore[union-attr]
    assert list(tmp_path.glob("clips-*")) == [own]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard": "absent.tar"}, "shard = 'absent.tar': no such file"),
        ({"shard": 3}, "shard = 3: must name a tar file"),
        ({"offset": None}, "the row needs offset and size"),
        ({"offset": -1}, "offset = -1: must be finite and at least 0"),
        ({"fps": None}, "needs num_frames, fps, height and width"),
    ],
)
def test_rows_that_cannot_be_are_refused(
    change: dict, message: str, sharded: Path, tmp_path: Path
) -> None:
    row = {**rows(sharded)[0], "shard": str(sharded.parent / rows(sharded)[0]["shard"]), **change}
    (tmp_path / "clips.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path / "clips.jsonl", root=str(sharded.parent))


def test_a_shard_that_ends_too_soon_is_named(sharded: Path) -> None:
    record = read_manifest(sharded)[0]
    short = ClipRecord(record.path, ("x",), "0", columns={**record.columns, "size": 10**9})
    with pytest.raises(DecodeError, match=r"shard-000000\.tar: ends before"):
        ShardFiles().local(short)
    gone = ClipRecord(record.path, ("x",), "0", columns={**record.columns, "shard": "zzz://x.tar"})
    with pytest.raises(DecodeError, match=r"zzz://x\.tar: cannot be read"):
        ShardFiles().local(gone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard": "reference://x.tar"}, r"reference://x\.tar: cannot be read: "),
        ({"size": 2**62}, r"shard-000000\.tar: ends before"),
        ({"offset": 2**62}, r"shard-000000\.tar: ends before"),
    ],
)
def test_a_shard_that_cannot_be_is_one_bad_clip(change: dict, message: str, sharded: Path) -> None:
    record = read_manifest(sharded)[0]
    wrong = ClipRecord(record.path, ("x",), "0", columns={**record.columns, **change})
    with pytest.raises(DecodeError, match=message):
        ShardFiles().local(wrong)


def test_a_server_that_never_answers_costs_no_more_than_the_timeout(sharded: Path) -> None:
    record = read_manifest(sharded)[0]
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/x.tar"
        remote = ClipRecord(record.path, ("x",), "0", columns={**record.columns, "shard": address})
        started = time.monotonic()
        with pytest.raises(DecodeError, match=r"x\.tar: (took longer than 0\.5 s|cannot be read)"):
            ShardFiles(timeout_s=0.5).local(remote)
        assert time.monotonic() - started < 5


def test_what_is_fetched_in_time_comes_as_it_is() -> None:
    assert within(5.0, bytes, 3) == bytes(3)
    with pytest.raises(DecodeError, match="gone"):
        within(5.0, _gone)
    with pytest.raises(DecodeError, match=r"took longer than 0\.1 s"):
        within(0.1, time.sleep, 3)  # type: ignore[arg-type]


def _gone() -> bytes:
    raise DecodeError("gone")
