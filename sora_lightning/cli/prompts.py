"""Reads what to sample: a text file with a prompt a line, or a manifest whose captions are the
prompts."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from sora_lightning.types import VideoSize


@dataclass(frozen=True)
class Prompt:
    """A sentence and the size of the video that is to show it."""

    text: str
    size: VideoSize


def read_prompts(path: Path, sizes: list[VideoSize]) -> list[Prompt]:
    """The prompts of a file, in its order.

    A text file's prompts take the first of ``sizes``; empty lines are passed over. A manifest
    (``.jsonl``) gives the ``caption`` of each row, the first where there are several, and the size
    nearest to the row's ``height`` and ``width`` in proportion.

    Raises:
        ValueError: The file is missing or holds no prompt, or a row is not JSON or lacks a caption;
            names file and line.
    """
    if not path.is_file():
        raise ValueError(f"--prompts {path}: no such file")
    lines = [(n, line.strip()) for n, line in enumerate(path.read_text().splitlines(), 1)]
    lines = [(n, line) for n, line in lines if line]
    if not lines:
        raise ValueError(f"--prompts {path}: holds no prompt")
    if path.suffix != ".jsonl":
        return [Prompt(line, sizes[0]) for _, line in lines]
    return [_from_row(f"--prompts {path}, line {n}", line, sizes) for n, line in lines]


def _from_row(place: str, line: str, sizes: list[VideoSize]) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON: {error.msg}") from error
    caption = row.get("caption") if isinstance(row, dict) else None
    first = caption[0] if isinstance(caption, list) and caption else caption
    if not isinstance(first, str) or not first.strip():
        raise ValueError(f"{place}: needs a caption, a sentence or a list of them")
    height, width = row.get("height"), row.get("width")
    if not (height and width):
        return Prompt(first.strip(), sizes[0])
    ratio = math.log(height / width)
    nearest = min(sizes, key=lambda size: abs(math.log(size.height / size.width) - ratio))
    return Prompt(first.strip(), nearest)
