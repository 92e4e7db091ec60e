"""Fills in what a manifest does not say of its files: ``sora-lightning index``."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from sora_lightning.data.curation import (
    duplicates,
    look_through,
    pyscenedetect_cuts,
    require_pyscenedetect,
    scene_cuts,
    score,
)
from sora_lightning.data.decode import DecodeError, PyAVReader, read_timeline
from sora_lightning.data.encode import reencode
from sora_lightning.data.guard import guarded_map
from sora_lightning.data.tables import (
    Row,
    check_target,
    has_source,
    read_rows,
    with_moved_source,
    write_lines,
    write_rows,
)


@dataclass(frozen=True)
class Work:
    """What to do with each file, besides probing it: find scenes by a detector (None: the whole
    file is one) and leave out those shorter than ``min_scene_s``; give scores; write copies with
    closed GOPs into a folder.
    """

    detector: Literal["own", "pyscenedetect"] | None
    min_scene_s: float
    scores: bool
    copies: Path | None


def index(
    source: Path,
    output: Path,
    scores: bool = False,
    scenes: bool = False,
    detector: Literal["own", "pyscenedetect"] = "own",
    min_scene_s: float = 1.0,
    reencode_to: Path | None = None,
    num_workers: int = 4,
    timeout_s: float = 600.0,
) -> None:
    """Probe every file of a manifest and write the manifest with all technical columns.

    Run again after an interruption, or after rows were added, it probes what is new or has changed.

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
            every decoder reads fast and rightly; the rows then name the copies.
        num_workers: Processes that probe.
        timeout_s: Seconds that one file may take.
    """
    source, output = Path(source), Path(output)
    if num_workers < 1:
        raise ValueError(f"num_workers = {num_workers}: must be at least 1")
    check_target(output)
    if scenes and detector == "pyscenedetect":
        require_pyscenedetect()
    copies = None if reencode_to is None else reencode_to.absolute()
    work = Work(detector if scenes else None, min_scene_s, scores, copies)
    folder = source if source.is_dir() else source.parent
    jobs = []
    for place, row in read_rows(source):
        if copies is not None and has_source(row, folder):
            raise ValueError(
                f"{place}: source = {row['source']!r}: the copies of reencode_to begin at another "
                "time than their sources: leave one of them out"
            )
        jobs.append(_Job.of(with_moved_source(row, folder, output.parent), place, folder, work))
    output.parent.mkdir(parents=True, exist_ok=True)
    journal = output.with_name(f".{output.name}.journal")
    results = _recalled(journal)
    missing = [job for job in jobs if job.key not in results]
    if len(missing) < len(jobs):
        print(f"{len(jobs) - len(missing)} of {len(jobs)} rows stand in {journal} from before")
    found = guarded_map(_rows_of, missing, num_workers, timeout_s)
    bar = tqdm(found, "indexing", len(missing), unit="file", disable=None)
    with journal.open("a", encoding="utf-8") as file:
        for job, result in zip(missing, bar, strict=True):
            results[job.key] = result if isinstance(result, list) else _reason(job, result)
            file.write(json.dumps([job.key, results[job.key]], ensure_ascii=False) + "\n")
            file.flush()
    rows, rejects = _gathered(jobs, results, output.parent)
    write_lines(output.with_name(f"{output.name}.rejects.jsonl"), rejects)
    if not rows:
        why = f": {rejects[0]['reason']}" if rejects else ""
        raise ValueError(f"{source}: not one of its {len(jobs)} files can be read{why}")
    if scores:
        _mark_duplicates(rows)
    write_rows(output, rows)
    print(_summary(output, rows, rejects))


@dataclass(frozen=True)
class _Job:
    """One row of the source, and the absolute path of its file.

    ``key`` changes with the row, with the file's size or time, and with the work asked for.
    """

    row: Row
    path: Path
    work: Work
    key: str

    @classmethod
    def of(cls, row: Row, place: str, folder: Path, work: Work) -> _Job:
        if not isinstance(row.get("path"), str) or not row["path"]:
            raise ValueError(f"{place}: path: must name a video file")
        path = (folder / row["path"]).absolute()
        state = path.stat() if path.is_file() else None
        stamp = [state.st_size, state.st_mtime_ns] if state else []
        identity = json.dumps([row, str(path), stamp, asdict(work)], sort_keys=True, default=str)
        return cls(row, path, work, hashlib.sha256(identity.encode()).hexdigest()[:32])


def _recalled(journal: Path) -> dict[str, list[Row] | str]:
    """What earlier calls found, by key; a line that an interruption cut is passed over."""
    results: dict[str, list[Row] | str] = {}
    if journal.is_file():
        for line in journal.read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):
                key, result = json.loads(line)
                results[key] = result
    return results


def _reason(job: _Job, error: DecodeError) -> str:
    return str(error).removeprefix(f"{job.path}: ")


def _rows_of(job: _Job) -> list[Row]:
    """The rows that a file gives, with absolute paths. Raises ``DecodeError``."""
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
            reencode(job.path, target, first, last)
            row |= {"path": str(target), **_facts(target), "start_s": 0.0, "end_s": math.inf}
        if row["start_s"] == 0:
            del row["start_s"]
        if row["end_s"] == math.inf:
            del row["end_s"]
        rows.append(row)
    return rows


def _facts(path: Path) -> Row:
    """The technical columns: what the packets say, one frame's size, and the whole file's hash."""
    timeline = read_timeline(path)
    height, width = PyAVReader().read(path, timeline, [0]).shape[1:3]
    state = path.stat()
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    objection = timeline.decord_objection
    return {
        "fps": round(len(timeline) / timeline.end_s, 6),
        "num_frames": len(timeline),
        "height": height,
        "width": width,
        "decoder": "decord" if objection is None else "pyav",
        "decoder_reason": objection or "",
        "content": content,
        "num_bytes": state.st_size,
        "modified_ns": state.st_mtime_ns,
    }


def _gathered(
    jobs: Sequence[_Job], results: Mapping[str, list[Row] | str], folder: Path
) -> tuple[list[Row], list[Row]]:
    """The rows of all files, with paths as the source gave them, and those of the rejects."""
    rows, rejects = [], []
    for job in jobs:
        result = results[job.key]
        if isinstance(result, str):
            rejects.append({"path": job.row["path"], "reason": result})
            continue
        for row in result:
            given_relative = not Path(job.row["path"]).is_absolute()
            path = (
                os.path.relpath(row["path"], folder.absolute()) if given_relative else row["path"]
            )
            rows.append({**row, "path": path})
    return rows, rejects


def _mark_duplicates(rows: Sequence[Row]) -> None:
    windows = [f"{row['content']} {row.get('start_s')} {row.get('end_s')}" for row in rows]
    for row, first in zip(rows, duplicates(windows, [row["look"] for row in rows]), strict=True):
        row["duplicate_of"] = "" if first is None else rows[first]["path"]


def _summary(output: Path, rows: Sequence[Row], rejects: Sequence[Row]) -> str:
    lines = [f"{output}: {len(rows)} clips"]
    for reason, count in Counter(row["decoder_reason"] for row in rows).most_common():
        lines.append(f"{count:6d} by {'pyav: ' + reason if reason else 'decord'}")
    for reason, count in Counter(row["reason"] for row in rejects).most_common():
        lines.append(f"{count:6d} rejected: {reason}")
    return "\n".join(lines)
