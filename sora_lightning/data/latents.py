"""A cache of clips' latents on disk, so that training on them decodes and encodes nothing.

The cache is a folder of safetensors shards and an ``index.json`` that names the tokenizer. A key is
a hash of the file's content, the window and the size; tokenizer and number format are those of the
whole cache, and others are refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from sora_lightning.data.manifest.records import ClipRecord
from sora_lightning.types import VideoSize

INDEX = "index.json"
SHARD_BYTES = 64 * 2**20
MAX_HEADER_BYTES = 100 * 10**6  # the format's own limit
KEY_DIGITS = 32
_KEY = re.compile(f"[0-9a-f]{{{KEY_DIGITS}}}")
# Part of every key: a change of what a window or a resize means must not serve old latents.
POLICY = "window midpoints; antialiased bilinear; centre crop; 1"

_REMEDY = "Remove it, and encode again what it held, by the same predict"
_NAMES: dict[str, np.dtype] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
_TYPES = {"float16": "F16", "float32": "F32"}


def latent_key(
    content: str, record: ClipRecord, size: VideoSize, fps: float, window: int, num_windows: int
) -> str:
    """Names the latents of one of a clip's evenly placed windows, at one size and frame rate."""
    parts = [content, record.start_s, record.end_s, str(size), fps, window, num_windows, POLICY]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:KEY_DIGITS]


class _Place(NamedTuple):
    shard: str
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]


