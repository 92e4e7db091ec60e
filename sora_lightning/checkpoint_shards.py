"""Tensors of which each rank writes its part: torch's distributed checkpoint as safetensors, which
hold no pickle, in a folder beside the checkpoint's file.

The file names the folder and the places of its tensors, and holds all else. It is written last, so
that it exists only where the folder is whole.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SUFFIX = ".shards"
_ENTRY = "shards"
_OFFSETS = "DCP_SHARDING_INFO"  # of HuggingFaceStorageWriter, in the header of each of its files


def save_shards(checkpoint: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write this rank's part of every ``DTensor`` within; return the checkpoint without them.

    All ranks must call it, with one folder that all of them see. If one cannot write, all raise its
    error.
    """
    import torch.distributed.checkpoint as dcp  # not for those who only read

    found: dict[tuple[str | int, ...], Tensor] = {}
    rest = _without_shards(checkpoint, (), found)
    if not found:  # on one rank
        return rest
    named = {_name(place): tensor for place, tensor in found.items()}
    assert len(named) == len(found)
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(named, storage_writer=writer)
    except dcp.CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
        raise reason from error
    tensors = [[list(place), list(tensor.shape)] for place, tensor in found.items()]
    return {**rest, _ENTRY: {"folder": folder.name, "tensors": tensors}}


def _without_shards(
    value: Any, place: tuple[str | int, ...], found: dict[tuple[str | int, ...], Tensor]
) -> Any:
    from torch.distributed.tensor import DTensor

    if isinstance(value, DTensor):
        found[place] = value.detach()
        return None
    if isinstance(value, Mapping):
        return {key: _without_shards(one, (*place, key), found) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_shards(one, (*place, i), found) for i, one in enumerate(value)]
    return value.cpu() if isinstance(value, Tensor) else value


def _name(place: Iterable[str | int]) -> str:
    return ".".join(map(str, place))


class _Part(NamedTuple):
    file: Any  # as safe_open returns it
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SavedTensor:
    """A tensor that is not read yet."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[_Part, ...]

    def __deepcopy__(self, memo: Any) -> SavedTensor:
        return self  # Lightning copies what a callback loads, and open files cannot be copied

    def read(self) -> Tensor:
        """Return the whole tensor."""
        whole = torch.empty(0)
        for number, part in enumerate(self.parts):
            values = part.file.get_tensor(self.name)
            whole = whole if number else values.new_empty(self.shape)
            extents = zip(part.offset, part.shape, strict=True)
            whole[tuple(slice(first, first + length) for first, length in extents)] = values
        return whole


def with_shards(checkpoint: dict[str, Any], path: Path, read: bool = True) -> dict[str, Any]:
    """Return a checkpoint's content with the tensors that its ranks wrote beside ``path``: whole,
    or not ``read`` yet.

    Raises ``ValueError`` naming the folder, file or tensor that is missing or damaged.
    """
    if not isinstance(checkpoint, dict) or _ENTRY not in checkpoint:
        return checkpoint
    entry = checkpoint[_ENTRY]
    folder = path.parent / folder_name(entry)
    parts = _parts(folder)
    for place, shape in entry["tensors"]:
        tensor = SavedTensor(_name(place), tuple(shape), tuple(parts[_name(place)]))
        if sum(prod(part.shape) for part in tensor.parts) != prod(tensor.shape):
            raise ValueError(f"a part of {tensor.name} is missing in {folder}")
        parent: Any = checkpoint
        for key in place[:-1]:
            parent = parent[key]
        parent[place[-1]] = tensor.read() if read else tensor
    return checkpoint


def num_bytes(checkpoint: Mapping[str, Any], path: Path) -> int:
    """Return the size of a checkpoint's file and of the parts beside it."""
    folder = path.parent / folder_name(checkpoint[_ENTRY]) if _ENTRY in checkpoint else None
    parts = [] if folder is None else folder.glob("*.safetensors")
    return sum(one.stat().st_size for one in (path, *parts))


def folder_name(entry: Mapping[str, Any]) -> str:
    """Return the name of a checkpoint's folder. ``ValueError`` for one that leads elsewhere."""
    name = entry["folder"]
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(SUFFIX):
        raise ValueError(f"its folder {name!r} is no name of a folder beside it")
    return name


def _parts(folder: Path) -> dict[str, list[_Part]]:
    """Return the parts of each tensor, whose files stay open."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ValueError(f"{folder} is missing: it holds the tensors of the checkpoint beside it")
    parts: dict[str, list[_Part]] = defaultdict(list)
    for path in paths:
        try:
            file = safe_open(path, framework="pt")  # compares the file's length with its header
            offsets = json.loads(file.metadata()[_OFFSETS])
            for name in file.keys():  # noqa: SIM118  it is no dictionary
                shape = tuple(file.get_slice(name).get_shape())
                parts[name].append(_Part(file, tuple(offsets[name]["saved_offsets"]), shape))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    return parts


def remove_unused(folder: Path) -> None:
    """Remove the parts below ``folder`` that no checkpoint in it names. Nothing is removed where
    one cannot be read: it may name them.
    """
    shards = list(folder.glob(f"*{SUFFIX}"))
    used = set()
    for path in folder.glob("[!.]*.ckpt") if shards else ():
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if _ENTRY in content:
                used.add(folder_name(content[_ENTRY]))
        except Exception:
            if path.name != "damaged.ckpt":  # which a resumed run put aside
                return
    for unused in (one for one in shards if one.name not in used):
        shutil.rmtree(unused, ignore_errors=True)
