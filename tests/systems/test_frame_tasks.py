"""A YAML chooses objective and tasks; its checkpoint then does every task from the command line."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sora_lightning.__main__ import main
from sora_lightning.cli.sample import to_frames
from sora_lightning.cli.sample_tasks import TASKS, read_video
from sora_lightning.conditioning import MaskedLatents
from sora_lightning.data.decoding.encode import write_video
from sora_lightning.data.decoding.readers import read_frames
from sora_lightning.diffusion import HybridObjective, MinSNR, VariancePreserving
from sora_lightning.generation import GuidanceConfig, KnownFrames, SamplingConfig, VideoGenerator
from sora_lightning.systems import DiffusionSystem
from sora_lightning.systems.draws import GroupDraws
from sora_lightning.types import Condition, TokenGrid, VideoSize

_PARTS = "sora_lightning.conditioning"
_DIFFUSION = "sora_lightning.diffusion"
TASK_MIXTURE = [
    {"class_path": f"{_PARTS}.TextToVideo", "init_args": {"weight": 2}},
    {"class_path": f"{_PARTS}.FirstFrames", "init_args": {"noise": 0.1}},
    {"class_path": f"{_PARTS}.BothEnds"},
    {"class_path": f"{_PARTS}.Inpainting"},
]


def part(name: str, **arguments: object) -> dict[str, object]:
    return {"class_path": f"{_DIFFUSION}.{name}", "init_args": arguments}


def at_time_zero(masks: list[dict[str, object]]) -> dict[str, object]:
    return {"class_path": f"{_PARTS}.TimeZeroConditioning", "init_args": {"masks": masks}}


@pytest.fixture(scope="module")
def checkpoint(fit, diffusion_model, tmp_path_factory) -> Path:
    arguments = {**diffusion_model["init_args"], "known_frames": at_time_zero(TASK_MIXTURE)}
    model = {**diffusion_model, "init_args": arguments}
    return fit({"model": model}, tmp_path_factory.mktemp("masks") / "run", "--trainer.max_steps=4")


def test_known_frames_that_would_know_later_ones_are_warned_of(
    fit, diffusion_model, tmp_path: Path
) -> None:
    vivit = {
        "class_path": "sora_lightning.tokenizers.ViViTTokenizer",
        "init_args": {
            "latent_channels": 4,
            "tubelet": [2, 8, 8],
            "encoder": {"depth": 1, "width": 24, "num_heads": 2},
        },
    }
    more = {"tokenizer": vivit, "known_frames": at_time_zero(TASK_MIXTURE)}
    arguments = {**diffusion_model["init_args"], **more}
    model = {**diffusion_model, "init_args": arguments}
    with pytest.warns(UserWarning, match="ViViTTokenizer lets a latent frame see later ones"):
        fit({"model": model}, tmp_path / "run", "--trainer.max_steps=1")


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
        (("--task=edit", "--video=in.mp4", "--strength=1", "--source-prompt=a red square"), 9),
        (("--task=long", "--total-frames=22"), 22),
        (("--sampler=dpm-solver",), 9),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_every_task_writes_its_video(checkpoint, clip, arguments, num_frames):
    assert sample(checkpoint, *arguments) == 0
    assert read_frames(Path("out.mp4"))[0].shape == (num_frames, 16, 16, 3)


def test_the_size_of_the_training_is_the_default(checkpoint, clip):
    system = DiffusionSystem.from_checkpoint(checkpoint)
    assert list(map(str, system.training_sizes)) == ["5x16x16", "5x24x16"]
    files = ("--checkpoint", str(checkpoint), "--output", "out.mp4")
    assert main(["sample", *files, "--prompt=a red square", "--num-steps=2"]) == 0
    assert read_frames(Path("out.mp4"))[0].shape == (5, 16, 16, 3)


def test_a_task_that_the_training_did_not_know_is_refused(fit, diffusion_model, clip, capsys):
    plain = fit({"model": diffusion_model}, Path("plain"), "--trainer.max_steps=1")
    for task in ("extend", "loop", "animate"):
        assert sample(plain, f"--task={task}", "--video=in.mp4") == 2
        said = f"--task {task}: {plain} was not trained on known frames"
        assert said in capsys.readouterr().err
    assert sample(plain, "--task=edit", "--video=in.mp4", "--strength=0.5") == 0


def test_words_that_the_training_never_saw_are_named(checkpoint, clip):
    seen = DiffusionSystem.from_checkpoint(checkpoint).conditioner
    assert seen.unseen_words(["a circle xylophone"]) == ["xylophone"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sample(checkpoint, "--prompt=a circle") == 0
    with pytest.warns(UserWarning, match="never saw these words .* in training: 'xylophone'$"):
        assert sample(checkpoint, "--prompt=a circle xylophone") == 0


def test_a_still_image_is_an_image_file(checkpoint, clip):
    assert sample(checkpoint, "--task=image", output="out.png") == 0
    assert Image.open("out.png").size == (16, 16)


def test_a_mask_may_be_an_image(checkpoint, clip):
    """It holds for all frames, as the same mask as a video does."""
    mask = np.zeros((24, 32, 3), np.uint8)
    mask[:8] = 255
    Image.fromarray(mask).save("mask.png")
    write_video(Path("masks.mp4"), np.stack([mask] * 9), 8.0)
    made = []
    for name in ("mask.png", "masks.mp4"):
        arguments = ("--task=inpaint", "--video=in.mp4", f"--mask={name}")
        assert sample(checkpoint, *arguments, output=f"{name}.mp4") == 0
        made.append(read_frames(Path(f"{name}.mp4"))[0])
    assert np.array_equal(*made)


def test_images_are_read_as_they_are_shown(tmp_path: Path):
    """Turned by EXIF's orientation, 16 bits scaled to 8, on white where they are transparent."""
    frames = np.zeros((16, 32, 3), np.uint8)
    frames[:, :16, 0] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise is needed to show it
    Image.fromarray(frames).save(tmp_path / "turned.png", exif=exif)
    shown = read_video("--video", tmp_path / "turned.png", 8.0, VideoSize(9, 32, 16))
    assert shown.shape == (1, 3, 1, 32, 16)
    assert shown[0, 0, 0, :14].mean() > 0.5
    assert shown[0, 0, 0, 18:].mean() < -0.9
    ramp = np.linspace(16384, 49151, 32).astype(np.uint16)
    Image.fromarray(np.tile(ramp, (16, 1))).save(tmp_path / "deep.png")
    deep = read_video("--video", tmp_path / "deep.png", 8.0, VideoSize(1, 16, 32))
    assert abs(deep[..., 0].mean() - (64 / 127.5 - 1)) < 0.02
    assert abs(deep[..., -1].mean() - (191 / 127.5 - 1)) < 0.02
    clear = np.zeros((16, 16, 4), np.uint8)
    clear[..., 0] = 255
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert read_video("--video", tmp_path / "clear.png", 8.0, VideoSize(1, 16, 16)).min() > 0.99


