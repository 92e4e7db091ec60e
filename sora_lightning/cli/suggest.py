"""Suggestions for misspelt words."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

_LISTED = 12  # more names than this help nobody on one line


def suggestion(word: str, valid: Iterable[str]) -> str:
    """Return ``Did you mean width?``, or a list of the valid words if none is similar."""
    words = sorted(valid)
    near = get_close_matches(word, words, n=1, cutoff=0.6)
    if near:
        return f"Did you mean {near[0]}?"
    if not words:
        return ""
    more = f" and {len(words) - _LISTED} more" if len(words) > _LISTED else ""
    return f"It takes {', '.join(words[:_LISTED])}{more}."
