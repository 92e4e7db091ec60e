"""One command scores a model of one's own clips: no download, no protocol to write."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from evaluation.__main__ import main
from evaluation.inputs import read_entries
from evaluation.train_tiny import TinyTraining


def own_captions(manifest: Path, target: Path, number: int) -> Path:
    rows = [
        {"path": str(entry.path), "caption": f"the moon behind dark trees, take {index}"}
        for index, entry in enumerate(read_entries(manifest)[:number])
    ]
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target


@pytest.fixture
def run(
    checkpoint: Path, dataset: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The folder of a run that was trained on clips with captions of one's own."""
    folder = tmp_path / "run"
    shutil.copytree(checkpoint.parent.parent, folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    train = own_captions(dataset["train"], tmp_path / "train.jsonl", 16)
    first = json.loads(train.read_text().splitlines()[0])
    with train.open("a") as file:  # one too short for the networks and for the reference
        file.write(json.dumps({**first, "end_s": 0.5}) + "\n")
    config["data"]["manifest"] = str(train)
    config["data"]["val_manifest"] = str(own_captions(dataset["test"], tmp_path / "val.jsonl", 5))
    config["data"]["reading"] = {"root": str(dataset["train"].parent)}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    quick = partial(TinyTraining, num_steps=2, batch_size=8)
    monkeypatch.setattr("evaluation.own_clips.TinyTraining", quick)
    return folder


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def test_a_checkpoint_is_all_that_is_needed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--checkpoint", str(run / "checkpoints" / "last.ckpt")]) == 0
    printed = capsys.readouterr().out
    report = report_of(run / "report" / "own")
    clips = report["settings"]["clips"]
    assert (clips["num_frames"], clips["fps"], clips["sizes"]) == (17, 8.0, ["32x32"])
    # Five clips are too few for a distance: it says so, and gives what can be given.
    reason = "distances: need 8 videos on each side, and there are 5 and 5"
    assert report["left_out"] == [reason]
    assert f"left out: {reason}" in printed
    scores = report["scores"]
    assert {"clip_score-tiny", "flicker", "nearest_ratio", "tokenizer/psnr"} <= scores.keys()
    assert not any(name.startswith(("fvd", "kvd", "alignment")) for name in scores)
    trained = (run / "small_networks.pt").stat().st_mtime_ns
    enough = ["--reference", str(tmp_path / "train.jsonl"), "--output", str(tmp_path / "more")]
    assert main(["--checkpoint", str(run / "checkpoints" / "last.ckpt"), *enough]) == 0
    more = report_of(tmp_path / "more")
    assert "fvd-tiny" in more["scores"]
    assert (more["num_short_reference"], more["settings"]["num_reference"]) == (1, 16)
    assert (run / "small_networks.pt").stat().st_mtime_ns == trained


def test_the_report_of_another_checkpoint_is_kept(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = run / "checkpoints" / "last.ckpt", run / "checkpoints" / "other.ckpt"
    content = torch.load(first, weights_only=True)
    torch.save(content | {"global_step": 7}, second)
    assert main(["--checkpoint", str(first)]) == 0
    kept = (run / "report" / "own" / "report.json").read_text()
    capsys.readouterr()
    assert main(["--checkpoint", str(second)]) == 2
    assert f"holds the report of {first}" in capsys.readouterr().err
    assert (run / "report" / "own" / "report.json").read_text() == kept
    shutil.rmtree(run / "report" / "own" / "videos")
    assert main(["--checkpoint", str(second), "--overwrite"]) == 0
    assert report_of(run / "report" / "own")["checkpoint"]["path"] == str(second)
