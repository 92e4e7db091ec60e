"""Clips in plain tar shards, local or remote: a row's ``shard``, ``offset`` and ``size`` locate its
bytes, and only these are read.

The shards are ordinary tar files for any tar reader. Remote ones are opened by fsspec: ``s3://``,
``gs://``, ``https://`` and other installed protocols.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import tarfile
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from multiprocessing.util import Finalize
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

import fsspec

from sora_lightning.checks import require_at_least
from sora_lightning.data.decoding.errors import DecodeError
from sora_lightning.data.decoding.litdata_items import LitDataItems
from sora_lightning.data.decoding.readers import probe
from sora_lightning.data.manifest.records import ClipRecord, read_manifest
from sora_lightning.data.manifest.roots import is_address
from sora_lightning.data.manifest.tables import Row, with_moved_source, write_lines
from sora_lightning.files import file_sha256

FILES_KEPT = 64
FETCH_TIMEOUT_S = 60.0


class ShardFiles:
    """Extracts clips from shards or litdata datasets to a temporary folder of at most 64 files; a
    clip that is a file is used in place. A remote one may take ``timeout_s`` seconds to fetch.

    Every process has its own folder, which is removed when the process ends.
    """

    def __init__(self, timeout_s: float | None = FETCH_TIMEOUT_S) -> None:
        self.timeout_s = timeout_s
        self._folder: Path | None = None
        self._kept: OrderedDict[Path, int] = OrderedDict()
        self._items = LitDataItems()
        self._owner = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"timeout_s": self.timeout_s}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def local(self, record: ClipRecord) -> Path:
        """Return a file with the clip's bytes. Raises ``DecodeError`` if the shard lacks them."""
        columns = record.columns
        holder = _holder(columns)
        if holder is None:
            return record.path
        if self._owner != os.getpid():  # a fork: what the parent has open is not its own
            self.__init__(self.timeout_s)  # type: ignore[misc]
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="clips-"))
            # In place of weakref.finalize, which does not run when a worker of a loader ends.
            Finalize(self, shutil.rmtree, (self._folder, True), exitpriority=0)
        name = hashlib.sha256(str(holder).encode()).hexdigest()[:8]
        place = columns["offset" if "shard" in columns else "item"]
        # A clip in a shard may have a name that no file can have. Its end says the format.
        named = re.sub(r"[^\w.-]", "_", record.path.name)[-50:]
        path = self._folder / f"{name}-{place}-{named}"
        if path in self._kept:
            self._kept.move_to_end(path)
            return path
        content = _content(record, self._items, self.timeout_s)
        while len(self._kept) >= FILES_KEPT:
            self._kept.popitem(last=False)[0].unlink()
        path.write_bytes(content)
        self._kept[path] = len(content)
        return path


def read_range(record: ClipRecord, start: int, length: int) -> bytes:
    """Return the bytes of a clip in a shard. Raises ``DecodeError`` if the shard ends before them
    or cannot be read.
    """
    shard = str(record.columns["shard"])
    offset = int(record.columns["offset"]) + start
    ends_before = DecodeError(f"{shard}: ends before {record.path.name} does")
    if not is_remote(record) and os.path.exists(shard) and offset + length > os.path.getsize(shard):
        raise ends_before
    try:
        if is_remote(record):
            files, path = fsspec.core.url_to_fs(shard)
            content = files.cat_file(path, offset, offset + length)
        else:  # fsspec would read "::" in a file's name as another address
            with open(shard, "rb") as file:
                file.seek(offset)
                content = file.read(length)
    except Exception as error:  # each of fsspec's file systems raises its own
        raise DecodeError(f"{shard}: cannot be read: {error or type(error).__name__}") from error
    if len(content) < length:
        raise ends_before
    return content


def within(timeout_s: float | None, function: Callable[..., bytes], *arguments: Any) -> bytes:
    """Return the function's value. Raises what it raises, and ``DecodeError`` after ``timeout_s``
    seconds; the thread that waits for an answer is left behind.
    """
    if timeout_s is None:
        return function(*arguments)
    answers: SimpleQueue[bytes | Exception] = SimpleQueue()

    def run() -> None:
        try:
            answers.put(function(*arguments))
        except Exception as error:
            answers.put(error)

    Thread(target=run, daemon=True).start()
    try:
        answer = answers.get(timeout=timeout_s)
    except Empty:
        raise DecodeError(f"took longer than {timeout_s:g} s to fetch") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _holder(columns: Mapping[str, Any]) -> Any:
    """Return the shard or litdata dataset that holds a clip; ``None`` for a file."""
    return columns.get("shard", columns.get("litdata"))