def test_a_video_that_is_not_finite_is_not_written(checkpoint, clip, capsys, monkeypatch):
    broken = torch.load(checkpoint, weights_only=True)
    broken["callbacks"] = {}
    for name, weight in broken["state_dict"].items():
        if name.startswith("denoiser.") and weight.is_floating_point():
            weight.fill_(torch.nan)
    torch.save(broken, "broken.ckpt")
    for arguments in ((), ("--task=extend", "--video=in.mp4")):
        assert sample(Path("broken.ckpt"), *arguments) == 2
        assert "the video is not finite (NaN or infinity)" in capsys.readouterr().err
        assert not Path("out.mp4").exists()


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("folder.mp4", "--output folder.mp4: is a folder; a single video is written to a file"),
        ("file.txt/x.mp4", "--output file.txt/x.mp4: cannot be written (file.txt: "),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    checkpoint, clip, capsys, monkeypatch, output, said
):
    Path("folder.mp4").mkdir()
    Path("file.txt").touch()
    monkeypatch.setattr(VideoGenerator, "latents", None)
    assert sample(checkpoint, output=output) == 2
    assert said in capsys.readouterr().err


def test_prompts_of_a_file_take_any_task(checkpoint, clip):
    Path("prompts.txt").write_text("a red circle\na blue square\n")
    common = ("--checkpoint", str(checkpoint), "--size=16x16", "--num-frames=9", "--num-steps=2")
    task = ("--task=extend", "--video=in.mp4")
    assert main(["sample", *common, *task, "--prompts=prompts.txt", "--output=both"]) == 0
    alone = ("--prompt=a blue square", "--seed=1", "--output=alone.mp4")
    assert main(["sample", *common, *task, *alone]) == 0
    both = sorted(Path("both").glob("*.mp4"))
    assert len(both) == 2
    apart = read_frames(both[1])[0].astype(float) - read_frames(Path("alone.mp4"))[0]
    assert np.abs(apart).max() <= 6


