"""The report's page: whatever text files bring, it shows text and no markup."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from evaluation.report.page import page
from tests.hostile import HOSTILE


class _Seen(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data


def _report(text: str) -> dict[str, Any]:
    """A report in which ``text`` stands wherever a file's own text can."""
    network = text.replace("/", " ")  # a slash in a score's name parts it from its scale
    score = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 3, "better": "", "meaning": text}
    row = {"path": f"{text}.mp4", "prompt": text, "seed": text, "num_steps": text, "found": [text]}
    row |= {"colour": True, "direction": False, "shape": True, f"clip_score-{network}": 3.0}
    scales = {f"clip_score-{network}/{part}": score for part in ("reference", "shuffled")}
    distances = {f"fvd-{network}{part}": score for part in ("", "/half", "/floor")}
    part = dict.fromkeys(("alignment/colour", "reconstruction/alignment/colour"), score)
    settings = {
        **{key: {text: text} for key in ("clips", "scores")},
        "sampling": {"seed": [text], text: [text, text]},
        "networks": {"videos": {text: text}, text: text},
        **dict.fromkeys(("reference_sha256", "prompts_sha256"), text),
        **dict.fromkeys(("num_videos", "num_reference"), 3),
    }
    return {
        "details": {text: score, f"clip_score-{network}": score, **scales, **distances, **part},
        "videos": [row, row, {**row, "prompt": ""}],
        "settings": settings,
        "checkpoint": {"path": text, "sha256": text, "step": 7},
        "networks": {text: text},
        "versions": {text: text},
        **dict.fromkeys(("protocol", "fingerprint", "reference", "device", "seconds"), text),
    }


def _seen(text: str) -> _Seen:
    video = np.zeros((2, 8, 8, 3), np.uint8)
    seen = _Seen()
    seen.feed(page(_report(text), [video] * 3, [video] * 3, fps=8.0))
    return seen


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_files_is_never_markup(text: str) -> None:
    seen = _seen(text)
    assert seen.tags == _seen("plain words").tags
    assert seen.text.count(text) >= 25
