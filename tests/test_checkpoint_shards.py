"""A checkpoint whose tensors lie in a folder beside it is read whole, or refused with its name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from sora_lightning.checkpoint_shards import (
    SavedTensor,
    num_bytes,
    remove_unused,
    save_shards,
    with_shards,
)
from sora_lightning.checkpoints import read_checkpoint

WEIGHT = torch.arange(12.0).reshape(4, 3)


def write(folder: Path, name: str = "last.ckpt", named: Any = None) -> Path:
    """As two ranks write it, of which each has two rows."""
    parts = folder / f"{name}-0.shards"
    entry = {"folder": named or parts.name, "tensors": [[["state_dict", "weight"], [4, 3]]]}
    parts.mkdir(exist_ok=True)
    for rank, rows in enumerate(WEIGHT.split(2)):
        offsets = json.dumps({"state_dict.weight": {"saved_offsets": [2 * rank, 0]}})
        tensors = {"state_dict.weight": rows.clone()}
        save_file(tensors, parts / f"{rank}.safetensors", {"DCP_SHARDING_INFO": offsets})
    content = {"state_dict": {"weight": None}, "hyper_parameters": {}, "shards": entry}
    torch.save(content, folder / name)
    return parts


def weight(folder: Path) -> Tensor:
    content: dict[str, Tensor] = read_checkpoint(folder / "last.ckpt")["state_dict"]
    return content["weight"]


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", f"file://{tmp_path}/init", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_shared_tensors_go_to_the_folder_and_come_back_in_their_places(
    mesh: DeviceMesh, tmp_path: Path
) -> None:
    shared = distribute_tensor(WEIGHT, mesh, [Shard(0)])
    content = {"a.b": [{0: shared}, torch.ones(2)], "c": shared.bfloat16(), "step": 3}
    folder = tmp_path / "x.shards"
    assert save_shards({"step": 3}, folder) == {"step": 3}  # as one rank, which shares nothing out
    file = save_shards(content, folder)
    assert [file["a.b"][0][0], file["c"], file["step"]] == [None, None, 3]
    assert not list(folder.glob("*metadata"))  # torch's own is a pickle
    for read in (False, True):
        back = with_shards(file, tmp_path / "x.ckpt", read)
        found = [deepcopy(back["a.b"][0][0]), back["c"]]  # as Lightning copies it
        assert all(isinstance(one, Tensor if read else SavedTensor) for one in found)
        found = [one if read else one.read() for one in found]
        torch.testing.assert_close(found, [WEIGHT, WEIGHT.bfloat16()], rtol=0, atol=0)
    (tmp_path / "full.shards").touch()
    with pytest.raises(FileExistsError):  # what a rank cannot write, all raise
        save_shards(content, tmp_path / "full.shards")


def test_parts_are_put_together(tmp_path: Path) -> None:
    parts = write(tmp_path)
    assert torch.equal(weight(tmp_path), WEIGHT)
    path = tmp_path / "last.ckpt"
    total = sum(one.stat().st_size for one in (path, *parts.iterdir()))
    assert num_bytes(read_checkpoint(path), path) == total


def test_a_part_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    parts = write(tmp_path)
    first, second = sorted(parts.iterdir())
    kept = first.read_bytes()
    first.write_bytes(kept[:-1])
    for verify in (False, True):
        with pytest.raises(ValueError, match=r"0\.safetensors is damaged"):
            read_checkpoint(tmp_path / "last.ckpt", verify)
    first.write_bytes(kept)
    for part in (first, second):
        kept = part.read_bytes()
        part.unlink()
        with pytest.raises(ValueError, match=r"weight is missing in .*-0\.shards"):
            weight(tmp_path)
        part.write_bytes(kept)
    first.unlink()
    second.unlink()
    with pytest.raises(ValueError, match=r"-0\.shards is missing"):
        weight(tmp_path)


@pytest.mark.parametrize("name", ["../elsewhere.shards", "/elsewhere.shards", "..", 3])
def test_a_file_cannot_name_a_folder_elsewhere(name: Any, tmp_path: Path) -> None:
    write(tmp_path, named=name)
    with pytest.raises(ValueError, match="is no name of a folder beside it"):
        weight(tmp_path)


def test_parts_that_no_checkpoint_names_are_removed(tmp_path: Path) -> None:
    used, kept = write(tmp_path), write(tmp_path, "step-00000001.ckpt")
    left = tmp_path / "last-1.shards"
    left.mkdir()
    (tmp_path / "torn.ckpt").write_bytes(b"PK")
    remove_unused(tmp_path)
    assert left.exists()  # a file that cannot be read may name it
    (tmp_path / "torn.ckpt").rename(tmp_path / "damaged.ckpt")
    remove_unused(tmp_path)
    assert (used.exists(), kept.exists(), left.exists()) == (True, True, False)
