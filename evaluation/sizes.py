"""Sizes of clips as they stand in protocols and on the command line."""

from __future__ import annotations

import re


def height_and_width(size: str, key: str) -> tuple[int, int]:
    """Return height and width of a size such as ``32x48``; ``ValueError`` naming ``key``."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size)
    if found is None:
        raise ValueError(f"{key} = {size!r}: must be height x width, e.g. 32x48")
    return int(found[1]), int(found[2])