def _content(record: ClipRecord, items: LitDataItems, timeout_s: float | None) -> bytes:
    columns = record.columns
    timeout_s = timeout_s if is_remote(record) else None
    try:
        if "litdata" not in columns:
            return within(timeout_s, read_range, record, 0, int(columns["size"]))
        return within(timeout_s, items.content, columns["litdata"], int(columns["item"]))
    except DecodeError as error:
        place = str(_holder(columns))
        raise error if place in str(error) else DecodeError(f"{place}: {error}") from error
    except ValueError as error:
        raise DecodeError(str(error)) from error


def clip_sha256(record: ClipRecord) -> str:
    """Hash all of a clip's bytes. Raises ``DecodeError``, or ``OSError`` for a plain file."""
    if _holder(record.columns) is None:
        return file_sha256(record.path)
    return hashlib.sha256(_content(record, LitDataItems(), FETCH_TIMEOUT_S)).hexdigest()


def is_remote(record: ClipRecord) -> bool:
    """Return True if a clip is at an address instead of in a file."""
    return is_address(str(_holder(record.columns) or ""))


def place_of(record: ClipRecord) -> tuple[str, Any]:
    """Return the file, shard or dataset of a clip, and its place in it."""
    holder = _holder(record.columns)
    if holder is None:
        return str(record.path), None
    return str(holder), record.columns["offset" if "shard" in record.columns else "item"]


def stamp(record: ClipRecord) -> tuple[int, int] | None:
    """Return the size of a clip in bytes and the time at which its file was written; None without a
    file. The size of a litdata item is taken from the manifest.
    """
    seen = state(record)
    if seen is None:
        return None
    columns = record.columns
    size = columns.get("num_bytes" if "litdata" in columns else "size")
    return int(seen.size if _holder(columns) is None or size is None else size), seen.modified_ns


class State(NamedTuple):
    """Properties of a file from the file system. No program can set ``changed_ns`` back."""

    size: int
    modified_ns: int
    changed_ns: int
    inode: int


def state(record: ClipRecord) -> State | None:
    """Return the state of a clip's file, shard or dataset; None where there is no file."""
    columns = record.columns
    holder = _holder(columns)
    path = record.path if holder is None else Path(holder)
    path = path / "index.json" if "litdata" in columns else path
    if not path.is_file():
        return None
    seen = path.stat()
    return State(seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino)


def write_shards(
    manifest: Path, folder: Path, shard_bytes: int = 2**28, root: str | None = None
) -> Path:
    """Copy a manifest's clips into tar shards of about ``shard_bytes``, and return the manifest of
    these: the same rows with ``shard, offset, size``, and the technical columns, probed where they
    are missing. The clips lie in the manifest's folder, or under ``root``.

    Raises ``ValueError`` for a budget below 1, ``DecodeError`` for a clip that cannot be
    probed, or whose bytes are not those that its ``content`` names.
    """
    require_at_least(1, shard_bytes=shard_bytes)
    records, files = read_manifest(manifest, root=root), ShardFiles()
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
        path = files.local(record)
        content = path.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        if record.columns.get("content") not in (None, "", sha256):
            raise DecodeError(f"{record.path}: has changed since it was indexed: index it again")
        entry = tarfile.TarInfo(f"{index:08d}{record.path.suffix}")
        entry.size = len(content)
        offset = shard.offset + len(entry.tobuf(shard.format))
        shard.addfile(entry, io.BytesIO(content))
        metadata = record.metadata or probe(path)
        place = {"shard": f"shard-{number:06d}.tar", "offset": offset, "size": len(content)}
        named = record.columns.get("path", str(record.path.relative_to(base)))
        facts = {"content": sha256, "num_bytes": len(content)}
        columns = with_moved_source(dict(record.columns), base, folder)
        rows.append({**columns, "path": named, **vars(metadata), **place, **facts})
    assert shard is not None
    shard.close()
    for row in rows:  # every shard is whole by now
        row["modified_ns"] = (folder / row["shard"]).stat().st_mtime_ns
    write_lines(folder / "clips.jsonl", rows)
    return folder / "clips.jsonl"
