"""Data modules from options without their groups."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from sora_lightning.data import Batching, Reading, VideoDataModule


def data_module(
    manifest: Path,
    sizes: Any = None,
    fps: float = 8.0,
    pixels_per_batch: int | None = None,
    of: type[VideoDataModule] = VideoDataModule,
    **options: Any,
) -> VideoDataModule:
    options |= {"sizes": sizes, "pixels_per_batch": pixels_per_batch}
    batching, reading = (
        {name: options.pop(name) for name in [f.name for f in fields(group)] if name in options}
        for group in (Batching, Reading)
    )
    groups = {"batching": Batching(**batching), "reading": Reading(**reading)}
    return of(manifest, fps=fps, **groups, **options)
