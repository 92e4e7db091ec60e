"""The evaluation as it is called: videos or a checkpoint in, a report out, and clear refusals."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evaluation.__main__ import main
from evaluation.inputs import read_entries
from sora_lightning.cli.expansion import Expansion
from sora_lightning.data.decoding.encode import write_video


@pytest.fixture(scope="session")
def evaluated(
    samples: Path, evaluate: Callable[..., tuple[Path, dict[str, Any]]]
) -> tuple[Path, dict[str, Any]]:
    return evaluate("--videos", samples)


def test_scores_are_those_of_the_videos(evaluated: tuple[Path, dict[str, Any]]) -> None:
    """16 prompts of one shape come first, 4 of their videos backwards; then 4 of two shapes."""
    scores, details = evaluated[1]["scores"], evaluated[1]["details"]
    assert scores["alignment/colour"] == scores["alignment/shape"] == 1
    assert scores["alignment/direction"] == scores["alignment/all"] == 0.75
    assert scores["alignment/two_shapes/all"] == 1
    assert scores["reference/alignment/direction"] == 1
    assert details["alignment/direction"]["n"] == 16
    unread = [
        f"{of}alignment/{name}"
        for of in ("", "reference/")
        for name in ("none", "ambiguous", "cut")
    ]
    assert [scores[name] for name in unread] == [0] * 6
    assert details["alignment/direction"]["low"] < 0.75 < details["alignment/direction"]["high"]
    assert 0 <= scores["fvd-tiny"] < scores["fvd-tiny/half"]
    assert -100 <= scores["clip_score-tiny"] <= 100
    real, shuffled = (scores[f"clip_score-tiny/{part}"] for part in ("reference", "shuffled"))
    assert real != pytest.approx(shuffled, abs=1e-3)
    assert not any(name.startswith("tokenizer/") for name in scores)
    # All real videos are evaluated by, and none is left for a floor at the same number.
    assert evaluated[1]["num_spare_reference"] == 0
    assert details["fvd-tiny/floor"]["n"] == details["fvd-tiny/half"]["n"] == 10


def test_each_video_is_accounted_for(
    evaluated: tuple[Path, dict[str, Any]], dataset: dict[str, Path]
) -> None:
    rows = evaluated[1]["videos"]
    assert [row["prompt"] for row in rows] == [e.prompt for e in read_entries(dataset["test"])]
    assert [row["direction"] for row in rows] == [False] * 4 + [True] * 16
    assert rows[7]["seed"] == 7


def test_what_was_done_is_recorded(evaluated: tuple[Path, dict[str, Any]]) -> None:
    settings = evaluated[1]["settings"]
    assert settings["sampling"]["num_steps"] == [7]  # what the rows say, not the protocol's 50
    assert settings["sampling"]["guidance_scale"] == ["unknown"]
    assert settings["extractor"]["sha256"] == evaluated[1]["networks"]["sha256"]
    assert settings["num_videos"] == settings["num_reference"] == 20


def test_the_same_again_has_the_same_scores_and_fingerprint(
    evaluated: tuple[Path, dict[str, Any]],
    samples: Path,
    evaluate: Callable[..., tuple[Path, dict[str, Any]]],
) -> None:
    again = evaluate("--videos", samples)[1]
    assert again["scores"] == pytest.approx(evaluated[1]["scores"], rel=1e-6)
    assert again["fingerprint"] == evaluated[1]["fingerprint"]


def test_a_folder_is_a_reference_too(
    samples: Path, evaluate: Callable[..., tuple[Path, dict[str, Any]]]
) -> None:
    """Evaluated by themselves, videos are at no distance, and the copies are seen."""
    scores = evaluate("--videos", samples, "--reference", samples)[1]["scores"]
    assert scores["fvd-tiny"] == pytest.approx(0, abs=1e-6)
    assert scores["nearest_ratio"] == 0 < scores["reference/nearest_ratio"]


def test_the_page_needs_nothing_else(evaluated: tuple[Path, dict[str, Any]]) -> None:
    page = (evaluated[0] / "report.html").read_text()
    assert set(re.findall(r'(?:src|href)="(.{5})', page)) == {"data:"}
    assert "://" not in page
    assert "$" not in page
    for row in evaluated[1]["videos"]:
        assert row["prompt"] in page
    # Each video beside the real clip of its prompt, and a dozen samples above them.
    assert page.count("data:image/webp") == 2 * 20 + 12
    assert evaluated[1]["fingerprint"] in page


def test_tensorboard_has_scores_and_moving_samples(evaluated: tuple[Path, dict[str, Any]]) -> None:
    folder = evaluated[0] / "tensorboard"
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(evaluated[1]["scores"])
    (tag, *_) = events.Tags()["images"]
    assert b"acTL" in events.Images(tag)[0].encoded_image_string[:200]  # an animated PNG


@pytest.fixture
def quick(tmp_path: Path) -> Path:
    """The demo's protocol with two steps of sampling."""
    content = yaml.safe_load(Path("evaluation/protocols/demo.yaml").read_text())
    content["sampling"]["num_steps"] = 2
    (tmp_path / "quick.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "quick.yaml"


def test_a_checkpoint_is_sampled_and_its_tokenizer_evaluated(
    checkpoint: Path, quick: Path, evaluate: Callable[..., tuple[Path, dict[str, Any]]]
) -> None:
    output, report = evaluate("--checkpoint", checkpoint, "--protocol", quick)
    scores, settings = report["scores"], report["settings"]
    assert {"tokenizer/psnr", "tokenizer/ssim", "reconstruction/alignment/shape"} <= scores.keys()
    assert 0 < scores["tokenizer/psnr"] < 40
    assert report["checkpoint"]["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert report["checkpoint"]["step"] == 1
    asked = {"seed": list(range(20)), "num_steps": [2], "guidance_scale": [2.0]}
    default = {
        "cache_first": [1],
        "cache_interval": [1],
        "cache_last": [1],
        "frame_noise": [0.0],
        "guidance_interval": ["0.0,1.0"],
        "guidance_rescale": [0.0],
        "resample_strength": [0.3],
        "sampler": ["euler"],
        "time_grid_kind": ["uniform"],
        "time_grid_num_values": [1000],
        "time_grid_sigma_min": [0.002],
    }
    assert settings["sampling"] == asked | default
    assert len(list((output / "videos").glob("*.mp4"))) == 20
    kept = _break_off(output / "videos", number=15)
    written = {path: path.stat().st_mtime_ns for path in kept}
    again = ["--checkpoint", checkpoint, "--protocol", quick, "--output", output]
    resumed = evaluate(*again)[1]
    assert {path: path.stat().st_mtime_ns for path in kept} == written
    assert resumed["scores"] == pytest.approx(scores, rel=1e-6)
    assert resumed["fingerprint"] == report["fingerprint"]


def _break_off(folder: Path, number: int) -> list[Path]:
    """Leave what a call leaves that was killed after some videos; give these."""
    rows = (folder / "prompts.jsonl").read_text().splitlines(keepends=True)
    (folder / "prompts.jsonl").write_text("".join(rows[:number]) + rows[number][:20])
    videos = [folder / json.loads(row)["path"] for row in rows]
    for path in videos[number:]:
        path.unlink()
    return videos[:number]


class _Lengthened:
    """Stands for a model that expands prompts."""

    def expand(self, prompts: Sequence[str]) -> list[str]:
        return [f"{prompt} in the rain" for prompt in prompts]

    def fingerprint(self) -> str:
        return "lengthened"


def test_prompts_stand_in_the_column_that_is_named_and_are_expanded_only_if_asked(
    checkpoint: Path,
    quick: Path,
    dataset: dict[str, Path],
    evaluate: Callable[..., tuple[Path, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [json.loads(line) for line in dataset["test"].read_text().splitlines()]
    long = [row["caption"][-1] for row in rows]
    listed = [row | {"long": text} for row, text in zip(rows, long, strict=True)]
    reference = dataset["test"].with_name("long.jsonl")
    reference.write_text("".join(json.dumps(row) + "\n" for row in listed))
    model = quick.with_name("expansion.ckpt")
    model.touch()
    content = yaml.safe_load(quick.read_text())
    content["scores"] |= {"num_generated": 8, "num_reference": 8, "jackknife_groups": 4}
    quick.write_text(yaml.safe_dump(content))
    monkeypatch.setattr(
        Expansion, "load", lambda self, *_: None if self.expand is None else _Lengthened()
    )
    asked = ("--checkpoint", checkpoint, "--protocol", quick, "--reference", reference)
    asked += ("--prompt-column", "long")
    _, report = evaluate(*asked)
    expanded_output, expanded = evaluate(*asked, "--expand", model)
    for one in (report, expanded):
        assert [row["prompt"] for row in one["videos"]] == long[:8]
    drawn = read_entries(expanded_output / "videos/prompts.jsonl")
    assert "expanded_by" not in report["settings"]["sampling"]
    assert expanded["settings"]["sampling"]["expanded_by"] == ["lengthened"]
    assert all(entry.sampling["expanded_by"] == "lengthened" for entry in drawn)
    assert report["fingerprint"] != expanded["fingerprint"]


def test_only_as_many_videos_are_sampled_as_are_evaluated(
    checkpoint: Path, quick: Path, evaluate: Callable[..., tuple[Path, dict[str, Any]]]
) -> None:
    content = yaml.safe_load(quick.read_text())
    content["scores"] |= {"num_generated": 9, "alignment": False}
    quick.write_text(yaml.safe_dump(content))
    output, report = evaluate("--checkpoint", checkpoint, "--protocol", quick)
    assert len(list((output / "videos").glob("*.mp4"))) == len(report["videos"]) == 9
    assert report["settings"]["num_reference"] == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "neither --checkpoint nor --videos is given"),
        (("--checkpoint", "absent.ckpt"), "--checkpoint absent.ckpt: no such file"),
        (("--checkpoint", ""), "--checkpoint is empty"),
        (("--checkpoint", "{networks}"), "no Lightning checkpoint"),
        (("--videos", "absent"), "--videos absent: no such file or folder"),
        (("--videos", "{empty}"), "holds no video"),
        (("--videos", "{few}"), "holds 3 videos; protocol demo needs at least 8"),
        (("--videos", "{samples}", "--protocol", "dmo"), "protocol 'dmo': no such file"),
        (("--videos", "{samples}", "--reference", "{few}/prompts.jsonl"), "holds 3 videos"),
        (("--videos", "{samples}", "--reference", "{few}/twice.jsonl"), "the same clip stands in"),
        (("--videos", "{samples}", "--networks", "{few}/0.mp4"), "cannot be read as weights"),
        (("--videos", "{samples}", "--output", "{few}/0.mp4"), "is a file; it must be a folder"),
        (("--videos", "{samples}", "--checkpoint", "{checkpoint}"), "were sampled from a checkp"),
        (
            ("--videos", "{spoilt}/short"),
            r"short/x.mp4: lasts 0.38 s; 17 frames at 8 fps",
        ),
        (
            ("--videos", "{spoilt}/small"),
            "small/x.mp4: is 16x16 pixels, .* evaluates 32x32: too smal",
        ),
        (("--videos", "{spoilt}/empty_prompt"), "jsonl:1: prompt = ' ': ' ' is not a caption"),
        (("--videos", "{samples}", "--prompt-column", "x"), "--prompt-column only applies to a ch"),
        (
            ("--checkpoint", "{checkpoint}", "--prompt-column", "x"),
            "test.jsonl:1: x: must be a string",
        ),
        (("--videos", "{spoilt}/tensor"), "x.pt: its row says no 'layout'; it must be one of F H"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_at_once(
    arguments: tuple[str, ...],
    message: str,
    samples: Path,
    networks: Path,
    checkpoint: Path,
    dataset: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    empty, few = tmp_path / "empty", tmp_path / "few"
    empty.mkdir()
    few.mkdir()
    for index in range(3):
        (few / f"{index}.mp4").write_bytes((samples / f"{index}.mp4").read_bytes())
    rows = (samples / "prompts.jsonl").read_text().splitlines(keepends=True)
    (few / "prompts.jsonl").write_text("".join(rows[:3]))
    (few / "twice.jsonl").write_text(rows[0] * 10)
    places = {"samples": samples, "networks": networks, "empty": empty, "few": few}
    places["spoilt"] = _spoilt(tmp_path / "spoilt", samples)
    defaults = [
        "--reference",
        dataset["test"],
        "--root",
        "/",
        "--networks",
        networks,
        "--output",
        tmp_path / "report",
    ]
    asked = [part.format(checkpoint=checkpoint, **places) for part in arguments]
    assert main([str(part) for part in [*defaults, *asked]]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert re.search(message, line)
    assert captured.out == ""
    assert not (tmp_path / "report").exists()


def test_a_path_that_no_file_can_have_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--videos", "a" * 300, "--protocol", "demo"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "File name too long" in line


def _spoilt(root: Path, samples: Path) -> Path:
    """Folders whose first video or row is wrong in one way, and whose others are right."""
    rows = [json.loads(row) for row in (samples / "prompts.jsonl").read_text().splitlines()]
    good = [row | {"path": str(samples / row["path"])} for row in rows]
    for name, path in (("short", "x.mp4"), ("small", "x.mp4"), ("tensor", "x.pt")):
        (root / name).mkdir(parents=True)
        first = [rows[0] | {"path": path}, *good[1:]]
        (root / name / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in first))
    write_video(root / "short" / "x.mp4", np.zeros((3, 32, 32, 3), np.uint8), 8)
    write_video(root / "small" / "x.mp4", np.zeros((17, 16, 16, 3), np.uint8), 8)
    torch.save(torch.zeros(17, 32, 32, 3), root / "tensor" / "x.pt")
    (root / "empty_prompt").mkdir()
    (root / "empty_prompt" / "x.mp4").touch()
    empty = json.dumps(good[0] | {"prompt": " "})
    (root / "empty_prompt" / "prompts.jsonl").write_text(empty + "\n")
    return root


def test_a_prompt_that_says_too_little_is_refused(
    samples: Path, dataset: dict[str, Path], networks: Path, tmp_path: Path, capsys: Any
) -> None:
    rows = (samples / "prompts.jsonl").read_text().splitlines()
    vague = [json.dumps(json.loads(row) | {"prompt": "a nice video"}) for row in rows]
    for row in rows:
        name = json.loads(row)["path"]
        (tmp_path / name).write_bytes((samples / name).read_bytes())
    (tmp_path / "prompts.jsonl").write_text("\n".join(vague))
    arguments = ["--videos", tmp_path, "--reference", dataset["test"], "--networks", networks]
    assert main([str(part) for part in arguments]) == 2
    assert "prompt 'a nice video': names no shape" in capsys.readouterr().err


def test_training_the_small_networks_is_a_command(
    dataset: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    output = tmp_path / "networks.pt"
    arguments = ["train-tiny", "--manifest", dataset["train"], "--output", output, "--steps", "1"]
    assert main([str(part) for part in arguments]) == 0
    assert "own_over_other" in capsys.readouterr().out
    assert output.is_file()
    arguments[2] = tmp_path / "absent.jsonl"
    assert main([str(part) for part in arguments]) == 2
    assert "absent.jsonl: no such file" in capsys.readouterr().err
