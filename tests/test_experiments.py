"""Every YAML builds as it is written and says what it is for; the demo's chain runs from clips to a
video.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evaluation.__main__ import main as evaluation_main
from sora_lightning.__main__ import main
from sora_lightning.ablations.plan import make_plan
from sora_lightning.ablations.spec import load_ablation
from sora_lightning.callbacks import EMA
from sora_lightning.checkpoints import load_tokenizer
from sora_lightning.cli.training import TrainingCLI
from sora_lightning.data.decoding.readers import read_frames
from sora_lightning.systems import CaptionerSystem, DiffusionSystem, TokenizerSystem
from tests.conditioning.text_folders import clip_folder, t5_folder
from tests.denoisers.pipelines import RECIPES, pipeline_folder

_ROOT = Path(__file__).resolve().parents[1]
_YAMLS = sorted(path.relative_to(_ROOT) for path in _ROOT.glob("experiments/**/*.yaml"))
_ABLATIONS = [path for path in _YAMLS if "arms" in yaml.safe_load((_ROOT / path).read_text())]
# Building an arm takes two seconds; the YAMLs of the arms are built one by one as well.
_SHORT = ("tokenizers.yaml",)
_PLANS = [path for path in _YAMLS if path.parent.name == "plans"]  # see tests/planner/
_LABELS = ("Question", "Command", "Cost", "Expected")
_SMALL = (
    "--data.batching.sizes=[17x32x32]",
    "--data.batching.predict_sizes=null",
    "--data.batching.pixels_per_batch=70000",
    "--trainer.logger=true",
)
_SIZES = "data.batching.sizes"
_FEW = (
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=1",
    "--trainer.log_every_n_steps=1",
)
_DENOISER, _TOKENIZER = (
    "--model.init_args.denoiser.init_args",
    "--model.init_args.tokenizer.init_args",
)
_NARROW = {
    "experiments/demo/tokenizer.yaml": f"{_TOKENIZER}.widths=[8,16,16]",
    "experiments/own_clips/tokenizer.yaml": f"{_TOKENIZER}.widths=[8,16,16]",
}
_CAPTIONS = {
    **{"train": (), "val": (), "test": (), "unnamed_red": ("--unnamed", "red")},
    **{f"errors_{rate}": ("--colour-errors", f"0.{rate}") for rate in (10, 30)},
}
_PAIRS = {"manifest": "train", "val_manifest": "val"}
_CHECKPOINT = "runs/demo/text_to_video/checkpoints/last.ckpt"


def _run(*arguments: str) -> None:
    assert main(arguments) == 0


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the experiments, clips for all of them, and narrow tokenizers trained for two
    steps where the text-to-video experiments look for theirs.
    """
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "experiments").symlink_to(_ROOT / "experiments")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        counts = ("--num_train", "8", "--num_val", "8", "--num_test", "3")
        _run("synthesize", "--root", "runs/demo/data", *counts)
        (folder / "clips").symlink_to("runs/demo/data")
        (folder / "clips/all.jsonl").symlink_to("train.jsonl")
        (folder / "runs/clips").symlink_to("demo/data")
        (folder / "runs/captioner").mkdir()
        (folder / "runs/captioner/data").symlink_to("../demo/data")
        for name, faults in _CAPTIONS.items():
            source = f"runs/demo/data/{name if name in ('val', 'test') else 'train'}.jsonl"
            files = ("--manifest", source, "--output", f"runs/captions/{name}.jsonl")
            _run("simulate-captions", *files, *faults)
        described = {"train": "third", "val": "val_described"}
        for split, name in described.items():
            files = ("--manifest", f"runs/demo/data/{split}.jsonl", "--output")
            _run("simulate-captions", *files, f"runs/captioner/data/{name}.jsonl")
        for name in ("third", "captioned"):
            files = ("--manifest", "runs/demo/data/train.jsonl", "--output")
            _run("simulate-captions", *files, f"runs/demo/captions/{name}.jsonl")
        _run("fit", "--config", "experiments/captioner/short.yaml", "--data.fps=8", *_SMALL, *_FEW)
        (folder / "runs/demo/captioner").symlink_to("../captioner/short")
        (folder / "runs/ablations").mkdir()
        for name, target in (("data", "data"), ("latents", "latents"), ("real_latents", "latents")):
            (folder / "runs/ablations" / name).symlink_to(f"../demo/{target}")
        (folder / "runs/framing").symlink_to("demo")
        (folder / "runs/tokenizer").mkdir()
        (folder / "runs/tokenizer/quality").symlink_to("../demo/tokenizer")
        t5_folder(folder / "encoders/t5")
        clip_folder(folder / "encoders/clip")
        for recipe, name in RECIPES.items():
            pipeline_folder(name, folder / "models" / recipe)
        for config, narrow in _NARROW.items():
            _run("fit", "--config", config, *_SMALL, *_FEW, narrow)
            _run("predict", "--config", config, *_SMALL, narrow, "--ckpt_path", "last")
        _run("synthesize", "--root", "runs/instruct/data", "--edits", *counts)
        config = "experiments/demo/tokenizer.yaml"
        pairs = [f"--data.{k}=runs/instruct/data/{v}.jsonl" for k, v in _PAIRS.items()]
        sources = ("--data.reading.sources=true", "--latents.root=runs/instruct/latents")
        encode = ("predict", "--config", config, *_SMALL, _NARROW[config], "--ckpt_path", "last")
        _run(*encode, *pairs, *sources)
        small = ("--model.init_args.denoiser.init_args.size.depth=2", *_SMALL, *_FEW)
        _run("fit", "--config", "experiments/demo/text_to_video.yaml", *small)
        train_tiny = ("train-tiny", "--manifest", "clips/train.jsonl", "--steps", "1")
        assert evaluation_main([*train_tiny, "--output", "runs/demo/networks.pt"]) == 0
        for name in ("tokenizer", "latents"):
            (folder / f"runs/own_clips/{name}_gpu").symlink_to(name)
        for name in ("text_to_video", "text_to_video_gpu"):
            networks = folder / f"runs/own_clips/{name}/small_networks.pt"
            networks.parent.mkdir()
            networks.symlink_to("../../demo/networks.pt")
        yield folder


