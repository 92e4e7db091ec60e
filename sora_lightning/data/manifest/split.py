"""Splits a manifest by file into a training and a test manifest."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from sora_lightning.data.manifest.records import ManifestRow
from sora_lightning.data.manifest.tables import (
    Row,
    file_identity,
    moved_row,
    read_rows,
    write_rows,
)


def split(
    source: Path, output: Path, num_held_out: int, seed: int = 0, root: str | None = None
) -> None:
    """Write ``train.jsonl`` and ``test.jsonl``: all rows of a file go to the same one.

    The held-out files are drawn by their paths and the seed, independent of the order of the rows.
    One file under two paths or hard links, and copies of one ``content``, count as one.

    Args:
        source: A manifest (JSONL, CSV, Parquet), or a folder of videos with captions beside them.
        output: The folder of the two manifests.
        num_held_out: Number of files in ``test.jsonl``.
        seed: Draws them.
        root: A folder or address, besides the manifest's own folder, under which the files may lie
            that it names.
    """
    source, output = Path(source), Path(output)
    folder = source if source.is_dir() else source.parent
    first_of: dict[object, str] = {}
    rows = [(_file_of(row, place, folder, first_of), row) for place, row in read_rows(source, root)]
    names = sorted({name for name, _ in rows}, key=lambda name: (_draw(name, seed), name))
    if not 0 < num_held_out < len(names):
        raise ValueError(
            f"num_held_out = {num_held_out}: must be from 1 to {len(names) - 1}, since {source} "
            f"names {len(names)} files"
        )
    held_out = set(names[:num_held_out])
    for part, taken in (("train", False), ("test", True)):
        rows_of_part = [row for name, row in rows if (name in held_out) == taken]
        chosen = [moved_row(row, folder, output) for row in rows_of_part]
        write_rows(output / f"{part}.jsonl", chosen)
        print(f"{output / part}.jsonl: {len(chosen)} of {len(rows)} rows")


def _file_of(row: Row, place: str, folder: Path, first_of: dict[object, str]) -> str:
    """Return the file of a row, relative to the folder; of files of one content, the first."""
    real = os.path.realpath(folder / ManifestRow(place, row).path())
    name = Path(os.path.relpath(real, os.path.realpath(folder))).as_posix()
    name = first_of.setdefault(file_identity(Path(real)), name)
    content = row.get("content")
    return first_of.setdefault(content, name) if isinstance(content, str) and content else name


def _draw(name: str, seed: int) -> str:
    return hashlib.sha256(f"{seed} {name}".encode()).hexdigest()
