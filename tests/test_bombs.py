"""Files that declare more than they hold are refused by their headers, before the memory is full.

Images and videos are tested in data/decoding and systems/test_hostile_videos.py, tar shards in
data/decoding/test_shards.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pytest
import torch

from evaluation.features.weights import read_tensors
from evaluation.files import VideoFile
from evaluation.protocol import load_protocol
from sora_lightning.checkpoints import read_checkpoint
from sora_lightning.cli.sources import read_yaml
from sora_lightning.data.decoding.litdata_items import LitDataItems
from sora_lightning.data.latents import INDEX, LatentCache
from sora_lightning.files import MOST_VALUES, load_yaml
from sora_lightning.interop.pretrained import read_foreign
from sora_lightning.tokenizers.perceptual import PerceptualDistance


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A file of weights whose parts are compressed a thousandfold."""
    content = {"state_dict": {"w": torch.zeros(2**23)}, "hyper_parameters": {}}
    torch.save(content, tmp_path / "whole.pt")
    with (
        ZipFile(tmp_path / "whole.pt") as whole,
        ZipFile(tmp_path / "bomb.pt", "w", ZIP_DEFLATED) as bomb,
    ):
        for name in whole.namelist():
            bomb.writestr(name, whole.read(name))
    assert (tmp_path / "bomb.pt").stat().st_size < 2**20
    assert read_checkpoint(tmp_path / "whole.pt")["state_dict"]["w"].shape == (2**23,)
    return tmp_path / "bomb.pt"


@pytest.mark.parametrize(
    "read",
    [
        read_checkpoint,
        read_foreign,
        read_tensors,
        PerceptualDistance,
        lambda path: VideoFile(path, 8.0, "F H W 3", "0..1").check(),
    ],
    ids=["checkpoint", "foreign", "evaluation", "perceptual", "video"],
)
def test_a_compressed_archive_is_refused(read: Callable[[Path], object], archive: Path) -> None:
    with pytest.raises(ValueError, match=r"bomb\.pt.*it declares 33,5\d+,\d+ bytes"):
        read(archive)


def bomb(depth: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, depth)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (bomb(12), "its aliases repeat values to more than 100,000"),
        ("a: " + "[" * 2_000 + "]" * 2_000, "nested too deeply"),
    ],
    ids=["aliases", "nested"],
)
@pytest.mark.parametrize("read", [read_yaml, load_protocol])
def test_a_yaml_is_bounded(
    read: Callable[[Path], object], text: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "bomb.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"bomb\.yaml.*{said}"):
        read(tmp_path / "bomb.yaml")


def test_values_and_aliases_of_a_yaml_are_read() -> None:
    assert load_yaml("a: &a [1, {b: c}]\nd: *a\n") == {"a": [1, {"b": "c"}], "d": [1, {"b": "c"}]}
    assert load_yaml("") is None
    assert len(load_yaml(json.dumps([0] * (MOST_VALUES // 2)))) == MOST_VALUES // 2


@pytest.mark.parametrize("shape", [[2**40], [1, 2, 3], [2**62, 4], [-1, -8]])
def test_latents_have_the_bytes_of_their_shape(shape: list[int], tmp_path: Path) -> None:
    key = "0" * 32
    (tmp_path / INDEX).write_text(json.dumps({"tokenizer": "t", "dtype": "float32"}))
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 32]}
    header = json.dumps({key: entry}).encode()
    shard = tmp_path / f"{key}.safetensors"
    shard.write_bytes(len(header).to_bytes(8, "little") + header + bytes(32))
    with pytest.raises(ValueError, match="is no shard of latents, or damaged"):
        LatentCache.open(tmp_path)


def test_an_array_of_more_than_its_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    with path.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (2**20, 2**10, 2**10, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(99))
    video = VideoFile(path, 8.0, "F H W 3")
    with pytest.raises(ValueError, match=r"x\.npy: cannot be read as an array"):
        video.check()
    path = tmp_path / "x.safetensors"
    entry = {"x": {"dtype": "U8", "shape": [2**40, 2, 2, 3], "data_offsets": [0, 9]}}
    header = json.dumps(entry).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(9))
    with pytest.raises(ValueError, match=r"x\.safetensors: cannot be read"):
        VideoFile(path, 8.0, "F H W 3").check()


class Owned:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.file,)  # type: ignore[return-value]


def test_a_litdata_dataset_unpickles_nothing_and_names_no_file_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("litdata", reason="litdata is optional")
    from litdata.streaming.writer import BinaryWriter

    folder = tmp_path / "dataset"
    writer = BinaryWriter(str(folder), chunk_size=7)
    for _ in range(3):
        writer[_] = {"video": b"video", "note": Owned(tmp_path / "owned")}
    writer.done()
    writer.merge()
    assert "pickle" in (folder / "index.json").read_text()
    assert LitDataItems().content(str(folder), 1) == b"video"
    assert not (tmp_path / "owned").exists()
    index = json.loads((folder / "index.json").read_text())
    for chunk in index["chunks"]:
        chunk["filename"] = f"../dataset/{chunk['filename']}"
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="which is no file in it"):
        LitDataItems().content(str(folder), 1)