@pytest.fixture
def inside(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workplace)
    return workplace


def _header(path: Path) -> dict[str, str]:
    """The opening comments by label; what follows a label's line belongs to it."""
    header: dict[str, str] = {}
    for line in (_ROOT / path).read_text().splitlines():
        if not line.startswith("#"):
            break
        words = line.removeprefix("# ")
        label = words.split(" ")[0]
        if label in _LABELS:
            header[label] = words.removeprefix(label).strip()
        else:
            header[list(header)[-1]] += "\n" + words.strip()
    return header


@pytest.mark.parametrize("path", _YAMLS, ids=str)
def test_a_yaml_opens_with_question_command_cost_and_expectation(path: Path) -> None:
    header = _header(path)
    assert tuple(header) == _LABELS
    assert all(header.values())
    assert header["Question"].rstrip().endswith("?")
    assert str(path) in header["Command"]


@pytest.mark.parametrize("path", [p for p in _YAMLS if p not in _ABLATIONS + _PLANS], ids=str)
def test_a_yaml_builds_by_the_command_it_gives(
    inside: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[TrainingCLI] = []
    monkeypatch.setattr(TrainingCLI, "_run_subcommand", lambda cli, command: built.append(cli))
    program, *arguments = shlex.split(_header(path)["Command"].splitlines()[0])
    assert program == "sora-lightning"
    _run(*arguments, "--run_dir", "runs/untouched")
    (cli,) = built
    assert isinstance(cli.model, CaptionerSystem | DiffusionSystem | TokenizerSystem)
    assert getattr(cli.model, "fps", cli.datamodule.fps) == cli.datamodule.fps
    assert not Path("runs/untouched").exists()


@pytest.mark.parametrize("path", _ABLATIONS, ids=str)
def test_an_ablation_is_read_by_the_command_it_gives(inside: Path, path: Path) -> None:
    assert shlex.split(_header(path)["Command"].splitlines()[0]) == [
        *("sora-lightning", "ablate", str(path))
    ]
    assert load_ablation(path).arms


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=[pytest.mark.slow] * (p.name not in _SHORT)) for p in _ABLATIONS],
    ids=str,
)
def test_every_arm_of_an_ablation_builds(inside: Path, path: Path) -> None:
    ablation = load_ablation(path)
    assert [arm.name for arm in make_plan(ablation)] == list(ablation.arms)
    assert not ablation.output.exists()


