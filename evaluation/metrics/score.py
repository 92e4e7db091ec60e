"""A score of a report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """Value of a score over ``n`` videos, optionally with a 95 % interval ``low`` to ``high``."""

    value: float
    n: int
    meaning: str
    better: str  # "higher", "lower", or "" for a number that only gives another one its scale
    low: float | None = None
    high: float | None = None