def test_an_extension_begins_with_the_video(checkpoint, clip):
    assert sample(checkpoint, "--task=extend", "--video=in.mp4", "--frames=3") == 0
    made = read_frames(Path("out.mp4"))[0].astype(float)
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


def with_channels(
    diffusion_model, kind: str, masks: list[dict[str, object]], **more: object
) -> dict[str, Any]:
    """The model with known frames beside its input."""
    arguments = diffusion_model["init_args"]
    denoiser = arguments["denoiser"]
    wider = {**denoiser, "init_args": {**denoiser["init_args"], "concat_channels": True}}
    channels = {"class_path": f"{_PARTS}.{kind}"}
    known_frames = {
        "class_path": f"{_PARTS}.ConcatConditioning",
        "init_args": {"channels": channels, "masks": masks, **more},
    }
    changes = {"denoiser": wider, "known_frames": known_frames}
    return {**diffusion_model, "init_args": {**arguments, **changes}}


def test_known_frames_as_channels_train_and_extend(fit, diffusion_model, clip, tmp_path):
    model = with_channels(diffusion_model, "MaskedLatents", TASK_MIXTURE)
    checkpoint = fit({"model": model}, tmp_path / "run", "--trainer.max_steps=2")
    system = DiffusionSystem.from_checkpoint(checkpoint)
    assert isinstance(system.known_frames.channels, MaskedLatents)
    assert system.video_generator().known_frames is system.known_frames
    for arguments in (("--frames=3",), ("--frame-guidance=1.5", "--frame-noise=0.1")):
        assert sample(checkpoint, "--task=extend", "--video=in.mp4", *arguments) == 0
        assert read_frames(Path("out.mp4"))[0].shape[0] >= 13


def test_an_image_as_channels_trains_and_moves(fit, diffusion_model, clip, tmp_path):
    tasks = [{"class_path": f"{_PARTS}.FirstFrames", "init_args": {"most": 1}}]
    model = with_channels(diffusion_model, "FirstFrameAndPosition", tasks)
    checkpoint = fit({"model": model}, tmp_path / "run", "--trainer.max_steps=2")
    assert sample(checkpoint, "--task=animate", "--video=in.png") == 0
    assert sample(checkpoint, "--task=extend", "--video=in.mp4") == 2


def conditioned(
    system: DiffusionSystem,
    captions: list[str],
    uniforms: torch.Tensor,
    x_0: torch.Tensor,
    source: torch.Tensor | None = None,
) -> Condition:
    """The condition of a training step whose clips drew these uniforms."""
    rng = GroupDraws([torch.Generator().manual_seed(0)], len(captions))
    text = system.conditioner(captions, uniforms < system.drop_condition)
    condition, _ = system.known_frames(text, x_0, source, uniforms, rng, system.latent_space)
    return condition


def test_text_and_frames_are_dropped_by_one_uniform(fit, diffusion_model, tmp_path):
    """The four kinds of clip: with both, and without one of them or either."""
    model = with_channels(diffusion_model, "MaskedLatents", TASK_MIXTURE[1:])
    checkpoint = fit({"model": model}, tmp_path / "run", "--trainer.max_steps=1")
    system = DiffusionSystem.from_checkpoint(checkpoint)
    uniforms = torch.tensor([0.02, 0.07, 0.12, 0.5])  # no text, neither, no frames, both
    x_0 = torch.randn(4, 4, 3, 2, 2)
    captions = ["a red circle moves left"] * 4
    condition = conditioned(system, captions, uniforms, x_0)
    known = condition.concat_latents.flatten(1).any(1)
    assert known.tolist() == [True, False, False, True]
    null, full = (system.conditioner([text]).pooled for text in ("", captions[0]))
    for pooled, expected in zip(condition.pooled, (null, null, full, full), strict=True):
        torch.testing.assert_close(pooled[None], expected)


