"""Reads a manifest: a table whose rows name video or image files and their captions. Looks at no
pixels.

| Column | Meaning | Filled by ``index`` |
|---|---|---|
| ``path`` | file, absolute or relative to the manifest's folder; needed | |
| ``caption`` | a sentence, or a list of sentences or ``{text, weight}``; needed | |
| ``text`` | the same as ``caption``, which goes before it | |
| ``label`` | class of the clip: a whole number or a name | |
| ``source`` | file that this one is an edit of, named as ``path`` is; see ``sources`` | |
| ``start_s``, ``end_s`` | window in the file, in seconds from its first frame | with ``--scenes`` |
| ``fps``, ``num_frames``, ``height``, ``width`` | of the file, upright; save probing it | yes |
| ``decoder``, ``decoder_reason`` | ``pyav`` where decord must not read the file, and why | yes |
| ``content``, ``num_bytes``, ``modified_ns`` | sha256, size and time of the file | yes |
| ``motion``, ``black``, ``static``, ``look``, ``duplicate_of`` | see ``curation`` | ``--scores`` |
| ``shard``, ``offset``, ``size`` | tar file (or address) that holds the file, and where | |
| ``litdata``, ``item`` | litdata dataset (or address) that holds the file, and its number | |
| any other | for ``filters``: a number or text | |
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sora_lightning.data.decoding.litdata_items import require_litdata
from sora_lightning.data.manifest.tables import Row, read_rows

# Columns that say in what a clip lies that is no file by itself: the kind of thing, and the file in
# it that must be there.
_HOLDERS = {"shard": ("tar file", ""), "litdata": ("folder of litdata", "index.json")}


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
    ``weights`` are the shares of the captions, summing to one. ``decord_objection`` says why decord
    must not read the file, None that the file itself has to be asked. ``columns`` holds the row.
    Whether there is a file of the name in ``source`` is looked at where pairs are asked for.
    """

    path: Path
    captions: tuple[str, ...]
    clip_id: str
    start_s: float = 0.0
    end_s: float = math.inf
    footage: Footage | None = None
    weights: tuple[float, ...] = ()
    label: int | str | None = None
    decord_objection: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    source: Path | None = None


def read_manifest(manifest: Path) -> list[ClipRecord]:
    """The rows of a manifest, in order; the formats stand at ``read_rows``, the columns above.
    ``open_manifest`` does without a record for each.

    Raises ``ValueError`` naming file, line, key and rule for anything wrong, an empty manifest and
    two rows for one clip included.
    """
    manifest = Path(manifest)
    folder = manifest if manifest.is_dir() else manifest.parent
    records: list[ClipRecord] = []
    place_of: dict[str, str] = {}
    for place, columns in read_rows(manifest):
        record = record_of(place, columns, folder)
        if record.clip_id in place_of:
            same = f"the same clip stands in {place_of[record.clip_id]}"
            raise _Row(place, columns).error("path", same)
        place_of[record.clip_id] = f"line {place.rpartition(':')[2]}"
        records.append(record)
    if not records:
        raise ValueError(f"{manifest}: the manifest has no rows")
    return records


def record_of(place: str, columns: Row, folder: Path) -> ClipRecord:
    """The record of one row. Raises ``ValueError`` naming its place for anything wrong in it."""
    return _Row(place, columns).record(folder)


def clip_id(columns: Row) -> str:
    """Names the clip of a row that ``record_of`` finds right."""
    end_s = columns.get("end_s")
    window = [columns.get("start_s") or 0.0, math.inf if end_s is None else end_s]
    return hashlib.sha256(json.dumps([columns["path"], *window]).encode()).hexdigest()[:16]


