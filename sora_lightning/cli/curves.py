"""Plots the losses of every run below a folder as one image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sora_lightning.files import check_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TAGS = {"train/loss": "training", "val/loss": "validation"}
_COLOURS = {"train/loss": "#4878cf", "val/loss": "#d1495b"}
_PANEL_INCHES = (5.6, 3.6)


class Curve(NamedTuple):
    """A scalar over optimizer steps."""

    steps: np.ndarray
    values: np.ndarray


def curves(folder: Path, output: Path, overlay: bool = False) -> None:
    """Draw the training and validation losses of every run below a folder, a panel a run.

    Training losses are drawn faintly as they were logged, and as a running mean over a twentieth of
    the run. The loss axis is logarithmic.

    Args:
        folder: Where TensorBoard's event files are searched for, at any depth.
        output: The plot, a .png or .svg file.
        overlay: Draw a panel for each of the two losses instead, and in it a line for each run.
    """
    folder, output = Path(folder), Path(output)
    if output.suffix not in (".png", ".svg"):
        raise ValueError(f"output = {output}: must end in .png or .svg")
    check_output(output)
    runs = {run: read_losses(run) for run in sorted(_runs(folder))}
    runs = {run: losses for run, losses in runs.items() if losses}
    if not runs:
        raise ValueError(f"folder = {folder}: no event file below it holds any of {list(_TAGS)}")
    named = {_name(run, folder): losses for run, losses in runs.items()}
    (draw_overlay if overlay else draw_curves)(named).savefig(output)
    print(f"{len(runs)} runs drawn to {output}")


def read_losses(run: Path) -> dict[str, Curve]:
    """Return the losses in a run's event files."""
    scalars = read_scalars(run)
    return {tag: scalars[tag] for tag in _TAGS if tag in scalars}


def read_scalars(run: Path) -> dict[str, Curve]:
    """Return every scalar in a run's event files, sorted by step; of a step that a resumed run
    logged again, the last value.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # Files of one second are not read in the order of their writing, so times decide.
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        written = sorted(events.Scalars(tag), key=lambda event: event.wall_time)
        last = {event.step: event.value for event in written}
        steps = np.array(sorted(last))
        found[tag] = Curve(steps, np.array([last[step] for step in steps]))
    return found


def draw_curves(runs: dict[str, dict[str, Curve]]) -> Figure:
    """Draw a panel for each named run, side by side."""
    figure, panels = _panels(len(runs))
    for axes, (name, losses) in zip(panels, runs.items(), strict=True):
        for tag, curve in losses.items():
            colour, label = _COLOURS[tag], _TAGS[tag]
            if tag == "val/loss":
                axes.plot(*curve, color=colour, label=label, marker="o", markersize=4)
            else:
                axes.plot(*curve, color=colour, alpha=0.25, linewidth=0.8)
                axes.plot(*running_mean(curve, len(curve.steps) // 20), color=colour, label=label)
        _finish(axes, name)
    return figure


def draw_overlay(runs: dict[str, dict[str, Curve]]) -> Figure:
    """Draw a panel for each loss with a line for each named run."""
    figure, panels = _panels(len(_TAGS))
    for axes, (tag, label) in zip(panels, _TAGS.items(), strict=True):
        for name, losses in runs.items():
            if tag in losses:
                curve = losses[tag]
                axes.plot(*running_mean(curve, len(curve.steps) // 20), label=name)
        _finish(axes, label)
    return figure


def _panels(number: int) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width * number, height), layout="constrained", dpi=110)
    return figure, figure.subplots(1, number, squeeze=False)[0]


def _finish(axes: Axes, title: str) -> None:
    axes.set(title=title, xlabel="optimizer steps", ylabel="loss", yscale="log")
    axes.grid(which="both", alpha=0.2)
    if axes.lines:
        axes.legend(frameon=False)


def running_mean(curve: Curve, window: int) -> Curve:
    """Return the mean over ``window`` consecutive values, at the middle of their steps."""
    if window < 2:
        return curve
    kernel = np.full(window, 1 / window)
    return Curve(
        np.convolve(curve.steps, kernel, mode="valid"),
        np.convolve(curve.values, kernel, mode="valid"),
    )


def _runs(folder: Path) -> set[Path]:
    return {file.parent for file in folder.rglob("events.out.tfevents.*")}


def _name(run: Path, folder: Path) -> str:
    return folder.name if run == folder else str(run.relative_to(folder))