class _Entries:
    """The place of each of the latents, in columns of 34 bytes for each, without objects. Indices
    follow the order in which the shards were read.
    """

    def __init__(self) -> None:
        self.shards: list[str] = []
        self.formats: list[tuple[np.dtype, tuple[int, ...]]] = []
        self._keys = np.zeros(0, "S16")
        self._shard, self._format = np.zeros(0, np.int32), np.zeros(0, np.int32)
        self._offset = np.zeros(0, np.int64)
        self._order = np.zeros(0, np.int32)

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, shard: Path) -> None:
        """Read the header of a shard. Raises ``ValueError`` naming a file that is damaged."""
        try:
            with shard.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header: dict[str, Any] = json.loads(file.read(min(length, MAX_HEADER_BYTES)))
            header.pop("__metadata__", None)
            for one in header.values():
                begin, stop = one["data_offsets"]
                num_bytes = math.prod(one["shape"]) * _NAMES[one["dtype"]].itemsize
                if stop - begin != num_bytes or min(one["shape"], default=0) < 0:
                    raise ValueError("a shape has another number of bytes")
            end = 8 + length + max((one["data_offsets"][1] for one in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{shard}: is no shard of latents, or damaged. {_REMEDY}") from error
        if shard.stat().st_size != end:
            raise ValueError(
                f"{shard}: has {shard.stat().st_size} bytes, and its header says {end}. {_REMEDY}"
            )
        formats = {one: index for index, one in enumerate(self.formats)}
        of_entries = [
            formats.setdefault((_NAMES[e["dtype"]], tuple(e["shape"])), len(formats))
            for e in header.values()
        ]
        begin = len(self)
        for column in (self._keys, self._shard, self._format, self._offset):
            column.resize(begin + len(header), refcheck=False)
        self._keys[begin:] = _digests(header)
        self._shard[begin:] = len(self.shards)
        self._format[begin:] = of_entries
        self._offset[begin:] = [8 + length + e["data_offsets"][0] for e in header.values()]
        self.formats = list(formats)
        self.shards.append(shard.name)

    def find(self, keys: Iterable[str]) -> Int[ndarray, " n"]:
        """Return the index of each key; -1 if it is missing."""
        asked = _digests(keys)
        if not len(self):
            return np.full(len(asked), -1, np.int32)
        if len(self._order) < len(self):
            self._order = np.argsort(self._keys, kind="stable").astype(np.int32)
        places = np.searchsorted(self._keys, asked, sorter=self._order)
        indices = self._order[np.minimum(places, len(self) - 1)]
        return np.where(self._keys[indices] == asked, indices, np.int32(-1))

    def place(self, index: int) -> _Place:
        shard = self.shards[self._shard[index]]
        return _Place(shard, int(self._offset[index]), *self.formats[self._format[index]])

    def keys(self) -> set[str]:
        digits = self._keys.tobytes().hex()
        return {digits[start : start + KEY_DIGITS] for start in range(0, len(digits), KEY_DIGITS)}


def _digests(keys: Iterable[str]) -> ndarray:
    """Return the 16 bytes of each key. Raises ``ValueError`` for a name that is no key."""
    raw = bytearray()
    for key in keys:
        if not _KEY.fullmatch(key):
            raise ValueError(f"latents of {key!r}: a key is {KEY_DIGITS} hexadecimal digits")
        raw += bytes.fromhex(key)
    return np.frombuffer(bytes(raw), "S16")


class LatentCache:
    """Latents by key, 32 hexadecimal digits. ``create`` to write, ``open`` to read.

    Use it as a context manager, or call ``close``: written latents stay in memory until a shard is
    full. A shard is moved into place when it is complete, so that an interrupted run leaves no
    broken one.
    """

    def __init__(self, root: Path, tokenizer: str, dtype: str) -> None:
        self.root = root
        self.tokenizer = tokenizer
        self.dtype = dtype
        self._pending: dict[str, np.ndarray] = {}
        self._entries = _Entries()
        for shard in sorted(root.glob("*.safetensors")):
            self._entries.add(shard)

    @classmethod
    def create(
        cls, root: Path, tokenizer: str, dtype: Literal["float16", "float32"] = "float16"
    ) -> LatentCache:
        """Start a cache for the tokenizer of that fingerprint, or continue an existing one.

        Raises ``ValueError`` if the folder holds the latents of another tokenizer or number
        format.
        """
        if dtype not in _TYPES:
            raise ValueError(f"dtype = {dtype!r}: must be one of {', '.join(_TYPES)}")
        root = Path(root)
        if not (root / INDEX).is_file():
            root.mkdir(parents=True, exist_ok=True)
            index = {"tokenizer": tokenizer, "dtype": dtype}
            _write_whole(root / INDEX, json.dumps(index, indent=2).encode())
        cache = cls.open(root)
        cache.require(tokenizer)
        if cache.dtype != dtype:
            raise ValueError(
                f"{root}: holds latents in {cache.dtype}, not {dtype}: use another folder"
            )
        return cache

    @classmethod
    def open(cls, root: Path) -> LatentCache:
        """Open an existing cache. Raises ``ValueError`` if there is none."""
        root = Path(root)
        if not (root / INDEX).is_file():
            raise ValueError(
                f"{root}: no latent cache here (no {INDEX}): encode the clips first, by predict"
            )
        index: dict[str, Any] = json.loads((root / INDEX).read_text(encoding="utf-8"))
        return cls(root, index["tokenizer"], index["dtype"])

    def require(self, tokenizer: str) -> None:
        """Raise ``ValueError`` unless the tokenizer with this fingerprint made the latents."""
        if tokenizer != self.tokenizer:
            raise ValueError(
                f"{self.root}: the latents were made by tokenizer {self.tokenizer}, "
                f"not by {tokenizer}: encode the clips again, into another folder"
            )

    def __len__(self) -> int:
        return len(self._entries) + len(self._pending)

    def __contains__(self, key: object) -> bool:
        return key in self._pending or bool(self._entries.find([str(key)])[0] >= 0)

    def keys(self) -> set[str]:
        """Return the keys of all latents."""
        return self._entries.keys() | self._pending.keys()

    def find(self, keys: Iterable[str]) -> Int[ndarray, " n"]:
        """Return the indices of latents in shards, by their keys; -1 for others."""
        return self._entries.find(keys)

    def write(self, key: str, latents: Float[Tensor, "c f h w"]) -> None:
        """Add one clip's latents; a key already there is kept. Raises ``ValueError`` for NaN or
        infinite values.
        """
        if key in self:
            return
        with np.errstate(over="ignore"):  # an overflow shows as infinite below
            values = latents.detach().cpu().float().numpy().astype(_NAMES[_TYPES[self.dtype]])
        if not np.isfinite(values).all():
            raise ValueError(f"latents of {key}: not finite in {self.dtype}")
        self._pending[key] = values
        if sum(array.nbytes for array in self._pending.values()) >= SHARD_BYTES:
            self.close()

    def read(self, key: str) -> Float[Tensor, "c f h w"]:
        """Return the latents in float32. Raises ``KeyError`` for a key that was never written."""
        if key in self._pending:
            return torch.from_numpy(self._pending[key].astype(np.float32))
        (index,) = self._entries.find([key]).tolist()
        if index < 0:
            raise KeyError(key)
        return self._at(index)

    def window(self, indices: Int[ndarray, " w"], window: float) -> Float[Tensor, "c f h w"]:
        """Return the latents of the cached window nearest to a position ``window`` in [0, 1].

        ``indices`` are those in the cache, in order; -1 is skipped.
        """
        there = indices[indices >= 0]
        return self._at(int(there[min(int(window * len(there)), len(there) - 1)]))

    def _at(self, index: int) -> Float[Tensor, "c f h w"]:
        """Raise ``ValueError`` naming the shard for values that are cut off or not finite."""
        place = self._entries.place(index)
        path = os.path.join(self.root, place.shard)
        count, itemsize = math.prod(place.shape), place.dtype.itemsize
        # Not memory-mapped: where a file is cut off meanwhile, that ends the process.
        file = os.open(path, os.O_RDONLY)
        try:
            raw = os.pread(file, count * itemsize, place.offset)
        finally:
            os.close(file)
        values = np.frombuffer(raw, place.dtype, len(raw) // itemsize).astype(np.float32)
        if len(values) < count or not np.isfinite(values).all():
            raise ValueError(f"{path}: latents at byte {place.offset} are damaged. {_REMEDY}")
        return torch.from_numpy(values.reshape(place.shape))

    def close(self) -> None:
        """Write the latents that are still in memory. The cache can still be used."""
        if not self._pending:
            return
        header: dict[str, Any] = {}
        offset = 0
        for key, array in self._pending.items():
            span = [offset, offset + array.nbytes]
            header[key] = {
                "dtype": _TYPES[self.dtype],
                "shape": list(array.shape),
                "data_offsets": span,
            }
            offset = span[1]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the format wants its numbers aligned
        # Named by its first key: no two ranks or runs ever write the same name.
        shard = self.root / f"{next(iter(self._pending))}.safetensors"
        body = b"".join(array.tobytes() for array in self._pending.values())
        _write_whole(shard, len(text).to_bytes(8, "little") + text + body)
        self._pending.clear()
        self._entries.add(shard)

    def __enter__(self) -> LatentCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _write_whole(path: Path, content: bytes) -> None:
    """Write to a temporary name and rename, so that a reader never sees half a file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)
