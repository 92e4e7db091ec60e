"""Clips in plain tar shards, local or remote: a row's ``shard``, ``offset`` and ``size`` say where
its bytes lie, and no more than these are read.

The shards are ordinary tar files, so that anything that reads tar streams reads them too. Remote
ones are opened by fsspec: ``s3://``, ``gs://``, ``https://`` and what else is installed.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tarfile
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from sora_lightning.data.decoding.errors import DecodeError
from sora_lightning.data.decoding.litdata_items import LitDataItems
from sora_lightning.data.decoding.readers import probe
from sora_lightning.data.manifest.records import ClipRecord, read_manifest
from sora_lightning.data.manifest.tables import Row, with_moved_source, write_lines
from sora_lightning.files import file_sha256

FILES_KEPT = 64


class ShardFiles:
    """Brings clips out of their shards, or out of litdata's, into files of a temporary folder, the
    last 64 of them; a clip that is a file by itself stays where it is.

    Every process has a folder of its own, which goes when the process ends.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._kept: OrderedDict[Path, int] = OrderedDict()
        self._items = LitDataItems()
        self._owner = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def local(self, record: ClipRecord) -> Path:
        """A file with the clip's bytes. Raises ``DecodeError`` where the shard has none there."""
        columns = record.columns
        holder = _holder(columns)
        if holder is None:
            return record.path
        if self._owner != os.getpid():  # a fork: what the parent has open is not its own
            self.__init__()  # type: ignore[misc]
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="clips-"))
            # In place of weakref.finalize, which does not run when a worker of a loader ends.
            Finalize(self, shutil.rmtree, (self._folder, True), exitpriority=0)
        name = hashlib.sha256(str(holder).encode()).hexdigest()[:8]
        place = columns["offset" if "shard" in columns else "item"]
        path = self._folder / f"{name}-{place}-{record.path.name}"
        if path in self._kept:
            self._kept.move_to_end(path)
            return path
        content = _content(record, self._items)
        while len(self._kept) >= FILES_KEPT:
            self._kept.popitem(last=False)[0].unlink()
        path.write_bytes(content)
        self._kept[path] = len(content)
        return path


def read_range(record: ClipRecord, start: int, length: int) -> bytes:
    """Bytes of a clip in a shard. Raises ``DecodeError`` where the shard ends before them, or
    cannot be opened.
    """
    shard = str(record.columns["shard"])
    try:
        with fsspec.open(shard, "rb") as file:
            file.seek(int(record.columns["offset"]) + start)
            content = file.read(length)
    except (OSError, ImportError, ValueError) as error:
        raise DecodeError(f"{shard}: cannot be read: {error}") from error
    if len(content) < length:
        raise DecodeError(f"{shard}: ends before {record.path.name} does")
    return content


def _holder(columns: Mapping[str, Any]) -> Any:
    """The shard or the dataset of litdata that a clip lies in; None for a file by itself."""
    return columns.get("shard", columns.get("litdata"))


def _content(record: ClipRecord, items: LitDataItems) -> bytes:
    columns = record.columns
    if "litdata" not in columns:
        return read_range(record, 0, int(columns["size"]))
    try:
        return items.content(columns["litdata"], int(columns["item"]))
    except ValueError as error:
        raise DecodeError(str(error)) from error


def clip_sha256(record: ClipRecord) -> str:
    """Of all of a clip's bytes. Raises ``DecodeError``, or ``OSError`` for a file by itself."""
    if _holder(record.columns) is None:
        return file_sha256(record.path)
    return hashlib.sha256(_content(record, LitDataItems())).hexdigest()


def is_remote(record: ClipRecord) -> bool:
    """Whether what holds a clip has an address, and is no file."""
    return "://" in str(_holder(record.columns) or "")


def place_of(record: ClipRecord) -> tuple[str, Any]:
    """What holds a clip, and where in it the clip lies."""
    holder = _holder(record.columns)
    if holder is None:
        return str(record.path), None
    return str(holder), record.columns["offset" if "shard" in record.columns else "item"]


def stamp(record: ClipRecord) -> tuple[int, int] | None:
    """How many bytes a clip has, and when its file or what holds it was last written; None without
    one. How many bytes an item of litdata has is what the manifest says.
    """
    seen = state(record)
    if seen is None:
        return None
    columns = record.columns
    size = columns.get("num_bytes" if "litdata" in columns else "size")
    return int(seen.size if _holder(columns) is None or size is None else size), seen.modified_ns


class State(NamedTuple):
    """What the file system says of a file. No program can set back ``changed_ns``."""

    size: int
    modified_ns: int
    changed_ns: int
    inode: int


def state(record: ClipRecord) -> State | None:
    """Of a clip's file, or of what holds it; None where there is no file."""
    columns = record.columns
    holder = _holder(columns)
    path = record.path if holder is None else Path(holder)
    path = path / "index.json" if "litdata" in columns else path
    if not path.is_file():
        return None
    seen = path.stat()
    return State(seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino)


def write_shards(manifest: Path, folder: Path, shard_bytes: int = 2**28) -> Path:
    """Copy a manifest's clips into tar shards of about ``shard_bytes``, and return the manifest of
    these: the same rows with ``shard, offset, size``, and the technical columns, probed where they
    lack.

    Raises ``ValueError`` for a budget that is none, ``DecodeError`` for a clip that cannot be
    probed, or whose bytes are not those that its ``content`` names.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes = {shard_bytes}: must be positive")
    records = read_manifest(manifest)
    base = Path(manifest) if Path(manifest).is_dir() else Path(manifest).parent
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    number, shard = -1, None
    for index, record in enumerate(records):
        if shard is None or shard.offset >= shard_bytes:
            if shard is not None:
                shard.close()
            number += 1
            shard = tarfile.open(folder / f"shard-{number:06d}.tar", "w")  # noqa: SIM115
        content = record.path.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        if record.columns.get("content") not in (None, "", sha256):
            raise DecodeError(f"{record.path}: has changed since it was indexed: index it again")
        entry = tarfile.TarInfo(f"{index:08d}{record.path.suffix}")
        entry.size = len(content)
        offset = shard.offset + len(entry.tobuf(shard.format))
        shard.addfile(entry, io.BytesIO(content))
        metadata = record.metadata or probe(record.path)
        place = {"shard": f"shard-{number:06d}.tar", "offset": offset, "size": len(content)}
        path = record.columns.get("path", str(record.path.relative_to(base)))
        named = {"content": sha256, "num_bytes": len(content)}
        columns = with_moved_source(dict(record.columns), base, folder)
        rows.append({**columns, "path": path, **vars(metadata), **place, **named})
    assert shard is not None
    shard.close()
    for row in rows:  # every shard is whole by now
        row["modified_ns"] = (folder / row["shard"]).stat().st_mtime_ns
    write_lines(folder / "clips.jsonl", rows)
    return folder / "clips.jsonl"