class _Row:
    """One row of a manifest, with its place in the file for messages."""

    def __init__(self, place: str, columns: Row) -> None:
        self.place = place
        self.columns = columns

    def error(self, key: str, rule: str) -> ValueError:
        value = f" = {self.columns[key]!r}" if key in self.columns else ""
        return ValueError(f"{self.place}: {key}{value}: {rule}")

    def record(self, folder: Path) -> ClipRecord:
        path = self.columns.get("path")
        if not isinstance(path, str) or not path:
            raise self.error("path", "must name a video file")
        columns = self._columns(folder)
        in_file = "shard" not in columns and "litdata" not in columns
        if in_file and not (folder / path).is_file():
            raise self.error("path", f"no such file: {folder / path}")
        start_s = self._number("start_s", absent=0.0, at_least=0.0) or 0.0
        end_s = self._number("end_s", absent=None, at_least=0.0)
        end_s = math.inf if end_s is None else end_s
        if end_s <= start_s:
            raise self.error("end_s", f"must be greater than start_s = {start_s}")
        captions, weights = self._captions()
        return ClipRecord(
            folder / path, captions, clip_id(self.columns), start_s, end_s, self._footage(),
            weights, self._label(), self._objection(), columns, self._source(folder),
        )  # fmt: skip

    def _columns(self, folder: Path) -> Row:
        """The row; of a clip in a shard or a dataset of litdata, with the whole path or address."""
        columns = {k: v for k, v in self.columns.items() if k not in _HOLDERS or v is not None}
        holders = [key for key in _HOLDERS if key in columns]
        if len(holders) > 1:
            raise self.error("litdata", "shard is given as well: a clip lies in one of them")
        for key in holders:
            columns[key] = self._holder(key, folder)
        return columns

    def _holder(self, key: str, folder: Path) -> str:
        """The whole path or address of the shard or dataset that holds the clip."""
        kind, file = _HOLDERS[key]
        holder = self.columns[key]
        if not isinstance(holder, str) or not holder:
            raise self.error(key, f"must name a {kind}")
        if self._footage() is None:
            raise self.error(key, "the row needs num_frames, fps, height and width as well")
        if key == "litdata":
            item = self._number("item", None, 0)
            if item is None or item != int(item):
                raise self.error("item", "must be the number of the clip in the dataset, from 0")
        elif self._number("offset", None, 0) is None or self._count("size") is None:
            raise self.error(key, "the row needs offset and size, in bytes")
        whole = holder if "://" in holder else str(folder / holder)
        if "://" not in holder and not Path(whole, file).is_file():
            raise self.error(key, f"no such file: {Path(whole, file)}")
        if key == "litdata":
            try:
                require_litdata()
            except ValueError as error:
                raise self.error(key, str(error)) from error
        return whole

    def _captions(self) -> tuple[tuple[str, ...], tuple[float, ...]]:
        key = "text" if "caption" not in self.columns and "text" in self.columns else "caption"
        caption = self.columns.get(key)
        wordings = [caption] if isinstance(caption, str) else caption
        if not isinstance(wordings, list) or not wordings:
            raise self.error(key, "must be a string or a list of strings")
        texts, weights = [], []
        for wording in wordings:
            weighted = isinstance(wording, dict) and set(wording) <= {"text", "weight"}
            text = wording.get("text") if weighted else wording
            weight = wording.get("weight") if weighted else None
            if not isinstance(text, str) or not text.strip():
                raise self.error(key, f"{wording!r} is not a caption")
            weight = 1.0 if weight is None else weight
            if isinstance(weight, bool) or not isinstance(weight, (int, float)):
                raise self.error(key, f"weight = {weight!r}: must be a number")
            if not 0 <= weight < math.inf:
                raise self.error(key, f"weight = {weight}: must be finite and at least 0")
            texts.append(text)
            weights.append(float(weight))
        if not sum(weights):
            raise self.error(key, "the weights are all 0")
        return tuple(texts), tuple(weight / sum(weights) for weight in weights)

    def _source(self, folder: Path) -> Path | None:
        source = self.columns.get("source")
        return folder / source if isinstance(source, str) and source else None

    def _label(self) -> int | str | None:
        label = self.columns.get("label")
        if label is not None and (isinstance(label, bool) or not isinstance(label, (int, str))):
            raise self.error("label", "must be a whole number or a name")
        return label

    def _objection(self) -> str | None:
        decoder = self.columns.get("decoder")
        if decoder not in (None, "decord", "pyav"):
            raise self.error("decoder", "must be decord or pyav")
        if decoder != "pyav":
            return None
        return str(self.columns.get("decoder_reason") or "the manifest says pyav")

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
