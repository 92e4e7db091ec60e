"""`python -m evaluation tasks` makes every task's videos and writes rates and images; the stages
before it are commands that stand.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from evaluation.__main__ import main
from evaluation.models.frame_tasks.protocol import TaskProtocol
from evaluation.models.frame_tasks.run import NAMES, TaskRequest, as_table, measure_tasks
from sora_lightning.__main__ import main as library
from sora_lightning.data.synthetic.render import write_dataset
from sora_lightning.workflows.frame_tasks import frame_task_stages

PROTOCOL = TaskProtocol(
    cases=2,
    frames=(9, 13),
    new_frames=17,
    context=5,
    steps=1,
    times=2,
)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("reference")
    return write_dataset(root, num_train=0, num_val=0, num_test=4, num_workers=1)["test"]


@pytest.fixture(scope="module")
def checkpoint(fit, diffusion_model, tmp_path_factory) -> Path:
    arguments = diffusion_model["init_args"]
    denoiser = arguments["denoiser"]
    size = {**denoiser["init_args"]["size"], "depth": 3}
    deeper = {**denoiser, "init_args": {**denoiser["init_args"], "size": size}}
    model = {**diffusion_model, "init_args": {**arguments, "denoiser": deeper}}
    return fit({"model": model}, tmp_path_factory.mktemp("tasks") / "run", "--trainer.max_steps=2")


def test_every_task_is_made_and_judged(checkpoint, reference, tmp_path):
    report = measure_tasks(TaskRequest(checkpoint, reference, tmp_path, PROTOCOL))
    assert json.loads((tmp_path / "report.json").read_text()) == report
    rates = report["rates"]
    goals = {name: row["goal"] for name, row in rates.items() if row["goal"] is not None}
    asked = {
        "extend/colour_and_shape": 0.9,
        "extend/direction": 0.8,
        "connect/no_jump": 0.8,
        "loop/closes": 0.8,
        "edit/colour_and_motion": 0.7,
        "long/colour": 0.8,
        "size/new_aspect/direction/gap": 0.15,
        "size/new_length/shape/gap": 0.15,
    }
    assert asked.items() <= goals.items()
    for name, row in rates.items():
        assert row["n"] == 2
        assert name in as_table(report)
    # Known frames come back whatever the network says, and caching at every step is exact.
    for task in ("animate", "extend", "extend_backward", "connect", "loop"):
        assert rates[f"seam/{task}/known_frame"]["value"] == 1, task
    assert rates["cache/1/psnr"]["value"] == 100
    assert rates["inpaint/kept"]["value"] == 1
    assert not report["checkpoint"]["trained_with_tasks"]
    drawn = {path.stem for path in tmp_path.glob("*.png")}
    assert drawn >= set(NAMES) - {"sizes"}
    assert min(Image.open(tmp_path / "extend.png").size) > 100


def test_the_command_does_some_of_the_tasks(checkpoint, reference, tmp_path, capsys):
    files = ("--checkpoint", checkpoint, "--reference", reference, "--output", tmp_path)
    few = ("--cases=1", "--steps=1", "--frames=13,19", "--new-frames=21", "--tasks=long")
    assert main(["tasks", *map(str, files), *few]) == 0
    shown = capsys.readouterr().out
    assert "long/colour" in shown
    assert "extend" not in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--tasks=juggle",), "--tasks juggle: no such task; known are animate"),
        (("--cases=99",), "holds 4 videos of one shape; --cases is 99"),
        (("--frames=25,17",), "must be three rising numbers"),
        (("--frames=9,25",), "--context 9: leaves no new frames in 9 frames"),
        (("--new-size=32x32",), "is one of --sizes already"),
        (("--checkpoint=none.ckpt",), "--checkpoint none.ckpt: no such file"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    checkpoint, reference, tmp_path, capsys, arguments, said
):
    files = ("--checkpoint", checkpoint, "--reference", reference, "--output", tmp_path / "out")
    assert main(["tasks", *map(str, files), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_stages_train_at_both_lengths_from_the_demos_weights(tmp_path):
    folder = tmp_path / "text_to_video"
    folder.mkdir()
    data = {"batching": {"sizes": ["17x32x32", "17x24x40"]}, "fps": 8.0}
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    stages = frame_task_stages(tmp_path, Path("out"), steps=7, cases=64)
    clips, decoder, encode, train, measure = stages
    assert clips.command[clips.command.index("--root") + 1] == "out/data"
    assert "--turns" in clips.command
    sizes = "[17x32x32,17x24x40,25x32x32,25x24x40]"
    for stage in (decoder, train):
        assert "--model.init_args.tokenizer.init_args.checkpoint" in stage.command
    for stage, key in ((encode, "predict_sizes"), (train, "sizes")):
        assert stage.command[stage.command.index(f"--data.batching.{key}") + 1] == sizes
        assert stage.command[stage.command.index("--data.manifest") + 1] == "out/data/train.jsonl"
    start = train.command[train.command.index("--checkpoint.start_from") + 1]
    assert start == f"{tmp_path}/text_to_video/checkpoints/last.ckpt"
    assert measure.command[measure.command.index("--frames") + 1] == "17,25"
    assert measure.command[measure.command.index("--sizes") + 1] == "32x32,24x40"


def test_without_a_demo_there_is_nothing_to_measure(tmp_path, capsys):
    assert library(["frame-tasks", "--demo", str(tmp_path), "--output", str(tmp_path / "o")]) == 2
    assert "run `sora-lightning demo` first" in capsys.readouterr().err
