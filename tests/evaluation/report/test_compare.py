"""Reports are compared only where they measure the same, and evaluated only where they differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from evaluation.__main__ import main
from evaluation.report.compare import compare

DETAILS = {
    "fvd-tiny": {"better": "lower"},
    "clip_score-tiny": {"better": "higher"},
    "flicker": {"better": ""},
}


def write(
    folder: Path, scores: np.ndarray, features: Tensor, real: Tensor, **settings: Any
) -> Path:
    folder.mkdir()
    videos = [
        {
            "prompt": f"prompt {i}",
            "clip_score-tiny": float(s),
            "flicker": 1.0,
            **dict.fromkeys(("colour", "direction", "shape"), bool(i % 3)),
            "num_expected": 1 if i < 60 else 2,
        }
        for i, s in enumerate(scores)
    ]
    scoring = {"seed": 0, "jackknife_groups": 16, "covariance_ddof": 1}
    record = {"scores": scoring, "networks": {"videos": {"name": "tiny", "sha256": "a"}}}
    report = {"settings": record | settings, "details": DETAILS, "videos": videos}
    (folder / "report.json").write_text(json.dumps(report))
    torch.save({"generated": features, "reference": real}, folder / "features.pt")
    return folder


@pytest.fixture
def reports(tmp_path: Path) -> dict[str, Path]:
    """``better`` beats ``base`` by less than the spread over prompts; ``same`` is it with noise."""
    rng = np.random.default_rng(0)
    base = rng.normal(30, 5, 80)
    real, made = torch.randn(80, 4), torch.randn(80, 4) + 0.6
    return {
        "base": write(tmp_path / "base", base, made, real),
        "better": write(tmp_path / "better", base + rng.normal(1, 1, 80), made - 0.5, real),
        "same": write(tmp_path / "same", base + rng.normal(0, 1, 80), made[:, [1, 0, 2, 3]], real),
        "random": write(
            tmp_path / "random",
            base,
            made,
            real,
            networks={"videos": {"name": "tiny-random", "sha256": "b"}},
        ),
        "sampled": write(tmp_path / "sampled", base, made, real, sampling={"num_steps": [9]}),
    }


def test_pairs_decide_where_means_alone_would_not(reports: dict[str, Path]) -> None:
    (rows,) = compare([reports["base"], reports["better"]])
    found = {row.score: row for row in rows}
    clip = found["clip_score-tiny"]
    assert clip.verdict == "other"
    assert clip.low < clip.difference < clip.high
    assert clip.high - clip.low < 1  # the spread over prompts, 5, would make it 3
    assert found["fvd-tiny"].verdict == "other"
    assert found["fvd-tiny"].difference < 0
    one, two = found["alignment/colour"], found["alignment/two_shapes/colour"]
    assert (one.verdict, one.difference) == ("undecided", 0)
    # Names and pooling are the report's: prompts of one shape apart from those of two.
    assert one.first == np.mean([bool(i % 3) for i in range(60)])
    assert two.first == np.mean([bool(i % 3) for i in range(60, 80)])
    assert found["flicker"].verdict == ""  # neither way is better
    (turned,) = compare([reports["better"], reports["base"]])
    assert {row.score: row.verdict for row in turned}["clip_score-tiny"] == "first"


def test_noise_is_no_verdict(reports: dict[str, Path]) -> None:
    (rows,) = compare([reports["base"], reports["same"]])
    verdicts = {row.score: row.verdict for row in rows}
    assert verdicts["clip_score-tiny"] == verdicts["fvd-tiny"] == "undecided"


def test_how_videos_were_sampled_may_differ(reports: dict[str, Path]) -> None:
    assert len(compare([reports["base"], reports["better"], reports["sampled"]])) == 2


def test_other_networks_or_prompts_are_refused(reports: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"do not compare: networks is .*'tiny'.*'tiny-random'"):
        compare([reports["base"], reports["random"]])
    content = json.loads((reports["same"] / "report.json").read_text())
    content["videos"][3]["prompt"] = "another"
    (reports["same"] / "report.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="their prompts differ"):
        compare([reports["base"], reports["same"]])
    for name in ("base", "better"):
        content = json.loads((reports[name] / "report.json").read_text())
        for row in content["videos"]:
            row["prompt"] = ""
        (reports[name] / "report.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="without prompts, videos cannot be paired"):
        compare([reports["base"], reports["better"]])
    with pytest.raises(ValueError, match=r"holds no report\.json"):
        compare([reports["base"], tmp_path])
    with pytest.raises(ValueError, match="1 reports: a comparison needs at least two"):
        compare([reports["base"]])


def test_it_is_a_command(reports: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(reports["base"]), str(reports["better"])]) == 0
    assert f"{reports['better']} is better" in capsys.readouterr().out
    assert main(["compare", str(reports["base"]), str(reports["sampled"])]) == 0
    assert f"num_steps [9] in {reports['sampled']}" in capsys.readouterr().out
    assert main(["compare", str(reports["base"]), str(reports["random"])]) == 2
    assert "do not compare" in capsys.readouterr().err
