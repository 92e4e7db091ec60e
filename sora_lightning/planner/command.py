"""``sora-lightning plan``: what a model costs, before anything is spent."""

from __future__ import annotations

import json as json_format
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sora_lightning.cli.sources import merge, read_yaml
from sora_lightning.data.batching.buckets import num_pixels
from sora_lightning.files import check_output, find_config
from sora_lightning.planner.devices import device_named
from sora_lightning.planner.plan import (
    PlanSettings,
    Row,
    make_rows,
    model_of,
    settings_of,
    verdict,
)
from sora_lightning.types import VideoSize


def plan(
    config: Path,
    delta: Path | None = None,
    json: Path | None = None,
    plot: Path | None = None,
    calibrate: bool = False,
) -> None:
    """Print tokens, FLOPs, memory, GPU-hours and price of a diffusion model; nothing is trained.

    Args:
        config: The YAML of a training, whose ``model`` is counted on the meta device. Its key
            ``plan`` gives sizes, device, parallelism and workload.
        delta: A second YAML, which overrides keys of the first.
        json: Where everything that was counted and estimated is written.
        plot: Sampling FLOPs against tokens, a .png or .svg file.
        calibrate: In place of the plan, measure a few steps on this machine, and print how far
            predictions from clips of half the height and width are off.
    """
    config = find_config(Path(config))
    values = read_yaml(config)
    if delta is not None:
        values = merge(values, read_yaml(find_config(Path(delta))))
    for output in filter(None, (json, plot)):
        check_output(Path(output))
    settings = settings_of(values)
    if calibrate:
        print(calibration(values, settings, config))
        return
    rows = make_rows(values, settings, config)
    print(table(rows, settings))
    print("\n".join(verdicts(rows, settings)))
    if json is not None:
        Path(json).write_text(json_format.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if plot is not None:
        draw(rows, Path(plot))


def calibration(values: Mapping[str, Any], settings: PlanSettings, source: Path) -> str:
    """Format predictions and measurements for a batch of the first size."""
    from sora_lightning.planner.calibrate import calibrate

    if not settings.sizes:
        raise ValueError("plan.sizes is missing: calibrate takes the first of them")
    size = VideoSize.parse(settings.sizes[0])
    pixels = ((values.get("data") or {}).get("batching") or {}).get("pixels_per_batch")
    num_clips = max(1, pixels // num_pixels(size)) if pixels else settings.workload.batch
    lines = [f"{num_clips} clips of {size}: predicted, measured, error of the prediction"]
    for row in calibrate(model_of(values, source), size, num_clips, source):
        unit, scale = ("MB", 1e-6) if row.part == "activations" else ("ms", 1e3)
        found = f"{row.predicted * scale:10.1f} {row.measured * scale:10.1f} {unit}"
        lines.append(f"{row.part:22}{found} {row.error:+8.1%}")
    return "\n".join(lines)


def table(rows: Sequence[Row], settings: PlanSettings) -> str:
    """Format a column for each variant and size."""
    work, parallel = settings.workload, settings.parallelism
    lines = [
        f"{parallel.gpus} x {settings.device}, {'FSDP2' if parallel.sharded else 'DDP'}, tensor "
        f"{parallel.tensor}, context {parallel.context}, {work.utilisation:.0%} of the peak; "
        f"{work.batch} clips a replica, {work.steps} steps; {work.sampling_steps} sampling steps x "
        f"{work.guidance_passes}"
    ]
    columns = [["", *(label for label, _ in _CELLS)]]
    columns += [[f"{r.variant} {r.size}", *(cell(r) for _, cell in _CELLS)] for r in rows]
    widths = [max(map(len, column)) for column in columns]
    for cells in zip(*columns, strict=True):
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


_CELLS = (
    ("tokens", lambda r: f"{r.count.tokens:,}"),
    ("parameters: denoiser", lambda r: f"{r.count.parameters / 1e9:.3f} B"),
    ("parameters: trained", lambda r: f"{r.count.trained / 1e9:.3f} B"),
    ("parameters: tokenizer", lambda r: f"{r.count.tokenizer_parameters / 1e6:.1f} M"),
    ("parameters: conditioner", lambda r: f"{r.count.conditioner_parameters / 1e6:.1f} M"),
    ("FLOPs: tokenizer encode", lambda r: f"{r.count.encode_flops:.3g}"),
    ("FLOPs: tokenizer decode", lambda r: f"{r.count.decode_flops:.3g}"),
    ("FLOPs: denoiser forward", lambda r: f"{r.count.forward_flops:.3g}"),
    ("FLOPs: denoiser backward", lambda r: f"{r.count.backward_flops:.3g}"),
    ("FLOPs: step", lambda r: f"{r.estimate.step_flops:.3g}"),
    ("FLOPs: sample", lambda r: f"{r.estimate.sample_flops:.3g}"),
    ("GB a GPU: states", lambda r: f"{r.estimate.state_memory / 1e9:.1f}"),
    ("GB a GPU: activations", lambda r: f"{r.estimate.activation_memory / 1e9:.1f}"),
    ("fits", lambda r: "yes" if r.estimate.fits else "no"),
    ("steps/s", lambda r: f"{r.estimate.steps_per_second:.3g}"),
    ("GPU-hours: training", lambda r: f"{r.estimate.training_hours:,.1f}"),
    ("price: training", lambda r: f"{r.estimate.training_price:,.0f}"),
    ("GPU-hours: a sample", lambda r: f"{r.estimate.sample_hours:.3g}"),
    ("GB: sampling, all GPUs", lambda r: f"{r.estimate.sampling_memory / 1e9:.1f}"),
    ("largest batch a replica", lambda r: f"{r.estimate.largest_batch:,}"),
    ("longest clip in tokens", lambda r: f"{r.estimate.longest_clip:,}"),
    ("fewest GPUs: training", lambda r: f"{r.estimate.fewest_gpus:,}"),
    ("fewest GPUs: sampling", lambda r: f"{r.estimate.fewest_sampling_gpus:,}"),
)


def verdicts(rows: Sequence[Row], settings: PlanSettings) -> list[str]:
    """Return a line for each claim: whether it holds, and the value that was found."""
    lines = []
    for claim in settings.claims:
        holds, found = verdict(claim, list(rows), device_named(settings.device))
        word = "holds" if holds else "does not hold"
        lines.append(f"{claim.text}: {word} ({claim.quantity}, {claim.variant}: {found:,.4g})")
    return lines


def draw(rows: Sequence[Row], output: Path) -> None:
    """Plot the FLOPs of a sample against its tokens, a line for each variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.6), layout="constrained", dpi=110)
    axes = figure.subplots()
    for name in dict.fromkeys(row.variant for row in rows):
        points = sorted(
            (r.count.tokens, r.estimate.sample_flops) for r in rows if r.variant == name
        )
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xlabel="tokens", ylabel="FLOPs of a sample", xscale="log", yscale="log")
    axes.grid(which="both", alpha=0.2)
    axes.legend(frameon=False)
    figure.savefig(output)
