"""The rows of a memory-mapped Arrow file as records made on access, so that a million rows take
little memory in a process, and processes share the pages that they have read.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from sora_lightning.data.manifest.captions import Captions
from sora_lightning.data.manifest.records import ClipRecord, ManifestRow, clip_id, read_manifest
from sora_lightning.data.manifest.roots import Roots
from sora_lightning.data.manifest.tables import Row, arrow_batches, arrow_table

ROWS_AT_ONCE = 1024


class _Lazy(Sequence[ClipRecord]):
    """A sequence of records made on access."""

    @abstractmethod
    def _record(self, index: int) -> ClipRecord: ...

    @overload
    def __getitem__(self, index: int) -> ClipRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[ClipRecord]: ...
    def __getitem__(self, index: int | slice) -> ClipRecord | list[ClipRecord]:
        if isinstance(index, slice):
            return [self._record(one) for one in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self._record(index % len(self))


class MemoryMappedRecords(_Lazy):
    """All rows of an Arrow file. Every process maps the file itself."""

    def __init__(
        self, path: Path, captions: Captions | None = None, root: str | None = None
    ) -> None:
        self.path = path
        self.captions = captions
        self.roots = Roots(path, root)
        self._table: Any = None
        self._length = len(self._opened())

    def _opened(self) -> Any:
        if self._table is None:
            self._table = arrow_table(self.path)
        return self._table

    def __len__(self) -> int:
        return self._length

    def _record(self, index: int) -> ClipRecord:
        (row,) = self._opened().slice(index, 1).to_pylist()
        return self.made(index, row)

    def __iter__(self) -> Iterator[ClipRecord]:
        # Through a mapping of its own: what a pass over the whole file touches is let go after it.
        rows = itertools.chain.from_iterable(arrow_batches(self.path, ROWS_AT_ONCE))
        for index, row in enumerate(rows):
            yield self.made(index, row)

    def rows(self, indices: Int[ndarray, " n"], names: Sequence[str]) -> Iterator[Row]:
        """Yield these columns of the rows at rising indices, read many at a time."""
        table = arrow_table(self.path)
        table = table.select([name for name in table.column_names if not names or name in names])
        if not table.num_columns:
            yield from ({} for _ in indices)
            return
        for start in range(0, len(indices), ROWS_AT_ONCE):
            part = indices[start : start + ROWS_AT_ONCE]
            near = table.slice(int(part[0]), int(part[-1] - part[0]) + 1)
            yield from near.take(part - part[0]).to_pylist()

    def made(self, index: int, row: dict[str, Any]) -> ClipRecord:
        columns = {name: value for name, value in row.items() if value is not None}
        row_of_file = ManifestRow(f"{self.path}:{index + 1}", columns)
        self.roots.require(row_of_file.place, columns)
        return row_of_file.record(self.path.parent, self.captions)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}


class ChosenRecords(_Lazy):
    """Some of the rows of an Arrow file, by their indices."""

    def __init__(self, records: MemoryMappedRecords, indices: Int[ndarray, " n"]) -> None:
        self.records = records
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def _record(self, index: int) -> ClipRecord:
        return self.records[int(self.indices[index])]

    def __iter__(self) -> Iterator[ClipRecord]:
        for index, row in zip(self.indices, self.rows(), strict=True):
            yield self.records.made(int(index), row)

    def rows(self, *names: str) -> Iterator[Row]:
        """Yield these columns of the rows, or all columns; absent cells are None."""
        falls = np.flatnonzero(self.indices[1:] < self.indices[:-1]) + 1
        for part in np.split(self.indices, falls):
            if len(part):
                yield from self.records.rows(part, names)


def chosen(
    records: Sequence[ClipRecord], indices: Sequence[int] | Int[ndarray, " n"]
) -> Sequence[ClipRecord]:
    """Return the records at these indices: of a memory-mapped file by reference, else as a list."""
    if isinstance(records, MemoryMappedRecords):
        return ChosenRecords(records, np.asarray(indices, dtype=np.int32))
    if isinstance(records, ChosenRecords):
        return ChosenRecords(records.records, records.indices[np.asarray(indices, dtype=np.int32)])
    return [records[index] for index in indices]


def cells(records: Sequence[ClipRecord], name: str) -> Iterator[Any]:
    """Yield the cells of a column, or ``None``, without making records of a memory-mapped file."""
    if isinstance(records, ChosenRecords):
        return (row.get(name) for row in records.rows(name))
    return (record.columns.get(name) for record in records)


def clip_ids(records: Sequence[ClipRecord]) -> Iterator[str]:
    """Return each ``clip_id``, without making records of a memory-mapped file."""
    if isinstance(records, ChosenRecords):
        return map(clip_id, records.rows("path", "start_s", "end_s"))
    return (record.clip_id for record in records)


def joined(parts: Iterable[Sequence[ClipRecord]]) -> Sequence[ClipRecord]:
    """Concatenate sequences; by reference if all are of one memory-mapped file."""
    parts = [part for part in parts if len(part)]
    of_file = [part for part in parts if isinstance(part, ChosenRecords)]
    if of_file and len(of_file) == len(parts):
        records = of_file[0].records
        if all(part.records is records for part in of_file):
            return ChosenRecords(records, np.concatenate([part.indices for part in of_file]))
    return list(itertools.chain.from_iterable(parts))


def open_manifest(
    manifest: Path, captions: Captions | None = None, root: str | None = None
) -> Sequence[ClipRecord]:
    """Open a manifest like ``read_manifest``, but leave the rows of an Arrow file in the file. All
    rows are checked once, and the same errors raised.
    """
    manifest = Path(manifest)
    if manifest.suffix.lower() != ".arrow" or manifest.is_dir():
        return read_manifest(manifest, captions, root)
    records = MemoryMappedRecords(manifest, captions, root)
    if not len(records):
        raise ValueError(f"{manifest}: the manifest has no rows")
    ids = np.fromiter((int(r.clip_id, 16) for r in records), np.uint64, len(records))
    in_order = np.sort(ids)
    if (in_order[1:] == in_order[:-1]).any():
        order = np.argsort(ids, kind="stable")
        again = np.flatnonzero(np.diff(ids[order]) == 0)
        first, second = (order[again[0] : again[0] + 2] + 1).tolist()
        path = records[second - 1].columns["path"]
        raise ValueError(f"{manifest}:{second}: path = {path!r}: the same clip is in line {first}")
    return records
