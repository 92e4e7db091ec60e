"""A named number of a report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """A value over ``n`` videos, with its 95 % interval ``low`` to ``high`` where it has one."""

    value: float
    n: int
    meaning: str
    better: str  # "higher", "lower", or "" for a number that only gives another one its scale
    low: float | None = None
    high: float | None = None
