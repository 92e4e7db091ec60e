"""``sora-lightning check``: what becomes of every clip, and what a step costs, before anything
trains.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from sora_lightning.data import read_manifest
from sora_lightning.data.decoding.readers import read_timeline
from sora_lightning.data.decoding.subprocess_decoding import subprocess_map
from sora_lightning.data.manifest.filters import Filter, sift
from sora_lightning.data.manifest.records import ClipRecord
from sora_lightning.data.manifest.roots import HOLDERS
from sora_lightning.files import find_config


def check(
    config: Path | None = None,
    delta: Path | None = None,
    manifest: Path | None = None,
    filters: list[str] | None = None,
    root: str | None = None,
) -> None:
    """Print how many clips each rule removes, and why, and what a step of the training costs.
    Nothing is trained or written. What ``fit`` would refuse is listed, and the exit code is then 2.

    Args:
        config: The YAML of a training. Its sizes, frame rate and filters are applied to its
            manifests; FLOPs of its steps are counted, and the seconds of one measured.
        delta: A second YAML, which overrides keys of the first.
        manifest: In place of a configuration's; without one, every row is read, and every file's
            packets.
        filters: In place of a configuration's, such as ``["motion > 0.2"]``.
        root: A folder or address, besides the manifest's own folder, under which the files may lie
            that it names. A configuration has ``data.reading.root``.
    """
    if config is None:
        if manifest is None:
            raise ValueError("--config or --manifest is missing: check needs one of them")
        print(_report(Path(manifest), [Filter.parse(text) for text in filters or ()], root))
        return
    from sora_lightning.cli.check_training import check_training  # imports Lightning: seconds

    paths = [find_config(path) for path in (config, delta) if path]
    check_training(paths, manifest, filters)


def _report(manifest: Path, filters: list[Filter], root: str | None) -> str:
    """Return the numbers of rows by filter, and by how their files are read."""
    records = read_manifest(manifest, root=root)
    kept, removed = sift(records, filters)
    in_files = [record for record in kept if not HOLDERS.keys() & record.columns]
    paths = list(dict.fromkeys(record.path for record in in_files))
    read = subprocess_map(read_timeline, paths, num_workers=4, timeout_s=60.0)
    timelines = dict(zip(paths, read, strict=True))

    def verdict(record: ClipRecord) -> str:
        if HOLDERS.keys() & record.columns:
            return "in shards, which are not opened"
        timeline = timelines[record.path]
        if isinstance(timeline, Exception):
            return f"cannot be read: {str(timeline).removeprefix(f'{record.path}: ')}"
        objection = record.decord_objection or timeline.decord_objection
        return "read by decord" if objection is None else f"read by pyav: {objection}"

    verdicts = Counter(map(verdict, kept))
    lines = [f"{manifest}: {len(records)} clips in {len(paths)} files"]
    lines += [f"{count:6d} {verdict}" for verdict, count in verdicts.most_common()]
    counts = Counter(rule.value for _, rule in removed)
    lines += [f"{count:6d} left out: {reason}" for reason, count in counts.most_common()]
    return "\n".join(lines)