def test_a_run_lies_in_its_folder(inside: Path) -> None:
    run = Path("runs/demo/tokenizer")
    assert {path.name for path in run.iterdir() if "events" not in path.name} == {
        ".lock",
        "checkpoints",
        "config.yaml",
        "hparams.yaml",
    }
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


def test_the_config_a_run_saves_is_that_of_its_training_and_builds_it_again(
    inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingCLI, "_run_subcommand", lambda cli, command: None)
    config = Path("runs/demo/text_to_video/config.yaml")
    assert "max_steps: 2" in config.read_text()
    _run("fit", "--config", str(config), "--run_dir", "runs/again")


def test_predict_encodes_every_clip_with_the_weights_that_are_sampled_with(inside: Path) -> None:
    tokenizer = load_tokenizer(Path("runs/demo/tokenizer/checkpoints/last.ckpt"))
    index = json.loads(Path("runs/demo/latents/index.json").read_text())
    assert index["tokenizer"] == tokenizer.fingerprint()
    assert (
        DiffusionSystem.from_checkpoint(_CHECKPOINT).tokenizer.fingerprint() == index["tokenizer"]
    )


def test_tensorboard_has_curves_and_images_that_move(inside: Path) -> None:
    for run, tag in (("tokenizer", "reconstructions/0"), ("text_to_video", "samples/")):
        events = EventAccumulator(f"runs/demo/{run}", size_guidance={"images": 0, "scalars": 0})
        events.Reload()
        assert {"train/loss", "val/loss"} <= set(events.Tags()["scalars"])
        tags = [name for name in events.Tags()["images"] if name.startswith(tag)]
        assert tags
        images = events.Images(tags[0])
        assert len(images) == 2  # one for each validation
        assert b"acTL" in images[0].encoded_image_string  # the chunk that makes a PNG move


def _logged(run: str, group: str) -> dict[str, list[float]]:
    """Every scalar of a group in a run's TensorBoard by its tag."""
    events = EventAccumulator(run, size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(f"{group}/")]
    assert any(tag.startswith("scores/") for tag in events.Tags()["images"])
    return {tag: [event.value for event in events.Scalars(tag)] for tag in tags}


def _scored_training(run: str, devices: int) -> list[str]:
    """Return the command of a training that logs FVD and CLIP score, with weights that its seed
    drew: its steps are next to nothing."""
    configs = ("experiments/demo/text_to_video.yaml", "experiments/text_to_video/scored.yaml")
    command = ["fit", *(part for config in configs for part in ("--config", config))]
    small = ["--model.init_args.denoiser.init_args.size.depth=2", *_SMALL, *_FEW]
    small += ["--seed_everything=3", "--model.init_args.optimizer.init_args.lr=1e-9"]
    ranks = [f"--run_dir={run}", f"--trainer.devices={devices}", "--trainer.accelerator=cpu"]
    return [*command, *small, *ranks]


def test_fvd_and_clip_score_are_logged_while_a_model_trains(inside: Path) -> None:
    run = "runs/scored/alone"
    _run(*_scored_training(run, devices=1))
    scores = _logged(run, "scores")
    names = ("scores/fvd-tiny", "scores/clip_score-tiny")
    assert set(scores) == {f"{name}{part}" for name in names for part in ("", "/low", "/high")}
    assert all(len(values) == 2 for values in scores.values())  # one for each validation
    for name in names:
        low, value, high = (scores[f"{name}{part}"][0] for part in ("/low", "", "/high"))
        assert low <= value <= high
        assert low < high
    # Features of the reference are kept for the runs to come.
    assert len(list(Path("runs/reference_features").glob("*.pt"))) == 1


