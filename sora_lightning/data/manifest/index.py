"""Fills in the technical columns of a manifest: ``sora-lightning index``."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from sora_lightning.checks import require_at_least
from sora_lightning.data.decoding.encode import reencode
from sora_lightning.data.decoding.errors import DecodeError
from sora_lightning.data.decoding.readers import PyAVReader
from sora_lightning.data.decoding.subprocess_decoding import subprocess_map
from sora_lightning.data.decoding.timeline import read_timeline
from sora_lightning.data.manifest.append_only_log import AppendOnlyLog
from sora_lightning.data.manifest.curation import (
    duplicates,
    look_through,
    pyscenedetect_cuts,
    require_pyscenedetect,
    scene_cuts,
    score,
)
from sora_lightning.data.manifest.records import ManifestRow
from sora_lightning.data.manifest.roots import HOLDERS
from sora_lightning.data.manifest.tables import (
    Row,
    check_target,
    has_source,
    read_rows,
    with_moved_source,
    write_lines,
    write_rows,
)
from sora_lightning.files import file_sha256


@dataclass(frozen=True)
class Work:
    """The work on each file, besides probing it: find scenes by a detector (``None``: the whole
    file is one) and leave out those shorter than ``min_scene_s``; give scores; write copies with
    closed GOPs into a folder, of at most ``short_side`` pixels.
    """

    detector: Literal["own", "pyscenedetect"] | None
    min_scene_s: float
    scores: bool
    copies: Path | None
    short_side: int | None


def index(
    source: Path,
    output: Path,
    scores: bool = False,
    scenes: bool = False,
    detector: Literal["own", "pyscenedetect"] = "own",
    min_scene_s: float = 1.0,
    reencode_to: Path | None = None,
    short_side: int | None = None,
    num_workers: int = 4,
    timeout_s: float = 600.0,
    root: str | None = None,
) -> None:
    """Probe every file of a manifest and write the manifest with all technical columns.

    A second run, after an interruption or after rows were added, probes new and changed files only.

    Args:
        source: A manifest (JSONL, CSV, Parquet), or a folder of videos and images with captions
            beside them as text files.
        output: The manifest to write; its suffix names the format. Files that cannot be read are
            named with the reason in ``<output>.rejects.jsonl`` beside it.
        scores: Decode every file once and write motion, black, static, look and duplicate_of.
        scenes: Find the scene cuts, and write a row for each scene.
        detector: Finds the cuts.
        min_scene_s: A shorter scene is left out.
        reencode_to: A folder for copies of the clips as h264 with closed GOPs of 30 frames, which
            every decoder reads fast and correctly; the rows then name the copies.
        short_side: Scale larger copies down until their shorter side has so many pixels.
        num_workers: Processes that probe.
        timeout_s: Seconds that one file may take.
        root: A folder, besides the manifest's own, under which the files may lie that it names.
    """
    source, output = Path(source), Path(output)
    require_at_least(1, num_workers=num_workers)
    if short_side is not None and (reencode_to is None or short_side < 1):
        raise ValueError(f"short_side = {short_side}: the pixels of the copies of reencode_to")
    check_target(output)
    if scenes and detector == "pyscenedetect":
        require_pyscenedetect()
    copies = None if reencode_to is None else reencode_to.absolute()
    work = Work(detector if scenes else None, min_scene_s, scores, copies, short_side)
    folder = source if source.is_dir() else source.parent
    num_jobs = 0
    for place, row in read_rows(source, root):
        _check_row(row, place, folder, work)
        num_jobs += 1
    jobs = (
        _Job.of(with_moved_source(row, folder, output.parent), place, folder, work)
        for place, row in read_rows(source, root)
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    log = AppendOnlyLog(output.with_name(f".{output.name}.log"))
    missing, asked = itertools.tee(job for job in jobs if not log.recall(job.key))
    found = subprocess_map(_rows_of, asked, num_workers, timeout_s)
    with tqdm(total=num_jobs, desc="indexing", unit="file", disable=None) as bar:
        for result, job in zip(found, missing, strict=True):
            outcome = result if isinstance(result, list) else _reason(job, result)
            bar.update(log.add(job.key, job.row["path"], outcome) - bar.n)
    if log.num_recalled:
        print(f"{log.num_recalled} of {num_jobs} rows were already in {log.path}")
    results = _Results(log, output.parent)
    write_lines(output.with_name(f"{output.name}.rejects.jsonl"), results.rejects())
    if not any(results):
        why = next((f": {reject['reason']}" for reject in results.rejects()), "")
        raise ValueError(f"{source}: not one of its {num_jobs} files can be read{why}")
    if scores:
        results.mark_duplicates()
    write_rows(output, results)
    print(_summary(output, results))


@dataclass(frozen=True)
class _Job:
    """One row of the source, and the absolute path of its file.

    ``key`` changes with the row, with the file's size or time, and with the requested work.
    """

    row: Row
    path: Path
    work: Work
    key: str

    @classmethod
    def of(cls, row: Row, place: str, folder: Path, work: Work) -> _Job:
        path = (folder / ManifestRow(place, row).path()).absolute()
        state = path.stat() if path.is_file() else None
        stamp = [state.st_size, state.st_mtime_ns] if state else []
        identity = json.dumps([row, str(path), stamp, asdict(work)], sort_keys=True, default=str)
        return cls(row, path, work, hashlib.sha256(identity.encode()).hexdigest()[:32])


def _check_row(row: Row, place: str, folder: Path, work: Work) -> None:
    """Raise ``ValueError`` for a row that there cannot be a job for."""
    for holder in HOLDERS.keys() & row:
        raise ValueError(
            f"{place}: {holder} = {row[holder]!r}: only files of their own can be indexed"
        )
    if work.copies is not None and has_source(row, folder):
        raise ValueError(
            f"{place}: source = {row['source']!r}: the copies of reencode_to begin at another "
            "time than their sources: leave one of them out"
        )
    ManifestRow(place, row).path()


def _reason(job: _Job, error: DecodeError) -> str:
    return str(error).removeprefix(f"{job.path}: ")


def _rows_of(job: _Job) -> list[Row]:
    """Return the rows of a file, with absolute paths. Raises ``DecodeError``."""
    facts = _facts(job.path)
    start_s, end_s = float(job.row.get("start_s") or 0), float(job.row.get("end_s") or math.inf)
    windows = [(start_s, end_s)]
    thumbnails = None
    if job.work.scores or job.work.detector == "own":
        thumbnails = look_through(job.path)
    if job.work.detector is not None:
        cuts = scene_cuts(thumbnails) if thumbnails and job.work.detector == "own" else None
        cuts = pyscenedetect_cuts(job.path) if cuts is None else cuts
        edges = [start_s, *(cut for cut in cuts if start_s < cut < end_s), end_s]
        lasts = [*edges[1:-1], min(end_s, facts["num_frames"] / facts["fps"])]
        windows = [
            (first, edge)
            for first, edge, last in zip(edges, edges[1:], lasts, strict=False)
            if last - first >= job.work.min_scene_s
        ]
    rows = []
    for first, last in windows:
        row = {**job.row, "path": str(job.path), **facts, "start_s": first, "end_s": last}
        if thumbnails is not None and job.work.scores:
            row |= asdict(score(thumbnails, first, last))
        if job.work.copies is not None:
            target = job.work.copies / f"{job.path.stem}-{job.key[:8]}-{round(first * 1000)}.mp4"
            reencode(job.path, target, first, last, job.work.short_side)
            row |= {"path": str(target), **_facts(target), "start_s": 0.0, "end_s": math.inf}
        if row["start_s"] == 0:
            del row["start_s"]
        if row["end_s"] == math.inf:
            del row["end_s"]
        rows.append(row)
    return rows


def _facts(path: Path) -> Row:
    """Return the technical columns: times from the packets, a frame's size, and the file's hash."""
    timeline = read_timeline(path)
    height, width = PyAVReader().read(path, timeline, [0]).shape[1:3]
    state = path.stat()
    objection = timeline.decord_objection
    return {
        "fps": round(len(timeline) / timeline.end_s, 6),
        "num_frames": len(timeline),
        "height": height,
        "width": width,
        "decoder": "decord" if objection is None else "pyav",
        "decoder_reason": objection or "",
        "content": file_sha256(path),
        "num_bytes": state.st_size,
        "modified_ns": state.st_mtime_ns,
    }


class _Results:
    """The rows of all files in order, with paths as the source gave them, and those of the rejects;
    read from the log on every access.
    """

    def __init__(self, log: AppendOnlyLog, folder: Path) -> None:
        self.log = log
        self.folder = folder.absolute()
        self._first_of: Int[np.ndarray, " n"] | None = None

    def __iter__(self) -> Iterator[Row]:
        if self._first_of is None:
            yield from self._rows()
            return
        repeated = set(self._first_of.tolist())
        paths = {-1: ""}
        for number, (row, first) in enumerate(zip(self._rows(), self._first_of, strict=True)):
            if number in repeated:
                paths[number] = row["path"]
            yield {**row, "duplicate_of": paths[int(first)]}

    def _rows(self) -> Iterator[Row]:
        for given, result in self.log:
            absolute = Path(given).is_absolute()
            for row in result if isinstance(result, list) else ():
                path = row["path"] if absolute else os.path.relpath(row["path"], self.folder)
                yield {**row, "path": path}

    def rejects(self) -> Iterator[Row]:
        for given, result in self.log:
            if isinstance(result, str):
                yield {"path": given, "reason": result}

    def mark_duplicates(self) -> None:
        self._first_of = duplicates(
            (f"{row['content']} {row.get('start_s')} {row.get('end_s')}", row["look"])
            for row in self._rows()
        )


def _summary(output: Path, results: _Results) -> str:
    reasons = Counter(row["decoder_reason"] for row in results)
    lines = [f"{output}: {reasons.total()} clips"]
    for reason, count in reasons.most_common():
        lines.append(f"{count:6d} by {'pyav: ' + reason if reason else 'decord'}")
    for reason, count in Counter(row["reason"] for row in results.rejects()).most_common():
        lines.append(f"{count:6d} rejected: {reason}")
    return "\n".join(lines)
