"""A cache of latents on disk: what a tokenizer made of the clips, so that training on them decodes
and encodes nothing.

A folder of safetensors shards beside one ``index.json`` that names the tokenizer. A key stands for
the file's content, the window and the size; tokenizer and number format belong to the whole cache,
and another one is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sora_lightning.data.manifest import ClipRecord
from sora_lightning.types import VideoSize

INDEX = "index.json"
SHARD_BYTES = 64 * 2**20
# Part of every key: a change of what a window or a resize means must not serve old latents.
POLICY = "window midpoints; antialiased bilinear; centre crop; 1"

_NAMES: dict[str, np.dtype] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
_TYPES = {"float16": "F16", "float32": "F32"}


def latent_key(
    content: str, record: ClipRecord, size: VideoSize, fps: float, window: int, num_windows: int
) -> str:
    """Names the latents of one of a clip's evenly placed windows, at one size and frame rate."""
    parts = [content, record.start_s, record.end_s, str(size), fps, window, num_windows, POLICY]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


class _Place(NamedTuple):
    shard: str
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]


class LatentCache:
    """Latents by key. ``create`` to write, ``open`` to read.

    Use it as a context manager, or call ``close``: what was written stands in memory until a shard
    is full. A shard is moved into place when it is complete, so that a run that is cut short leaves
    no broken one.
    """

    def __init__(self, root: Path, tokenizer: str, dtype: str) -> None:
        self.root = root
        self.tokenizer = tokenizer
        self.dtype = dtype
        self._pending: dict[str, np.ndarray] = {}
        self._maps: dict[str, np.memmap] = {}
        self._places: dict[str, _Place] = {}
        for shard in sorted(root.glob("*.safetensors")):
            self._register(shard)

    @classmethod
    def create(
        cls, root: Path, tokenizer: str, dtype: Literal["float16", "float32"] = "float16"
    ) -> LatentCache:
        """Start a cache for the tokenizer of that fingerprint, or go on with one begun before.

        Raises ``ValueError`` where the folder holds the latents of another tokenizer or number
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
        """A cache made before. Raises ``ValueError`` where there is none."""
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
        return len(self._places) + len(self._pending)

    def __contains__(self, key: str) -> bool:
        return key in self._places or key in self._pending

    def keys(self) -> set[str]:
        """The names of all latents."""
        return self._places.keys() | self._pending.keys()

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
        """The latents in float32. Raises ``KeyError`` for a key that was never written."""
        if key in self._pending:
            return torch.from_numpy(self._pending[key].astype(np.float32))
        place = self._places[key]
        if place.shard not in self._maps:
            self._maps[place.shard] = np.memmap(self.root / place.shard, mode="r")
        count = int(np.prod(place.shape))
        flat = np.frombuffer(self._maps[place.shard], place.dtype, count, place.offset)
        return torch.from_numpy(flat.reshape(place.shape).astype(np.float32))

    def close(self) -> None:
        """Write what is still in memory. The cache may be used on."""
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
        self._register(shard)

    def __enter__(self) -> LatentCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_maps": {},
        }  # a mapped file would travel to workers as a copy of its bytes

    def _register(self, shard: Path) -> None:
        with shard.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for key, entry in header.items():
            if key != "__metadata__":
                offset = 8 + length + entry["data_offsets"][0]
                self._places[key] = _Place(
                    shard.name, offset, _NAMES[entry["dtype"]], tuple(entry["shape"])
                )


def _write_whole(path: Path, content: bytes) -> None:
    """Write beside the name and move into place, so that nobody reads half a file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)
