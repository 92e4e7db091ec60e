"""Reads a manifest: a table whose rows name video or image files and their captions. Reads no
pixels. README.md of the data folder lists the columns.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sora_lightning.data.decoding.litdata_items import require_litdata
from sora_lightning.data.decoding.video_metadata import VideoMetadata
from sora_lightning.data.manifest.captions import Captions
from sora_lightning.data.manifest.roots import HOLDERS, is_address, local_path
from sora_lightning.data.manifest.tables import MEDIA, Row, parse_rows, read_rows

# The first that is there is read.
CAPTION_COLUMNS = ("caption", "text", "prompt")
LABEL = 200  # characters
# Of UTF-16 read as UTF-8, and halves of a character, which no file can hold.
NO_TEXT = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True)
class ClipRecord:
    """One row. ``start_s`` and ``end_s`` cut a window out of the file, in seconds from its first
    frame.

    ``clip_id`` names path and window; it stays the same when rows are added, moved or recaptioned.
    ``weights`` are the shares of the captions, summing to one; a row without one of the columns of
    ``Captions`` has neither captions nor weights. ``decord_objection`` says why decord
    must not read the file; ``None`` if the row does not say. ``columns`` holds the row. Whether the
    file in ``source`` exists is checked if pairs are requested.
    """

    path: Path
    captions: tuple[str, ...]
    clip_id: str
    start_s: float = 0.0
    end_s: float = math.inf
    metadata: VideoMetadata | None = None
    weights: tuple[float, ...] = ()
    label: int | str | None = None
    decord_objection: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    source: Path | None = None


def read_manifest(
    manifest: Path, captions: Captions | None = None, root: str | None = None
) -> list[ClipRecord]:
    """Read the clips of a manifest, in order, from the formats of ``parse_rows``. They lie in the
    manifest's folder, or under ``root``.

    By default every row needs a caption; ``captions`` names other columns, which a row may lack.

    Raises ``ValueError`` naming file, line, key and rule for any error, including an empty
    manifest and two rows for one clip. ``open_manifest`` makes records on access.
    """
    manifest = Path(manifest)
    folder = manifest if manifest.is_dir() else manifest.parent
    records: list[ClipRecord] = []
    place_of: dict[str, str] = {}
    for row in read_table(manifest, root):
        record = row.record(folder, captions)
        if record.clip_id in place_of:
            raise row.error("path", f"the same clip is in {place_of[record.clip_id]}")
        place_of[record.clip_id] = f"line {row.place.rpartition(':')[2]}"
        records.append(record)
    return records


def read_table(source: Path, root: str | None = None) -> Iterator[ManifestRow]:
    """Read the rows of a manifest without making records; a column is checked when it is read.

    Raises ``ValueError`` for a file that is no such table, for one without rows, and for a file
    outside of the manifest's folder and of ``root``.
    """
    return _rows(source, read_rows(source, root))


def read_texts(source: Path) -> Iterator[ManifestRow]:
    """Read the rows of a manifest for their captions alone: files may lie anywhere."""
    return _rows(source, parse_rows(source))


def _rows(source: Path, rows: Iterator[tuple[str, Row]]) -> Iterator[ManifestRow]:
    row = None
    for place, columns in rows:
        yield (row := ManifestRow(place, columns))
    if row is None:
        raise ValueError(f"{source}: the manifest has no rows")


def clip_id(columns: Row) -> str:
    """Return the clip_id of a row that ``ManifestRow.record`` accepts; ``a.mp4`` and ``./a.mp4``
    are one clip.
    """
    end_s = columns.get("end_s")
    window = [columns.get("start_s") or 0.0, math.inf if end_s is None else end_s]
    path = os.path.normpath(columns["path"])
    return hashlib.sha256(json.dumps([path, *window]).encode()).hexdigest()[:16]


def one_line(text: str) -> str:
    """Return a text on one line, without characters that do not show."""
    return " ".join("".join(one if one.isprintable() else " " for one in text).split())


def label_of(text: str) -> str:
    """Return a text as a name for a page of TensorBoard: ``one_line`` of at most ``LABEL``
    characters, the last of which tell cut texts apart.
    """
    line = one_line(text)
    if len(line) <= LABEL:
        return line
    digest = hashlib.sha256(line.encode()).hexdigest()[:8]
    return f"{line[: LABEL - 11]}... {digest}"[:LABEL]


@dataclass(frozen=True)
class ManifestRow:
    """One row of a manifest. Methods raise ``ValueError`` naming its place and the key.

    ``columns`` holds the cells as written; ``place`` is ``file:line``, or a medium's path.
    """

    place: str
    columns: Row

    def error(self, key: str, rule: str) -> ValueError:
        value = f" = {self.columns[key]!r}" if key in self.columns else ""
        if (
            key in ("path", *CAPTION_COLUMNS)
            and key not in self.columns
            and self.columns.keys() != {"path"}
        ):
            rule += f"; the row has {', '.join(map(repr, self.columns))}"
        return ValueError(f"{self.place}: {key}{value}: {rule}")

    def record(self, folder: Path, choice: Captions | None = None) -> ClipRecord:
        """Return the clip of the row; its paths are relative to ``folder``."""
        path = folder / self.path()
        columns = self._columns(folder)
        if "shard" not in columns and "litdata" not in columns and not path.is_file():
            raise self.error("path", f"no such file: {path}")
        start_s, end_s = self.window()
        captions, weights = self.captions() if choice is None else self.mixed_captions(choice)
        return ClipRecord(
            path, captions, clip_id(self.columns), start_s, end_s, self.metadata(),
            weights, self._label(), self._objection(), columns, self._source(folder),
        )  # fmt: skip

    def path(self) -> str:
        """Return the path as written."""
        path = self.columns.get("path")
        if not isinstance(path, str) or not path:
            raise self.error("path", "must name a video file")
        return path

    def window(self) -> tuple[float, float]:
        """Return ``start_s`` and ``end_s``; by default 0 and infinity."""
        start_s = self.number("start_s", at_least=0.0) or 0.0
        end_s = self.number("end_s", at_least=0.0)
        end_s = math.inf if end_s is None else end_s
        if end_s <= start_s:
            raise self.error("end_s", f"must be greater than start_s = {start_s}")
        return start_s, end_s

    def captions(self) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """Return the captions and their weights, which sum to one."""
        key = next((key for key in CAPTION_COLUMNS if key in self.columns), CAPTION_COLUMNS[0])
        return self.wordings(key)

    def first_caption(self, column: str | None = None) -> str:
        """Return the first caption in a column; by default that of ``captions``."""
        return (self.captions() if column is None else self.wordings(column))[0][0]

    def mixed_captions(self, choice: Captions) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """Return the captions of the chosen columns, by people first, and their weights.

        A row without any has none, or an empty one where none is required.
        """
        shares = (
            (choice.column, 1 - choice.synthetic_share),
            (choice.synthetic, choice.synthetic_share),
        )
        present = [
            (key, share) for key, share in shares if key and self.columns.get(key) is not None
        ]
        if not present:
            return ((), ()) if choice.required else (("",), (1.0,))
        texts: list[str] = []
        weights: list[float] = []
        for key, share in present:
            of_column, of_each = self.wordings(key)
            texts += of_column
            weights += [weight * (share if len(present) > 1 else 1.0) for weight in of_each]
        return tuple(texts), tuple(weights)

    def wordings(self, key: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """Return the captions in a column and their weights, which sum to one."""
        caption = self.columns.get(key)
        wordings = [caption] if isinstance(caption, str) else caption
        if not isinstance(wordings, list) or not wordings:
            rule = "must be a string or a list of strings"
            medium = Path(self.place)
            if medium.suffix.lower() in MEDIA:  # in a folder
                rule += f", in {medium.with_suffix('.txt').name} beside it"
            raise self.error(key, rule)
        pairs = [self._wording(key, wording) for wording in wordings]
        total = sum(weight for _, weight in pairs)
        if not total:
            raise self.error(key, "the weights are all 0")
        return tuple(text for text, _ in pairs), tuple(weight / total for _, weight in pairs)

    def metadata(self) -> VideoMetadata | None:
        """Return frames, rate and size in the row; ``None`` if one of them is missing."""
        num_frames, height, width = map(self.count, ("num_frames", "height", "width"))
        fps = self.number("fps", at_least=1e-3)
        if num_frames and height and width and fps:
            return VideoMetadata(num_frames, fps, height, width)
        return None

    def count(self, key: str) -> int | None:
        """Return a whole number from 1; ``None`` if the column is missing."""
        value = self.number(key, at_least=1)
        if value is not None and value != int(value):
            raise self.error(key, "must be a whole number")
        return None if value is None else int(value)

    def number(self, key: str, at_least: float) -> float | None:
        """Return a finite number; ``None`` if the column is missing."""
        value = self.columns.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, "must be a number")
        if not at_least <= value <= sys.float_info.max:
            raise self.error(key, f"must be finite and at least {at_least}")
        return value

    def _columns(self, folder: Path) -> Row:
        """Return the row, with the whole path or address of its shard or litdata dataset."""
        columns = {k: v for k, v in self.columns.items() if k not in HOLDERS or v is not None}
        holders = [key for key in HOLDERS if key in columns]
        if len(holders) > 1:
            raise self.error("litdata", "shard is given as well: a clip lies in one of them")
        for key in holders:
            columns[key] = self._holder(key, folder)
        return columns

    def _holder(self, key: str, folder: Path) -> str:
        """Return the whole path or address of the shard or dataset that holds the clip."""
        kind, file = HOLDERS[key]
        holder = self.columns[key]
        if not isinstance(holder, str) or not holder:
            raise self.error(key, f"must name a {kind}")
        if self.metadata() is None:
            raise self.error(key, "the row needs num_frames, fps, height and width as well")
        if key == "litdata":
            item = self.number("item", 0)
            if item is None or item != int(item):
                raise self.error("item", "must be the number of the clip in the dataset, from 0")
        elif self.number("offset", 0) is None or self.count("size") is None:
            raise self.error(key, "the row needs offset and size, in bytes")
        whole = holder if is_address(holder) else str((folder / local_path(holder)).absolute())
        if not is_address(holder) and not Path(whole, file).is_file():
            raise self.error(key, f"no such file: {Path(whole, file)}")
        if key == "litdata":
            try:
                require_litdata()
            except ValueError as error:
                raise self.error(key, str(error)) from error
        return whole

    def _wording(self, key: str, wording: Any) -> tuple[str, float]:
        weighted = isinstance(wording, dict) and set(wording) <= {"text", "weight"}
        text = wording.get("text") if weighted else wording
        weight = wording.get("weight") if weighted else None
        if not isinstance(text, str) or not text.strip():
            raise self.error(key, f"{wording!r} is not a caption")
        if NO_TEXT.search(text):
            raise self.error(key, "holds what is no text: is the file in UTF-8?")
        weight = 1.0 if weight is None else weight
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise self.error(key, f"weight = {weight!r}: must be a number")
        if not 0 <= weight < math.inf:
            raise self.error(key, f"weight = {weight}: must be finite and at least 0")
        return text, float(weight)

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
