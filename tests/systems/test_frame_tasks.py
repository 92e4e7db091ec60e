"""A YAML chooses objective and tasks; its checkpoint then does every task from the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sora_lightning.__main__ import main
from sora_lightning.cli.sampling import read_all, to_frames
from sora_lightning.cli.tasks import TASKS, read_video
from sora_lightning.data.encode import write_video
from sora_lightning.diffusion import HybridObjective, MinSNR, VariancePreserving
from sora_lightning.systems import DiffusionSystem
from sora_lightning.types import VideoSize

_PARTS = "sora_lightning.conditioning"
_DIFFUSION = "sora_lightning.diffusion"
TASK_MIXTURE = [
    {"class_path": f"{_PARTS}.TextToVideo", "init_args": {"weight": 2}},
    {"class_path": f"{_PARTS}.FirstFrames", "init_args": {"noise": 0.1}},
    {"class_path": f"{_PARTS}.BothEnds"},
    {"class_path": f"{_PARTS}.OutsideBox"},
]


def part(name: str, **arguments: object) -> dict[str, object]:
    return {"class_path": f"{_DIFFUSION}.{name}", "init_args": arguments}


@pytest.fixture(scope="module")
def checkpoint(fit, diffusion_model, tmp_path_factory) -> Path:
    arguments = {**diffusion_model["init_args"], "tasks": TASK_MIXTURE}
    model = {**diffusion_model, "init_args": arguments}
    return fit({"model": model}, tmp_path_factory.mktemp("masks") / "run", "--trainer.max_steps=4")


@pytest.fixture
def clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    frames = np.zeros((9, 24, 32, 3), np.uint8)
    for i in range(9):
        frames[i, 8:16, i : i + 8, 0] = 220
    write_video(Path("in.mp4"), frames, 8.0)
    write_video(Path("to.mp4"), frames[::-1].copy(), 8.0)
    mask = np.zeros((9, 24, 32, 3), np.uint8)
    mask[4:, :8] = 255
    write_video(Path("mask.mp4"), mask, 8.0)
    Image.fromarray(frames[0]).save("in.png")
    return Path("in.mp4")


def sample(checkpoint: Path, *arguments: str, output: str = "out.mp4") -> int:
    files = ("--checkpoint", str(checkpoint), "--output", output)
    common = ("--prompt", "a red square", "--size", "16x16", "--num-frames", "9", "--num-steps=2")
    return main(["sample", *files, *common, *arguments])


@pytest.mark.parametrize(
    ("arguments", "num_frames"),
    [
        (("--task=animate", "--video=in.png"), 9),
        (("--task=animate", "--video=in.mp4"), 9),
        (("--task=extend", "--video=in.mp4", "--frames=3"), 15),
        (("--task=extend", "--video=in.mp4", "--total-frames=20", "--frame-noise=0.1"), 20),
        (("--task=extend-backward", "--video=in.mp4", "--frame-guidance=2"), 15),
        (("--task=connect", "--video=in.mp4", "--to=to.mp4"), 21),
        (("--task=loop", "--video=in.mp4"), 12),
        (("--task=inpaint", "--video=in.mp4", "--mask=mask.mp4"), 9),
        (("--task=edit", "--video=in.mp4", "--strength=0.5"), 9),
        (("--task=long", "--total-frames=22"), 22),
        (("--sampler=dpm-solver",), 9),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_every_task_writes_its_video(checkpoint, clip, arguments, num_frames):
    assert sample(checkpoint, *arguments) == 0
    assert read_all(Path("out.mp4")).shape == (num_frames, 16, 16, 3)


def test_a_still_image_is_a_picture(checkpoint, clip):
    assert sample(checkpoint, "--task=image", output="out.png") == 0
    assert Image.open("out.png").size == (16, 16)


def test_an_extension_begins_with_the_video(checkpoint, clip):
    assert sample(checkpoint, "--task=extend", "--video=in.mp4", "--frames=3") == 0
    made = read_all(Path("out.mp4")).astype(float)
    tokenizer = DiffusionSystem.from_checkpoint(checkpoint).tokenizer
    video = read_video("--video", clip, 8.0, VideoSize(9, 16, 16))
    with torch.no_grad():
        seam = tokenizer.decode(tokenizer.encode(video[:, :, -3:]))
    expected = np.concatenate([to_frames(video)[0, :-3], to_frames(seam)[0]]).astype(float)
    # Up to the compression of the file; what is compressed is exact in tests/generation.
    assert np.sqrt(np.square(made[:9] - expected).mean(axis=(1, 2, 3))).max() < 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--task=extend",), "--video is missing: --task extend needs it"),
        (("--task=text", "--video=in.mp4"), "--video has no meaning for --task text"),
        (("--task=edit", "--video=in.mp4"), "--strength is missing"),
        (("--task=loop", "--video=none.mp4"), "--video none.mp4: no such file"),
        (("--task=extend", "--video=in.mp4", "--frames=4"), "1 + a multiple of 2"),
        (("--task=extend", "--video=in.mp4", "--size=64x64"), "do not cover 64x64"),
        (("--task=edit", "--video=in.png", "--strength=1"), "has 1 frames"),
        (("--task=extend", "--video=in.mp4", "--total-frames=5"), "has 9 already"),
        (("--task=nothing",), "--task"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_task_that_cannot_be_done_is_refused(checkpoint, clip, capsys, arguments, said):
    assert sample(checkpoint, *arguments) == 2
    assert said in capsys.readouterr().err
    assert not Path("out.mp4").exists()


def test_every_task_is_named_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in TASKS)


def test_a_yaml_chooses_path_prediction_weighting_and_times(fit, diffusion_model, tmp_path):
    path = part("VariancePreserving", betas=part("CosineBetas"), zero_terminal_snr=True)
    process = {"path": path, "prediction": part("V")}
    objective = part("SquaredError", process=process, weighting=part("MinSNR"), offset_noise=0.1)
    arguments = {
        **diffusion_model["init_args"],
        "objective": objective,
        "time": part("Uniform", num_values=1000),
    }
    model = {**diffusion_model, "init_args": arguments}
    checkpoint = fit({"model": model}, tmp_path / "run", "--trainer.max_steps", "2")
    system = DiffusionSystem.from_checkpoint(checkpoint)
    assert isinstance(system.objective.weighting, MinSNR)
    assert isinstance(system.objective.process.path, VariancePreserving)
    assert system.objective.process.path.zero_terminal_snr
    for sampler in ("ddpm", "unipc", "heun"):
        assert sample(checkpoint, f"--sampler={sampler}", output=str(tmp_path / "x.mp4")) == 0


def test_a_learned_variance_trains_and_samples_as_dit_does(fit, diffusion_model, tmp_path):
    process = {"path": part("VariancePreserving"), "prediction": part("Epsilon")}
    denoiser = diffusion_model["init_args"]["denoiser"]
    arguments = {
        **diffusion_model["init_args"],
        "objective": part("HybridObjective", process=process),
        "time": part("Uniform", num_values=1000),
        "denoiser": {
            **denoiser,
            "init_args": {**denoiser["init_args"], "learned_sigma": True},
        },
    }
    model = {**diffusion_model, "init_args": arguments}
    checkpoint = fit({"model": model}, tmp_path / "run", "--trainer.max_steps", "2")
    assert isinstance(DiffusionSystem.from_checkpoint(checkpoint).objective, HybridObjective)
    assert sample(checkpoint, "--sampler=ddpm", output=str(tmp_path / "x.mp4")) == 0