def test_two_scales_weigh_text_and_frames_apart(fit, diffusion_model, tmp_path):
    """Frames at 0 and text at 0 is the unconditional network; 1 and 1 is the conditional one."""
    model = with_channels(diffusion_model, "MaskedLatents", TASK_MIXTURE)
    checkpoint = fit({"model": model}, tmp_path / "run", "--trainer.max_steps=3")
    system = DiffusionSystem.from_checkpoint(checkpoint)
    with torch.no_grad():
        for parameter in system.denoiser.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    latents = torch.randn(1, 4, 3, 2, 2)
    mask = torch.zeros(1, 1, 3, 2, 2, dtype=torch.bool)
    mask[:, :, 0] = True
    known, grid, prompt = KnownFrames(latents, mask), TokenGrid(3, 2, 2), ["a red circle"]

    def made(frames: float | None, text: float, prompts: list[str] = prompt) -> torch.Tensor:
        guidance = GuidanceConfig(text, frame_guidance=frames)
        generator = system.video_generator(SamplingConfig(num_steps=3, guidance=guidance))
        with torch.no_grad():
            return generator.latents(prompts, grid, [0], known)

    torch.testing.assert_close(made(1.0, 1.0), made(None, 1.0), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(made(1.5, 0.0), made(1.5, 3.0, [""]), atol=1e-3, rtol=1e-3)
    assert (made(3.0, 1.0) - made(1.0, 1.0)).abs().max() > 1e-4
    assert (made(1.0, 5.0) - made(1.0, 1.0)).abs().max() > 1e-4


def test_a_training_starts_from_another_ones_weights(checkpoint, fit, diffusion_model, tmp_path):
    """Also with more channels, which start at 0: before it learns it says the same."""
    model = with_channels(diffusion_model, "MaskedLatents", TASK_MIXTURE)
    slow = "--model.init_args.optimizer.init_args.lr=1e-12"
    start = f"--checkpoint.start_from={checkpoint}"
    wider = fit({"model": model}, tmp_path / "run", start, slow, "--trainer.max_steps=1")
    old, new = (DiffusionSystem.from_checkpoint(one) for one in (checkpoint, wider))
    weight = new.denoiser.x_in.weight
    torch.testing.assert_close(weight[:, :4], old.denoiser.x_in.weight, atol=1e-5, rtol=0)
    assert weight[:, 4:].abs().max() < 1e-5
    prompts, size = ["a red square"], VideoSize(5, 16, 16)
    videos = [one.generate(prompts, size, [0], SamplingConfig(num_steps=2)) for one in (old, new)]
    torch.testing.assert_close(*videos, atol=1e-3, rtol=1e-3)


def test_weights_of_another_shape_are_no_start(checkpoint, fit, diffusion_model, tmp_path):
    arguments = diffusion_model["init_args"]
    wide = {**arguments["denoiser"]["init_args"], "size": {"depth": 2, "width": 48, "num_heads": 2}}
    other = {**arguments, "denoiser": {**arguments["denoiser"], "init_args": wide}}
    model = {**diffusion_model, "init_args": other}
    start = f"--checkpoint.start_from={checkpoint}"
    with pytest.raises(ValueError, match=r"start_from = .*: denoiser\..* is \(24"):
        fit({"model": model}, tmp_path / "run", start, "--trainer.max_steps=1")


def test_channels_without_tasks_are_refused(diffusion_model, fit, tmp_path):
    model = with_channels(diffusion_model, "MaskedLatents", [])
    with pytest.raises(ValueError, match="nothing would ever be known"):
        fit({"model": model}, tmp_path / "run", "--trainer.max_steps=1")


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
