"""TensorBoard pages of an ablation: a run for each arm with mean and interval over seeds, charts
with margins, and a table of hyperparameters and final scores.

The folder is ``<output>/tensorboard``. TensorBoard counts steps in whole numbers: curves over FLOPs
count GFLOPs, those over time seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from sora_lightning.ablations.plan import PlannedArm
from sora_lightning.ablations.results import RunResult
from sora_lightning.ablations.runs import Run
from sora_lightning.ablations.spec import Ablation
from sora_lightning.ablations.statistics import t_interval

_SHOWN = ("train/", "val/", "scores/", "data/")  # tags that are averaged over seeds
_PARTS = ("mean", "low", "high")


def write_hyperparameters(ablation: Ablation, arms: Sequence[PlannedArm]) -> None:
    """Name the hyperparameters of all arms and all scores, before the first run begins:
    TensorBoard's table never shows what the first run lacks.
    """
    folder = ablation.output / "tensorboard"
    _remove_events(folder)
    union: dict[str, Any] = {}
    for arm in arms:
        union |= _hyperparameters(arm, ablation.seeds[0], arms)
    experiment, _, _ = hparams(union, dict.fromkeys(ablation.scores, 0.0))
    with SummaryWriter(str(folder)) as writer:
        writer.file_writer.add_summary(experiment)


def write_tensorboard(
    ablation: Ablation, arms: Sequence[PlannedArm], runs: Sequence[Run], results: list[RunResult]
) -> None:
    """Write the aggregate of whatever runs there are. Earlier aggregates are replaced."""
    write_hyperparameters(ablation, arms)
    folders = {(run.arm, run.seed): run.folder for run in runs}
    for arm in arms:
        own = [one for one in results if one.arm == arm.name]
        folder = ablation.output / "tensorboard" / arm.name
        _remove_events(folder)
        if not own:
            continue
        with SummaryWriter(str(folder)) as writer:
            tags = sorted({tag for one in own for tag in one.curves if tag.startswith(_SHOWN)})
            for tag in tags:
                _write_curve(writer, tag, arm, own)
            writer.add_custom_scalars(_layout(tags))
            for image in _samples(folders[own[0].arm, own[0].seed] / "training"):
                writer.file_writer.add_summary(image)
        for one in own:
            _write_session(ablation, arm, one, arms, folder / f"seed-{one.seed}")


def _write_curve(
    writer: SummaryWriter, tag: str, arm: PlannedArm, results: Sequence[RunResult]
) -> None:
    """Write mean, low and high at the steps that all seeds have, over steps, FLOPs and seconds."""
    curves = [one.curves[tag] for one in results if tag in one.curves]
    steps = sorted(set.intersection(*(set(curve.steps.tolist()) for curve in curves)))
    step_s = [one.step_s for one in results if one.step_s is not None]
    scales = {"": 1.0, "over_gflops/": arm.cost.flops / 1e9}
    if step_s:
        scales["over_seconds/"] = float(np.mean(step_s))
    for step in steps:
        values = [float(curve.values[curve.steps == step][0]) for curve in curves]
        interval = t_interval(values)
        bounds = (interval.low, interval.high) if len(values) > 1 else (interval.mean,) * 2
        for prefix, scale in scales.items():
            for part, value in zip(_PARTS, (interval.mean, *bounds), strict=True):
                writer.add_scalar(f"{prefix}{tag}/{part}", value, round(step * scale))


def _layout(tags: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """Return the custom scalars: a chart with margins for each tag over each axis."""
    prefixes = {"over steps": "", "over GFLOPs": "over_gflops/", "over seconds": "over_seconds/"}
    return {
        title: {tag: ["Margin", [f"{prefix}{tag}/{part}" for part in _PARTS]] for tag in tags}
        for title, prefix in prefixes.items()
    }


def _write_session(
    ablation: Ablation, arm: PlannedArm, result: RunResult, arms: Sequence[PlannedArm], folder: Path
) -> None:
    """Write a row of the table of hyperparameters: a run's values and its final scores."""
    _remove_events(folder)
    scores = {name: score.mean for name, score in result.scores.items() if name in ablation.scores}
    _, start, end = hparams(_hyperparameters(arm, result.seed, arms), scores)
    with SummaryWriter(str(folder)) as writer:
        writer.file_writer.add_summary(start)
        writer.file_writer.add_summary(end)
        for name, value in scores.items():
            writer.add_scalar(name, value, arm.max_steps)


def _hyperparameters(arm: PlannedArm, seed: int, arms: Sequence[PlannedArm]) -> dict[str, Any]:
    """Return the keys that any arm sets, ``base`` where this one does not."""
    keys = {argument[2:].partition("=")[0] for one in arms for argument in one.arguments}
    given = dict(argument[2:].split("=", 1) for argument in arm.arguments)
    configs = " ".join(path.name for path in arm.configs)
    return {
        "arm": arm.name,
        "seed": seed,
        "configs": configs,
        **{key: given.get(key, "base") for key in sorted(keys)},
    }


def _samples(run: Path) -> Iterator[Any]:
    """Yield the last sample of each prompt: equal tags of several arms stand side by side."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.compat.proto.summary_pb2 import Summary

    if not run.is_dir():
        return
    events = EventAccumulator(str(run), size_guidance={"images": 0})
    events.Reload()
    for tag in (one for one in events.Tags()["images"] if one.startswith("samples/")):
        last = max(events.Images(tag), key=lambda event: event.step)
        image = Summary.Image(
            height=last.height, width=last.width, encoded_image_string=last.encoded_image_string
        )
        yield Summary(value=[Summary.Value(tag=tag, image=image)])


def _remove_events(folder: Path) -> None:
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
