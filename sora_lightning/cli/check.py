"""``sora-lightning check``: what becomes of every clip, before anything trains."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from sora_lightning.cli.explain import build
from sora_lightning.cli.sources import merge, read_yaml
from sora_lightning.data import read_manifest
from sora_lightning.data.decoding.readers import read_timeline
from sora_lightning.data.decoding.subprocess_decoding import subprocess_map
from sora_lightning.data.manifest.filters import Filter, sift
from sora_lightning.data.manifest.records import ClipRecord
from sora_lightning.files import find_config

if TYPE_CHECKING:
    from sora_lightning.data import VideoDataModule


def check(
    config: Path | None = None,
    delta: Path | None = None,
    manifest: Path | None = None,
    filters: list[str] | None = None,
) -> None:
    """Print how many clips each rule removes, and why; nothing is trained or written.

    Args:
        config: The YAML of a training. Its sizes, frame rate and filters are applied to its
            manifests.
        delta: A second YAML, which overrides keys of the first.
        manifest: In place of a configuration's; without one, every row is read, and every file's
            packets.
        filters: In place of a configuration's, such as ``["motion > 0.2"]``.
    """
    if config is None:
        if manifest is None:
            raise ValueError("--config or --manifest is missing: check needs one of them")
        print(_report(Path(manifest), [Filter.parse(text) for text in filters or ()]))
        return
    data = _data_of([path for path in (config, delta) if path], manifest, filters)
    for path, assignment in data.check().items():
        total = assignment.num_clips + assignment.num_removed
        print(f"{path}: {assignment.num_clips} of {total} clips take part\n{assignment}")


def _data_of(
    paths: list[Path], manifest: Path | None, filters: list[str] | None
) -> VideoDataModule:
    values: dict = {}
    for path in paths:
        values = merge(values, read_yaml(find_config(path)))
    data = values.get("data")
    if not isinstance(data, dict):
        raise ValueError(f"{paths[0]}: has no key data: check needs the YAML of a training")
    if manifest is not None:
        data |= {"manifest": str(manifest), "val_manifest": None}
    if filters is not None:
        data["filters"] = filters
    from sora_lightning.data import VideoDataModule  # imports Lightning, which takes seconds

    return build(VideoDataModule, data, "data")


def _report(manifest: Path, filters: list[Filter]) -> str:
    """Return the numbers of rows by filter, and by how their files are read."""
    records = read_manifest(manifest)
    kept, removed = sift(records, filters)
    paths = list(dict.fromkeys(record.path for record in kept))
    timelines = dict(zip(paths, subprocess_map(read_timeline, paths, 4, 60.0), strict=True))

    def verdict(record: ClipRecord) -> str:
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