@pytest.mark.slow
def test_two_ranks_log_the_scores_of_one_and_twice_its_work(inside: Path) -> None:
    one, two = "runs/scored/one", "runs/scored/two"
    _run(*_scored_training(one, devices=1))
    keep = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-m", "sora_lightning", *_scored_training(two, devices=2)],
        env={**keep, "PYTHONPATH": str(_ROOT)},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    alone, shared = _logged(one, "scores"), _logged(two, "scores")
    for tag, values in alone.items():
        assert shared[tag] == pytest.approx(values, rel=5e-3)
    alone, shared = _logged(one, "progress"), _logged(two, "progress")
    for count in ("clips", "frames", "tokens", "flops"):
        (single,), (double,) = (logged[f"progress/{count}"] for logged in (alone, shared))
        assert double == pytest.approx(2 * single)  # of both ranks, after two steps


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("size=17x30x32", "height 30"),
        ("prompts=absent.jsonl", "prompts = absent.jsonl: no such file"),
        ("num_videos=4", "ScoreVideos: FVD of 4 prompts: needs at least 8"),
    ],
)
def test_scores_are_checked_before_the_first_step(
    inside: Path, change: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = ("experiments/demo/text_to_video.yaml", "experiments/text_to_video/scored.yaml")
    arguments = [part for config in configs for part in ("--config", config)]
    key, _, value = change.partition("=")
    scored = yaml.safe_load(Path(configs[1]).read_text())
    scored["trainer"]["callbacks"][1]["init_args"][key] = int(value) if value == "4" else value
    Path("runs/changed.yaml").write_text(yaml.safe_dump(scored))
    arguments[-1] = "runs/changed.yaml"
    assert main(["fit", *arguments, *_SMALL, *_FEW, "--run_dir=runs/unscored"]) == 2
    assert said in capsys.readouterr().err
    assert not list(Path("runs/unscored").glob("**/*.ckpt"))


def test_a_checkpoint_alone_makes_videos(
    inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = str(inside / _CHECKPOINT)
    monkeypatch.chdir(tmp_path)  # far from the YAML, the data and the tokenizer's own checkpoint
    options = ("--num-steps=2", "--num-frames=9", "--seed=1")
    one = ("sample", "--checkpoint", checkpoint, "--prompt", "a red circle moves left", *options)
    _run(*one, "--size=32x32", "--output=x.mp4")
    assert read_frames(Path("x.mp4"))[0].shape == (9, 32, 32, 3)
    many = ("sample", "--checkpoint", checkpoint, "--prompts", str(inside / "clips/test.jsonl"))
    _run(*many, "--size=32x32,24x40", "--output=out", *options)
    rows = [json.loads(line) for line in Path("out/prompts.jsonl").read_text().splitlines()]
    assert [read_frames(Path("out", row["path"]))[0].shape[0] for row in rows] == [9, 9, 9]


def test_a_training_goes_on_from_its_checkpoint(
    inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[int] = []
    on_train_start = EMA.on_train_start

    def record(self: EMA, trainer: Any, pl_module: Any) -> None:
        began.append(trainer.global_step)
        on_train_start(self, trainer, pl_module)

    monkeypatch.setattr(EMA, "on_train_start", record)
    config = "experiments/demo/tokenizer.yaml"
    fit = ("fit", "--config", config, *_SMALL, _NARROW[config])
    more = ("--trainer.max_steps=3", "--run_dir=runs/longer")
    _run(*fit, *more, "--ckpt_path", "runs/demo/tokenizer/checkpoints/last.ckpt")
    assert began == [2]
    saved = torch.load("runs/longer/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("fit", "--data.latentz=1"), "data.latentz: no such key in VideoDataModule. Did"),
        (("fit", "--trainer.max_step=3"), "trainer.max_step: no such key in Trainer. Did you mean"),
        (("fit", f"{_DENOISER}.size.width=abc"), "init_args.size.width = 'abc': expected a whole"),
        (("fit", f"{_DENOISER}.size.num_heads=3"), "denoiser.init_args.size.num_heads = 3: must"),
        (("fit", f"--{_SIZES}=[17x32x32,17x30x32]"), f"{_SIZES}[1] = '17x30x32': height 30"),
        (("fit", f"--{_SIZES}=[32x32]"), f"{_SIZES}[0]: '32x32' is not a video size"),
        (("fit", "--data.manifest=x/trian.jsonl"), "data.manifest = 'x/trian.jsonl': there is"),
        (("fit", "--data.latents=clips"), "data.latents: clips: no latent cache here"),
        (("fit", f"{_TOKENIZER}.checkpoint=x.ckpt"), "tokenizer.init_args.checkpoint = 'x.ckpt'"),
        (("fit", "--model.init_args.fps=9"), "model.init_args.fps = 9: is taken from data.fps"),
        (("fit", "--data.fps=${data.fsp}"), "Interpolation key"),
        (("fit", "--run_dir=runs/demo/text_to_video"), "holds runs/demo/text_to_video/checkpoints"),
        (("fit", "--ckpt_path=last"), "there is no file runs/new/checkpoints/last.ckpt"),
        (("fit", "--ckpt_path=best"), "ckpt_path = 'best': there is no file"),
        (("validate",), "validate needs trained weights"),
        (("predict", f"--ckpt_path={_CHECKPOINT}"), "latents.root is missing"),
        (("fit", "--config=experiments/demo/tokeniser.yaml"), "Did you mean experiments/demo/tok"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)  # fmt: skip
def test_a_mistake_is_one_message_before_anything_is_built(
    inside: Path,
    arguments: tuple[str, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    @functools.wraps(DiffusionSystem.__init__)
    def built(*_: Any, **__: Any) -> None:
        raise AssertionError("the system was built")

    monkeypatch.setattr(DiffusionSystem, "__init__", built)
    command, *rest = arguments
    new = () if any("--run_dir" in one for one in rest) else ("--run_dir=runs/new",)
    assert main([command, "--config", "experiments/demo/text_to_video.yaml", *new, *rest]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "INFO" not in line]
    messages = [line for line in errors if line.startswith(f"sora-lightning {command}: ")]
    assert len(messages) == 1
    assert said in messages[0]
    assert "Traceback" not in "\n".join(errors)
    assert not Path("runs/new").exists()


def test_a_text_to_video_training_with_frozen_encoders_samples_and_resumes_with_them_alone(
    inside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = (
        "experiments/demo/text_to_video.yaml",
        "experiments/text_to_video/text_encoders.yaml",
    )
    both = [part for config in configs for part in ("--config", config)]
    small = ("--model.init_args.denoiser.init_args.size.depth=1", *_SMALL, *_FEW)
    _run("fit", *both, *small)
    checkpoint = "runs/text_to_video/text_encoders/checkpoints/last.ckpt"
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert [name for name in saved if "digest" in name]
    assert not [name for name in saved if "network" in name or "shared" in name]
    num_cached = len(list(Path("runs/text_to_video/embeddings").rglob("*.safetensors")))
    prompt = ("--prompt=a red circle", "--num-steps=1", "--size=32x32", "--num-frames=9")
    make = ("sample", "--checkpoint", checkpoint, *prompt, f"--output={tmp_path / 'x.mp4'}")
    _run(*make)
    assert num_cached > 8
    Path("encoders/t5").rename("encoders/t5-first")
    t5_folder(Path("encoders/t5"), seed=1)
    more = ("--trainer.max_steps=3", "--ckpt_path=last")
    for command in (make, ("fit", *both, *small[:-3], *more)):
        assert main(command) == 2
        assert "PretrainedText(folder='encoders/t5') is " in capsys.readouterr().err
    shutil.rmtree("encoders/t5")
    assert main(make) == 2
    assert "encoders/t5: holds no config.json of a text encoder" in capsys.readouterr().err
    Path("encoders/t5-first").rename("encoders/t5")
    _run("fit", *both, *small[:-3], *more)


def test_sampling_with_a_tokenizer_is_refused(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = "runs/demo/tokenizer/checkpoints/last.ckpt"
    arguments = ("sample", "--checkpoint", checkpoint, "--prompt", "a", "--output", "x.mp4")
    assert main(arguments) == 2
    assert "holds a TokenizerSystem, not a DiffusionSystem" in capsys.readouterr().err
    assert not Path("x.mp4").exists()


def test_the_python_example_of_the_readme_runs(inside: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (_ROOT / "README.md").read_text(), re.DOTALL)
    assert len(example.splitlines()) <= 20
    names: dict[str, Any] = {}
    exec(example.replace("max_steps=1000", "max_steps=2, logger=False"), names)
    assert names["videos"].shape == (1, 3, 17, 32, 32)
    assert names["videos"].isfinite().all()
