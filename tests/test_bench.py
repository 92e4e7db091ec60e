"""The speed programme: finds its sections, takes turns, and reckons rates and shares right."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.bench.__main__ import main, sections
from tests.bench.report import Report


def test_candidates_take_turns_and_ratios_follow_their_times(tmp_path: Path) -> None:
    calls = []

    def candidate(name: str, seconds: float) -> None:
        calls.append(name)
        time.sleep(seconds)

    report = Report(seconds=0, min_rounds=3)
    report.section = "sleep"
    rows = report.compare(
        "by turns",
        {"slow": lambda: candidate("slow", 0.02), "fast": lambda: candidate("fast", 0.005)},
        gmac={"slow": 1.0, "fast": 1.0},
        items=10,
        unit="naps",
    )
    assert calls == ["slow", "fast"] * 4  # a warm-up and three rounds
    slow, fast = rows["slow"], rows["fast"]
    assert slow.ratio == 1
    assert 2 < fast.ratio <= 4.5
    assert fast.items_per_s == pytest.approx(10 / fast.median_s)
    assert fast.share == pytest.approx(slow.share * fast.ratio)
    report.write(tmp_path / "bench.json")
    written = json.loads((tmp_path / "bench.json").read_text())
    assert [row["candidate"] for row in written["rows"]] == ["slow", "fast"]
    assert written["threads"] >= 1


def test_a_wrong_section_is_answered_with_those_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["denoiser"])
    assert "there is no section denoiser; there are" in capsys.readouterr().err
    assert "denoisers" in sections()
