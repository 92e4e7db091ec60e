"""A copy of a manifest with a captioner's captions, which is gone on with after an interruption."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from sora_lightning.data.manifest.records import NO_TEXT, ManifestRow, clip_id, read_texts
from sora_lightning.data.manifest.tables import Row, check_target, write_rows
from sora_lightning.files import check_writable


class Written(NamedTuple):
    """Captions of a clip, the fingerprint of the captioner that wrote them, and the settings they
    were written with.
    """

    captions: list[str]
    model: str
    decoding: str


class CaptionedManifest:
    """Adds ``column``, ``column_model`` and ``column_decoding`` in a copy of a manifest.

    ``in`` tells whether a clip has its captions, by clip_id. They are kept as they come, in a file
    of each rank beside the copy; ``write`` makes the copy of them and removes these files. A cell
    holds one caption, or a list of several.

    Args:
        manifest: The manifest to copy. It stays as it is.
        output: The copy, in the manifest's folder, since paths in it are relative.
        column: Begins with ``caption_``.

    Raises ``ValueError`` where a caption or another cell by people would be overwritten.
    """

    def __init__(self, manifest: Path, output: Path, column: str = "caption_synthetic") -> None:
        self.manifest, self.output, self.column = Path(manifest), Path(output), column
        folder = self.manifest if self.manifest.is_dir() else self.manifest.parent
        if self.output.resolve() == self.manifest.resolve():
            raise ValueError(f"captions.output = {output}: is the manifest itself; it is copied")
        if self.output.parent.resolve() != folder.resolve():
            raise ValueError(
                f"captions.output = {output}: must lie in {folder}, to which the manifest's paths "
                "are relative"
            )
        if not column.startswith("caption_"):
            raise ValueError(f"captions.column = {column!r}: must begin with 'caption_'")
        check_target(self.output)
        check_writable(folder)
        self.columns = (column, f"{column}_model", f"{column}_decoding")
        self._written: dict[str, Written] = {}
        rows: dict[str, Row] = {}
        for row in read_texts(self.manifest):
            rows[self._recall(row)] = self._others(row.columns)
        if self.output.exists():
            self._recall_output(rows)
        self._recall_parts()

    def __contains__(self, clip: object) -> bool:
        return clip in self._written

    def require(self, model: str, decoding: str) -> None:
        """Raise ``ValueError`` if a caption is another captioner's, or decoded in another way."""
        for one in self._written.values():
            if (one.model, one.decoding) != (model, decoding):
                raise ValueError(
                    f"{self.column} of {self.manifest} or {self.output} was written by captioner "
                    f"{one.model[:12]} with {one.decoding}, and this is {model[:12]} with "
                    f"{decoding}: choose another captions.column or captions.output"
                )

    def add(self, rank: int, captions: dict[str, Written]) -> None:
        """Keep captions by clip_id; those of clips that have one are passed over. What no manifest
        may hold becomes U+FFFD.
        """
        new = {
            clip: one._replace(captions=[NO_TEXT.sub("\ufffd", text) for text in one.captions])
            for clip, one in captions.items()
            if clip not in self
        }
        self._written |= new
        lines = [json.dumps([clip, *one], ensure_ascii=False) for clip, one in new.items()]
        # The line before may have been cut by an interruption.
        with self._part(str(rank)).open("a", encoding="utf-8") as file:
            file.write("\n" + "\n".join(lines) + "\n")

    def write(self) -> str:
        """Write the copy with the captions of all ranks, and return a summary."""
        self._recall_parts()
        rows = list(self._rows())
        write_rows(self.output, rows)
        for part in self._parts():
            part.unlink()
        num_captioned = sum(self.column in row for row in rows)
        return f"{self.output}: {num_captioned} of {len(rows)} clips have a {self.column}"

    def _rows(self) -> Iterator[Row]:
        for row in read_texts(self.manifest):
            written = self._written.get(clip_id(row.columns))
            # An empty caption would make a manifest that is refused.
            captions = [text for text in written.captions if text] if written else []
            if not written or not captions:
                yield self._others(row.columns)
                continue
            one_or_all = captions if len(captions) > 1 else captions[0]
            cells = zip(self.columns, (one_or_all, *written[1:]), strict=True)
            yield self._others(row.columns) | dict(cells)

    def _others(self, row: Row) -> Row:
        return {name: cell for name, cell in row.items() if name not in self.columns}

    def _recall(self, row: ManifestRow) -> str:
        row.path()
        clip = clip_id(row.columns)
        captions, *others = [row.columns.get(name) for name in self.columns]
        if captions is not None and all(isinstance(cell, str) for cell in others):
            self._written[clip] = Written(list(row.wordings(self.column)[0]), *map(str, others))
        elif any(cell is not None for cell in (captions, *others)):
            missing = next(name for name in self.columns if row.columns.get(name) is None)
            raise row.error(
                self.column,
                f"no {missing} says that a captioner wrote it; choose another captions.column",
            )
        return clip

    def _recall_output(self, rows: dict[str, Row]) -> None:
        for row in read_texts(self.output):
            clip = self._recall(row)
            if rows.get(clip) != self._others(row.columns):
                raise ValueError(
                    f"{row.place}: differs from {self.manifest} in more than the captions, and "
                    "would be overwritten; choose another captions.output"
                )

    def _recall_parts(self) -> None:
        for part in self._parts():
            for line in part.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(json.JSONDecodeError, TypeError):  # cut by an interruption
                    clip, *cells = json.loads(line)
                    self._written[clip] = Written(*cells)

    def _part(self, rank: str) -> Path:
        return self.output.with_name(f".{self.output.name}.captions-{rank}")

    def _parts(self) -> Sequence[Path]:
        name = self._part("").name
        names = sorted(one for one in os.listdir(self.output.parent) if one.startswith(name))
        return [self.output.with_name(one) for one in names]
