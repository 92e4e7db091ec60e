"""Reads prompts: the lines of a text file, or the captions of a manifest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sora_lightning.data.manifest.records import ManifestRow, read_texts
from sora_lightning.data.manifest.tables import SUFFIXES


def read_prompts(source: Path, column: str | None = None) -> list[ManifestRow]:
    """Return a row for each prompt, whose first caption it is: in ``column``, if it is given.

    In a text file (``.txt``) a line is a prompt, and empty lines are skipped. Raises ``ValueError``
    naming the file, and the line if there is one, for a file without prompts.
    """
    if not source.exists():
        raise ValueError(f"{source}: no such file")
    if source.suffix.lower() not in (".txt", *SUFFIXES) and not source.is_dir():
        raise ValueError(
            f"{source}: must be a text file (.txt) with a prompt a line, or a manifest "
            f"({', '.join(SUFFIXES)})"
        )
    rows = list(_lines(source) if source.suffix.lower() == ".txt" else read_texts(source))
    if not rows:
        raise ValueError(f"{source}: holds no prompt")
    for row in rows:
        if not row.first_caption(column).strip():
            raise row.error(column or "caption", "is empty")
    return rows


def _lines(source: Path) -> Iterator[ManifestRow]:
    try:
        text = source.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 text: {error}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield ManifestRow(f"{source}:{number}", {"caption": line.strip()})
