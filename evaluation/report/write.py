"""Report of an evaluation, written as JSON, as an HTML page, and to TensorBoard."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from evaluation.inputs import Video, Videos
from evaluation.report.page import page, shown
from sora_lightning.data.manifest.records import label_of

_TENSORBOARD_VIDEOS = 16
_LEAST_SIDE = 128


def write_report(
    report: Mapping[str, Any],
    videos: Videos,
    real: Videos | None,
    fps: float,
    output: Path,
) -> None:
    """Write ``report.json``, ``report.html`` and TensorBoard logs to a folder, created if missing.

    ``report`` holds ``scores`` (name to value), ``details`` (name to the fields of ``Score``),
    ``videos`` (a row for each of ``videos``), ``settings``, and the other values of
    ``evaluate.record``. ``real`` are clips of the same prompts in the same order.
    """
    output.mkdir(parents=True, exist_ok=True)
    _write(output / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    _write(output / "report.html", page(report, videos, real, fps))
    _write_tensorboard(report, videos, fps, output)


def as_text(report: Mapping[str, Any]) -> str:
    """Format the scores for a terminal, one per line."""
    lines = []
    for name, score in report["details"].items():
        interval = ""
        if score["low"] is not None:
            interval = f"{shown(name, score['low'])} to {shown(name, score['high'])}"
        lines.append(f"{name:38} {shown(name, score['value']):>9}   {interval:20} n = {score['n']}")
    lines += [f"left out: {reason}" for reason in report.get("left_out", [])]
    return "\n".join(lines)


def animated_png(video: Video, fps: float) -> bytes:
    """Encode a lossless animated PNG, enlarged by an integer factor if it is small.

    TensorBoard's image tab plays it.
    """
    scale = max(1, _LEAST_SIDE // min(video.shape[1:3]))
    frames = [Image.fromarray(f.repeat(scale, axis=0).repeat(scale, axis=1)) for f in video]
    buffer = io.BytesIO()
    duration = round(1000 / fps)
    frames[0].save(
        buffer, "PNG", save_all=True, append_images=frames[1:], duration=duration, loop=0
    )
    return buffer.getvalue()


def _write(path: Path, text: str) -> None:
    """Write a file atomically."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def _write_tensorboard(report: Mapping[str, Any], videos: Videos, fps: float, output: Path) -> None:
    step = report["checkpoint"]["step"] if report["checkpoint"] else 0
    folder = output / "tensorboard"
    # Otherwise a second report in the same folder would plot every score twice.
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as writer:
        for name, value in report["scores"].items():
            writer.add_scalar(name, value, step)
        for place, row in enumerate(report["videos"][:_TENSORBOARD_VIDEOS]):
            video = videos[place]
            image = Summary.Image(
                height=video.shape[1],
                width=video.shape[2],
                colorspace=3,
                encoded_image_string=animated_png(video, fps),
            )
            tag = f"samples/{label_of(row['prompt'] or Path(row['path']).name)}"
            summary = Summary(value=[Summary.Value(tag=tag, image=image)])
            writer.file_writer.add_summary(summary, step)
