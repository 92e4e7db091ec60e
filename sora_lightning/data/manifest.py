"""Reads a manifest: one JSON object a line, naming a video file and its caption. Looks at no
pixels.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Footage:
    """What a file holds, as shown: rows and columns after rotation, ``fps`` the mean rate of its
    frames.
    """

    num_frames: int
    fps: float
    height: int
    width: int

    @property
    def duration_s(self) -> float:
        return self.num_frames / self.fps


@dataclass(frozen=True)
class ClipRecord:
    """One row. ``start_s`` and ``end_s`` cut a window out of the file, in seconds from its first
    frame.

    ``clip_id`` names path and window; it stays the same when rows are added, moved or recaptioned.
    """

    path: Path
    captions: tuple[str, ...]
    clip_id: str
    start_s: float = 0.0
    end_s: float = math.inf
    footage: Footage | None = None


def read_manifest(manifest: Path) -> list[ClipRecord]:
    """The rows of a JSONL manifest, in order; empty lines are passed over.

    Columns: ``path`` (absolute or relative to the manifest's folder), ``caption`` (a string or a
    list of wordings), optionally ``start_s`` and ``end_s``, and ``fps, num_frames, height, width``,
    which save probing the file where all four are given. Other columns are left alone. Raises
    ``ValueError`` naming file, line, key and rule for anything wrong, an empty manifest and two
    rows for one clip included.
    """
    manifest = Path(manifest)
    if not manifest.is_file():
        raise ValueError(f"{manifest}: no such manifest")
    try:
        lines = manifest.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{manifest}: not a JSONL manifest: {error}") from error
    records: list[ClipRecord] = []
    line_of: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _Row(f"{manifest}:{number}", line)
        record = row.record(manifest.parent)
        if record.clip_id in line_of:
            raise row.error("path", f"the same clip stands in line {line_of[record.clip_id]}")
        line_of[record.clip_id] = number
        records.append(record)
    if not records:
        raise ValueError(f"{manifest}: the manifest has no rows")
    return records


class _Row:
    """One line of a manifest, with its place in the file for messages."""

    def __init__(self, place: str, line: str) -> None:
        self.place = place
        try:
            self.columns = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: not JSON: {error}") from error
        if not isinstance(self.columns, dict):
            raise ValueError(
                f"{place}: {line.strip()[:60]} is not a JSON object with path and caption"
            )

    def error(self, key: str, rule: str) -> ValueError:
        value = f" = {self.columns[key]!r}" if key in self.columns else ""
        return ValueError(f"{self.place}: {key}{value}: {rule}")

    def record(self, folder: Path) -> ClipRecord:
        path = self.columns.get("path")
        if not isinstance(path, str) or not path:
            raise self.error("path", "must name a video file")
        if not (folder / path).is_file():
            raise self.error("path", f"no such file: {folder / path}")
        start_s = self._number("start_s", absent=0.0, at_least=0.0) or 0.0
        end_s = self._number("end_s", absent=None, at_least=0.0)
        end_s = math.inf if end_s is None else end_s
        if end_s <= start_s:
            raise self.error("end_s", f"must be greater than start_s = {start_s}")
        identity = json.dumps([path, start_s, end_s])
        clip_id = hashlib.sha256(identity.encode()).hexdigest()[:16]
        return ClipRecord(folder / path, self._captions(), clip_id, start_s, end_s, self._footage())

    def _captions(self) -> tuple[str, ...]:
        caption = self.columns.get("caption")
        wordings = [caption] if isinstance(caption, str) else caption
        if not isinstance(wordings, list) or not wordings:
            raise self.error("caption", "must be a string or a list of strings")
        for wording in wordings:
            if not isinstance(wording, str) or not wording.strip():
                raise self.error("caption", f"{wording!r} is not a caption")
        return tuple(wordings)

    def _footage(self) -> Footage | None:
        num_frames, height, width = map(self._count, ("num_frames", "height", "width"))
        fps = self._number("fps", absent=None, at_least=1e-3)
        if num_frames and height and width and fps:
            return Footage(num_frames, fps, height, width)
        return None

    def _count(self, key: str) -> int | None:
        value = self._number(key, absent=None, at_least=1)
        if value is not None and value != int(value):
            raise self.error(key, "must be a whole number")
        return None if value is None else int(value)

    def _number(self, key: str, absent: float | None, at_least: float) -> float | None:
        value = self.columns.get(key)
        if value is None:
            return absent
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, "must be a number")
        if not at_least <= value < math.inf:
            raise self.error(key, f"must be finite and at least {at_least}")
        return value
