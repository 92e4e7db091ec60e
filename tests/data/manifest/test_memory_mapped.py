"""A manifest in an Arrow file is the same manifest, and costs a process almost nothing."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sora_lightning.data import Packing, read_manifest
from sora_lightning.data.manifest.memory_mapped import (
    ChosenRecords,
    MemoryMappedRecords,
    chosen,
    joined,
    open_manifest,
)
from sora_lightning.data.manifest.tables import read_rows, write_rows
from sora_lightning.types import PackedBatch
from tests.data.modules import data_module

pyarrow = pytest.importorskip("pyarrow", reason="Arrow needs pyarrow")
MIB = 2**20
SIZES = {"sizes": ["9x16x16", "9x12x20"], "pixels_per_batch": 4 * 9 * 16 * 16}
PACKED = {"packing": Packing(30, "4x4x4", 17, 32 * 40, (1, 4, 4))}


@pytest.fixture
def arrow(shapes: dict[str, Path]) -> Path:
    """The manifest of the shapes, a score added, beside it as an Arrow file."""
    rows = [
        {**{k: v for k, v in row.items() if k != "scene"}, "score": number}
        for number, (_, row) in enumerate(read_rows(shapes["train"]))
    ]
    target = shapes["train"].with_suffix(".arrow")
    write_rows(target, rows)
    return target


def test_the_records_are_those_of_the_rows_however_they_are_asked_for(
    arrow: Path, shapes: dict[str, Path]
) -> None:
    mapped, records = open_manifest(arrow), read_manifest(arrow)
    assert isinstance(mapped, MemoryMappedRecords)
    assert records == read_manifest(shapes["train"])
    assert list(mapped) == records == [mapped[i] for i in range(len(mapped))] == mapped[:]
    assert mapped[-1] == records[-1]
    assert mapped[3].columns["score"] == 3
    for copy in (mapped, pickle.loads(pickle.dumps(mapped))):
        indices = [4, 7, 8, 29, 1, 1, 3]
        some = chosen(copy, indices)
        assert isinstance(some, ChosenRecords)
        assert list(some) == [records[i] for i in indices] == some[:]
        assert list(chosen(some, [6, 0])) == [records[3], records[4]]
        both = joined([some, (), chosen(copy, [0])])
        assert isinstance(both, ChosenRecords)
        assert list(both) == [records[i] for i in [*indices, 0]]
    assert list(joined([chosen(mapped, [2]), records[:1]])) == [records[2], records[0]]
    assert chosen(records, [2, 5]) == [records[2], records[5]]
    with pytest.raises(IndexError):
        mapped[30]
    assert len(pickle.dumps(mapped)) < 1000


@pytest.mark.parametrize("settings", [SIZES, PACKED], ids=["dense", "packed"])
def test_training_sees_the_same_clips(settings: dict, arrow: Path, shapes: dict[str, Path]) -> None:
    served = []
    for manifest, workers in ((shapes["train"], 0), (arrow, 0), (arrow, 2)):
        data = data_module(manifest, **settings, num_workers=workers, steps_per_epoch=4)
        data.setup("fit")
        batches = list(data.train_dataloader())
        served.append([(batch.clip_ids, batch.captions, _sum(batch)) for batch in batches])
    assert served[0] == served[1] == served[2]
    data = data_module(arrow, **settings, filters=["score >= 12"])
    (assignment,) = data.check().values()
    assert (assignment.num_clips, assignment.num_removed) == (18, 12)
    assert "12 left out: filter: not score >= 12, e.g. 00000.mp4" in str(assignment)


def _sum(batch: object) -> float:
    videos = batch.videos if isinstance(batch, PackedBatch) else [batch.video]  # type: ignore[attr-defined]
    return float(sum(torch.as_tensor(video).double().sum() for video in videos or []))


def test_wrong_rows_are_named_by_their_place(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    path = tmp_path / "clips.arrow"
    write_rows(path, [{"path": n, "caption": "x"} for n in ("a.mp4", "b.mp4", "a.mp4")])
    with pytest.raises(ValueError, match=r"clips\.arrow:3: path = 'a\.mp4': .* is in line 1"):
        open_manifest(path)
    write_rows(path, [{"path": "a.mp4", "caption": "x"}, {"path": "c.mp4", "caption": "x"}])
    with pytest.raises(ValueError, match=r"clips\.arrow:2: path = 'c\.mp4': no such file"):
        open_manifest(path)
    path.write_text("no")
    with pytest.raises(ValueError, match=r"clips\.arrow: not an Arrow file"):
        open_manifest(path)


def write_many(folder: Path, num_rows: int) -> Path:
    """Rows of clips in one shard, of which no byte is read."""
    (folder / "shard.tar").touch()
    rows = np.arange(num_rows)
    columns = {
        "path": [f"clips/{n:08d}.mp4" for n in rows],
        "caption": [f"the caption of clip {n}, of an ordinary length of a line" for n in rows],
        "shard": ["shard.tar"] * num_rows,
        "offset": 512 * rows,
        "size": np.full(num_rows, 512),
        "fps": np.full(num_rows, 24.0),
        "num_frames": 24 + rows % 100,
        "height": np.full(num_rows, 64),
        "width": np.full(num_rows, 64),
        "motion": rows % 7 / 7,
    }
    table = pyarrow.table(columns)
    path = folder / f"{num_rows}.arrow"
    with pyarrow.ipc.new_file(str(path), table.schema) as file:
        file.write_table(table, max_chunksize=2**14)
    return path


def held(manifest: Path, mode: str) -> dict[str, dict[str, float]]:
    """The memory of a new process that serves a manifest."""
    command = [sys.executable, "-m", "tests.data.manifest.served_rows", str(manifest), mode]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "num_rows", "most_mib"),
    [
        ("dense", 1_000_000, 50),
        # Packs of a whole pass are planned in arrays, those of the next one beside them.
        ("packed", 1_000_000, 50),
    ],
)
def test_the_rows_cost_a_process_little(
    mode: str, num_rows: int, most_mib: float, tmp_path: Path
) -> None:
    """As a list, these records take 1.5 KiB each. Pages of the file are told and not counted:
    processes share them, and the system takes them back when it needs them."""
    small, large = (held(write_many(tmp_path, rows), mode) for rows in (200, num_rows))
    for moment in ("peak", "final"):
        added = {name: large[moment][name] - small[moment][name] for name in small[moment]}
        print(f"{num_rows} rows {mode}, {moment}, MiB: {added}; {large['seconds']} s")
        assert added["RssAnon"] <= most_mib
