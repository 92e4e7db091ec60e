"""``sora-lightning check``: what becomes of every clip, and what a step costs, before anything
trains.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from sora_lightning.cli.explain import build
from sora_lightning.cli.sources import merge, read_yaml
from sora_lightning.data import read_manifest
from sora_lightning.data.decoding.readers import read_timeline
from sora_lightning.data.decoding.subprocess_decoding import subprocess_map
from sora_lightning.data.manifest.filters import Filter, sift
from sora_lightning.data.manifest.records import ClipRecord
from sora_lightning.data.manifest.roots import HOLDERS
from sora_lightning.files import find_config

if TYPE_CHECKING:
    from sora_lightning.cli.training_cost import Training
    from sora_lightning.data import VideoDataModule


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
    paths = [find_config(path) for path in (config, delta) if path]
    values: dict[str, Any] = {}
    for path in paths:
        values = merge(values, read_yaml(path))
    training, problem = None, None
    if "model" in values:
        try:
            training = _training(paths, values, manifest)
        except ValueError as error:
            problem = error
    try:
        data = _data_of(values, paths[0], manifest, filters)
    except ValueError as error:
        raise problem or error from None
    for path, assignment in data.check().items():
        total = assignment.num_clips + assignment.num_removed
        print(f"{path}: {assignment.num_clips} of {total} clips take part\n{assignment}")
    if problem is not None:
        raise problem
    if training is not None:
        print(_cost(training, data))


def _data_of(
    values: dict[str, Any], config: Path, manifest: Path | None, filters: list[str] | None
) -> VideoDataModule:
    data = values.get("data")
    if not isinstance(data, dict):
        raise ValueError(f"{config}: has no key data: check needs the YAML of a training")
    if manifest is not None:
        data |= {"manifest": str(manifest), "val_manifest": None}
    if filters is not None:
        data["filters"] = filters
    from sora_lightning.data import VideoDataModule  # imports Lightning, which takes seconds

    return build(VideoDataModule, data, "data")


def _training(configs: list[Path], values: dict[str, Any], manifest: Path | None) -> Training:
    """Build what ``fit`` would train. Raises its ``ValueError`` with a line for each problem."""
    from sora_lightning.cli.training_cost import build_training

    given = [part for path in configs for part in ("--config", str(path))]
    if manifest is not None:
        given += ["--data.manifest", str(manifest), "--data.val_manifest", str(manifest)]
    with TemporaryDirectory() as run_dir:  # the training's own may hold one already
        return build_training([*given, "--run_dir", run_dir])


def _cost(training: Training, data: VideoDataModule) -> str:
    """Return a line for each size of a training's steps, or why its cost cannot be counted."""
    from sora_lightning.cli.training_cost import (
        activations_of_clip,
        autocast_dtype,
        device_bytes,
        flops_per_s,
        num_parameters,
        state_bytes,
        step_costs,
    )

    try:
        costs = step_costs(training)
        speed = flops_per_s(training, costs)
    except ValueError as error:
        return f"what a step costs is not known: {error}"
    # How many steps of each size an epoch has; packs are counted as if of one size.
    clips = data.check()[data.manifest].clips
    shares = [len(clips.get(cost.size, ())) / cost.num_clips for cost in costs]
    shares = shares if sum(shares) else [1.0] * len(costs)
    device, system = training.trainer.strategy.root_device, training.system
    dtype = autocast_dtype(training.trainer)
    head = (
        f"a step, forward and backward, on {device.type} ({num_parameters(training):,} parameters)"
    )
    lines, largest = [head], 0.0
    for (size, num_clips, flops), share in zip(costs, shares, strict=True):
        if share:
            step = f"{num_clips:6d} clips of {size}:"
            memory = num_clips * activations_of_clip(system, size, dtype)
            largest = max(largest, memory)
            lines.append(f"{step} {flops:.3g} FLOPs, {flops / speed:.2f} s, {memory / 1e9:.2f} GB")
    states, there = state_bytes(system), device_bytes(device)
    needed = f"{(states + largest) / 1e9:.2f} GB with weights, gradients and optimizer"
    lines.append(f"{'':6s} {needed}; the device has {there / 1e9:.1f} GB")
    if states + largest > there:
        lines[-1] += ": too little. Make batches smaller, or recompute (activation_checkpointing)"
    if training.max_steps > 0:
        mean = sum(n * cost.flops for n, cost in zip(shares, costs, strict=True)) / sum(shares)
        minutes = training.max_steps * mean / speed / 60
        lines.append(f"{training.max_steps:6d} steps: {minutes:,.0f} minutes, without validation")
    return "\n".join(lines)


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
