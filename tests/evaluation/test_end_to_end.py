"""``python -m evaluation`` by the networks that published figures are made with: their weights are
drawn here, and every score says so in its name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from evaluation.__main__ import main
from evaluation.features import I3D, Clip, Inception
from evaluation.files import VideoFile
from evaluation.inputs import as_batch, cover, read_entries, read_video
from evaluation.metrics import frechet_distance
from evaluation.metrics.fvd import frame_features
from sora_lightning.data.decoding.encode import write_video

pytestmark = pytest.mark.filterwarnings("ignore:Fréchet distance of")
NUM = 8


@pytest.fixture(scope="module")
def generated(dataset: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight clips of 32 x 32 pixels, the real ones of their prompts played backwards."""
    folder = tmp_path_factory.mktemp("generated")
    rows = []
    for index, entry in enumerate(read_entries(dataset["test"])[:NUM]):
        video = cover(read_video(entry.file, 17, 8.0), 32, 32)
        write_video(folder / f"{index}.mp4", video[::-1], 8)
        rows.append({"path": f"{index}.mp4", "prompt": entry.prompt})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def part(name: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": f"evaluation.features.{name}", "init_args": init_args}


def evaluated(
    folder: Path, generated: Path, reference: Path, networks: dict[str, Any], **options: Path
) -> dict[str, Any]:
    content = yaml.safe_load(Path("evaluation/protocols/demo.yaml").read_text())
    content["clips"] |= {"sizes": ["32x32"], "num_frames": 9, "reference_window": "start"}
    content["clips"]["generated_window"] = "start"
    content["scores"] |= {"alignment": False, "num_generated": NUM, "num_reference": NUM}
    content |= {"networks": networks, "paths": {}}
    (folder / "protocol.yaml").write_text(yaml.safe_dump(content))
    places = {"videos": generated, "protocol": folder / "protocol.yaml", "reference": reference}
    places["output"] = folder / "report"
    named = [str(p) for key, place in (places | options).items() for p in (f"--{key}", place)]
    assert main(named) == 0
    return json.loads((folder / "report" / "report.json").read_text())


def cut(file: VideoFile) -> Any:
    return cover(read_video(file, 9, 8.0, "start"), 32, 32)


def test_clip_fid_and_lpips(
    generated: Path,
    dataset: dict[str, Path],
    clip_folder: Path,
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    networks = {
        "videos": part("TinyFile", weights="random"),
        "frames": part("Inception", weights="random"),
        "texts": part("Clip", folder=str(clip_folder), num_frames=3),
        "perceptual": part("Lpips", weights="random"),
        "frames_per_video": 2,
    }
    report = evaluated(tmp_path, generated, dataset["test"], networks, checkpoint=checkpoint)
    scores = report["scores"]
    names = {"fid-inception-random", "kid-inception-random", "fvd-tiny-random", "kvd-tiny-random"}
    names |= {f"{name}/floor" for name in names}
    clip_names = {"clip_score-vit-32-32-unverified", "clip_consistency-vit-32-32-unverified"}
    names |= clip_names | {"tokenizer/lpips-alex-random", "tokenizer/psnr"}
    assert names <= scores.keys()
    assert not {"fvd", "fid", "kid", "clip_score"} & scores.keys()
    entries = read_entries(generated / "prompts.jsonl")
    videos = as_batch([cut(entry.file) for entry in entries])
    real = as_batch([cut(entry.file) for entry in read_entries(dataset["test"])[:NUM]])
    clip, prompts = Clip(clip_folder, num_frames=3), [entry.prompt for entry in entries]
    expected = float(clip.frame_scores(videos, prompts).mean())
    assert scores["clip_score-vit-32-32-unverified"] == pytest.approx(expected, abs=1e-3)
    # Longer than the twelve letters that the network reads.
    assert scores["clip_score-vit-32-32-unverified/truncated"] == 1
    inception = Inception("random")
    rows = [frame_features(inception, side, 2).flatten(0, 1) for side in (videos, real)]
    expected = float(frechet_distance(*rows))
    assert scores["fid-inception-random"] == pytest.approx(expected, rel=1e-4)
    assert 0 < scores["tokenizer/lpips-alex-random"] < 10
    # The listing holds 20 real videos and 8 are evaluated by: 8 others make the floor.
    assert (
        report["num_spare_reference"] == report["details"]["fid-inception-random/floor"]["n"] == 8
    )
    assert "fvd-tiny-random/apart" in scores
    others = as_batch([cut(entry.file) for entry in read_entries(dataset["test"])[NUM : 2 * NUM]])
    further = frame_features(inception, others, 2).flatten(0, 1)
    expected = float(frechet_distance(rows[1], further))
    assert scores["fid-inception-random/floor"] == pytest.approx(expected, rel=1e-4)
    page = (tmp_path / "report" / "report.html").read_text()
    assert all(name in page for name in names)
    assert clip_names <= report["videos"][0].keys()


@pytest.mark.slow
def test_fvd_by_i3d(generated: Path, dataset: dict[str, Path], tmp_path: Path) -> None:
    networks = {"videos": part("I3D", weights="random")}
    report = evaluated(tmp_path, generated, dataset["test"], networks)
    i3d = I3D("random")
    sides = [generated / "prompts.jsonl", dataset["test"]]
    with torch.no_grad():
        features = [
            i3d(as_batch([cut(entry.file) for entry in read_entries(side)[:NUM]])) for side in sides
        ]
    expected = float(frechet_distance(*features))
    # Drawn weights tell videos apart by 1e-6 of their features: a distance far below 1e-12.
    assert report["scores"]["fvd-i3d-random"] == pytest.approx(expected, rel=1e-4, abs=0)
    assert "fvd" not in report["scores"]
    assert report["settings"]["networks"]["videos"]["batch_norm_eps"] == 1e-3
    # No score reads prompts: none of its own for each video, and no real one beside it.
    assert not any(name.startswith("clip_score") for name in report["scores"])
    kept = list((tmp_path / "reference_features").glob("i3d-random-*.pt"))
    assert len(kept) == 2  # of the real videos to evaluate with, and of further ones for the floor
