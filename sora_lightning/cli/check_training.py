"""What ``check`` prints of a training. Apart from the command, whose help does not wait for
Lightning.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sora_lightning.cli.explain import build
from sora_lightning.cli.sources import merge, read_yaml
from sora_lightning.cli.training_cost import (
    Training,
    activations_of_clip,
    autocast_dtype,
    build_training,
    device_bytes,
    flops_per_s,
    num_parameters,
    state_bytes,
    step_costs,
)
from sora_lightning.data import VideoDataModule


def check_training(
    paths: list[Path], manifest: Path | None = None, filters: list[str] | None = None
) -> None:
    """Print what becomes of the clips of a training, and what its steps cost.

    ``paths`` are its YAML and one that varies it. Raises ``ValueError`` for what ``fit`` would
    refuse, after the clips are printed where they can be read.
    """
    values: dict[str, Any] = {}
    for path in paths:
        values = merge(values, read_yaml(path))
    training, problem = None, None
    if "model" in values:
        try:
            training = _built(paths, values, manifest)
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
    return build(VideoDataModule, data, "data")


def _built(configs: list[Path], values: dict[str, Any], manifest: Path | None) -> Training:
    """Build what ``fit`` would train. Raises its ``ValueError`` with a line for each problem."""
    given = [part for path in configs for part in ("--config", str(path))]
    if manifest is not None:
        given += ["--data.manifest", str(manifest), "--data.val_manifest", str(manifest)]
    with TemporaryDirectory() as run_dir:  # the training's own may hold one already
        return build_training([*given, "--run_dir", run_dir])


def _cost(training: Training, data: VideoDataModule) -> str:
    """Return a line for each size of a training's steps, or why its cost cannot be counted."""
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
