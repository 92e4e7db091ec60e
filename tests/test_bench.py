"""The speed programme: finds its sections, takes turns, and reckons rates and shares right."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.bench import captions, data, denoisers, layouts, packing
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
    assert slow.fastest_s >= 0.02
    assert fast.fastest_s >= 0.005
    assert fast.ratio == pytest.approx(slow.median_s / fast.median_s)
    assert fast.items_per_s == pytest.approx(10 / fast.median_s)
    assert fast.share == pytest.approx(slow.share * fast.ratio)
    report.write(tmp_path / "bench.json")
    written = json.loads((tmp_path / "bench.json").read_text())
    assert [row["candidate"] for row in written["rows"]] == ["slow", "fast"]
    assert written["threads"] >= 1
    *_, last = (tmp_path / "bench.md").read_text().splitlines()
    assert last.startswith("| sleep | by turns | fast | ")
    assert f"| {fast.ratio:.2f}x | {fast.share:.1%} |" in last


def test_the_share_of_waiting_is_that_of_the_steps_after_the_first(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, steps = [9.0] * data.WARM_UP_STEPS, 10
    seconds = {
        "[_TrainingEpochLoop].train_dataloader_next": [*first, *[0.02] * steps, 5.0],
        "run_training_batch": [*first, *[0.18] * steps],
    }
    report = Report()
    rows = report.parts("a step", data.waits_of(seconds))
    assert rows["whole step"].rounds == steps
    assert rows["whole step"].median_s == pytest.approx(0.2)
    assert "waiting for data: 10.0% of the whole step" in capsys.readouterr().out


def test_a_wrong_section_is_answered_with_those_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["denoiser"])
    assert "there is no section denoiser; there are" in capsys.readouterr().err
    assert "denoisers" in sections()


def test_denoisers_are_measured_beside_diffusers_and_the_matrix_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(denoisers, "IMAGE_SIZES", ("tiny",))
    monkeypatch.setattr(denoisers, "LATTE_SIZE", "tiny")
    monkeypatch.setattr(layouts, "FRAMES", (1, 3))
    monkeypatch.setattr(layouts, "SIDE", 8)
    monkeypatch.setattr(packing, "SIZE", "tiny")
    monkeypatch.setattr(packing, "EXTENTS", [(2, 8, 8), (1, 4, 4), (1, 4, 4)])
    monkeypatch.setattr("tests.bench.report._PRODUCT_SIDE", 256)
    report = Report(seconds=0, min_rounds=1)
    for section in (denoisers, layouts, packing):
        section.run(report)
    cases = {(row.case, row.candidate): row for row in report.rows}
    assert len(cases) == 2 * (2 + 1) + 2 * 2 * 3 + 2 * 2 * 2
    whats = {case.rpartition(", ")[2] for case, _ in cases}
    assert whats == {"forward", "forward and backward"}
    assert any("58% of the padded is padding" in case for case, _ in cases)
    assert all(row.share is not None and row.share > 0 for row in report.rows)
    ours, theirs = (cases["DiT-tiny/2, 256 tokens, batch 4, forward", name] for name in
                    ("sora_lightning", "diffusers"))  # fmt: skip
    assert ours.gmac_per_s * ours.median_s == pytest.approx(theirs.gmac_per_s * theirs.median_s)
    padded, packed = (row for row in report.rows if "joint, 3 clips" in row.case and
                      row.case.endswith(", forward"))  # fmt: skip
    # The padded batch computes 2.4 times as many tokens.
    assert padded.gmac_per_s * padded.median_s > 2 * packed.gmac_per_s * packed.median_s


def test_captions_are_measured_with_and_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "NUM_TOKENS", 3)
    monkeypatch.setattr(captions, "WIDTH", 16)
    report = Report(seconds=0, min_rounds=1)
    captions.run(report)
    assert [row.candidate for row in report.rows] == ["without a cache", "with a cache"]
    assert all(row.items_per_s == pytest.approx(16 / row.median_s) for row in report.rows)
