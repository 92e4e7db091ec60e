"""Recipes of fine-tuning: at their real sizes on the meta device, and whole with tiny weights."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from evaluation.__main__ import main as evaluate
from evaluation.train_tiny import TinyTraining
from sora_lightning.__main__ import main
from sora_lightning.cli.training_cost import build_training, num_parameters
from sora_lightning.data.decoding.readers import read_frames
from sora_lightning.data.synthetic.render import write_dataset
from sora_lightning.systems import DiffusionSystem
from tests.conditioning.text_folders import words_tokenizer
from tests.denoisers.pipelines import PARTS, RECIPES, pipeline_folder

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

_ROOT = Path(__file__).resolve().parents[1]
# What the public configurations have beside the defaults of diffusers' classes.
REAL: dict[str, dict[str, Any]] = {
    "wan": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "ltx": {},
    "cogvideox": {},
    "i2vgen_xl": {},
}
# Of the text and image encoders of the first three, and of OpenCLIP's ViT-H.
XXL = {
    **{"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
    **{"feed_forward_proj": "gated-gelu"},
}
STABLE_DIFFUSION_VAE = {
    **{"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
    **{"down_block_types": ("DownEncoderBlock2D",) * 4},
    **{"up_block_types": ("UpDecoderBlock2D",) * 4},
}
VIT_H: dict[str, Any] = {
    "text": {
        **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24},
        **{"num_attention_heads": 16, "projection_dim": 1024},
    },
    "vision": {
        **{"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32},
        **{"num_attention_heads": 16, "patch_size": 14, "projection_dim": 1024},
    },
}
# Parameters of the network in billions as its authors give them (I2VGen-XL: of its file), and
# those of the adapters in millions: rank 32 (CogVideoX 64) at both sides of each projection of
# attention.
SIZES = {"wan": (1.42, 23.6), "ltx": (1.92, 29.4), "cogvideox": (1.69, 29.5)}
SIZES |= {"i2vgen_xl": (1.42, 13.29)}


TARGETS = {f"{name}.weight" for name in ("q", "k", "v", "out.0")}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "experiments").symlink_to(_ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    write_dataset(Path("clips"), num_train=8, num_val=2, num_test=2, num_workers=1)
    return tmp_path


def _real_folder(recipe: str, folder: Path) -> None:
    """Configurations of the public pipeline, without weights."""
    text, (vae, _), (network, _), (scheduler, config) = PARTS[RECIPES[recipe]]
    with torch.device("meta"):
        vae(**(STABLE_DIFFUSION_VAE if text == "CLIP" else {})).save_config(folder / "vae")
        part = "unet" if text == "CLIP" else "transformer"
        network(**REAL[recipe]).save_config(folder / part)
    scheduler(**config).save_pretrained(folder / "scheduler")
    if text == "CLIP":
        made = transformers.CLIPTextConfig(**VIT_H["text"])
        tower = transformers.CLIPVisionConfig(**VIT_H["vision"])
        tower.save_pretrained(folder / "image_encoder")
    else:
        made = getattr(transformers, f"{text}Config")(**XXL)
    made.save_pretrained(folder / "text_encoder")
    words_tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": f"{RECIPES[recipe]}Pipeline"})
    )


@pytest.mark.parametrize(
    "recipe", [pytest.param(one, marks=[pytest.mark.slow] * (one != "ltx")) for one in RECIPES]
)
@pytest.mark.filterwarnings("ignore")
def test_a_recipe_builds_at_the_public_size(recipe: str, workplace: Path) -> None:
    _real_folder(recipe, Path("models", recipe))
    training = build_training(["--config", f"experiments/finetune/{recipe}.yaml"])
    system = training.system
    assert isinstance(system, DiffusionSystem)
    adapters = num_parameters(training)
    whole = sum(p.numel() for p in system.denoiser.parameters()) - adapters
    billions, millions = SIZES[recipe]
    assert whole / 1e9 == pytest.approx(billions, rel=0.01)
    assert adapters / 1e6 == pytest.approx(millions, rel=0.01)
    assert system.conditioner.width == (1024 if recipe == "i2vgen_xl" else 4096)


def _rename(manifest: Path) -> None:
    """Captions as of one's own clips: not those of the demo, which has scores of its own."""
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["caption"] = f"the moon behind dark trees, take {number}"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _quick(name: str) -> Any:
    return pytest.param(name, marks=[] if name == "wan" else [pytest.mark.slow])


@pytest.mark.parametrize("recipe", map(_quick, RECIPES))
@pytest.mark.filterwarnings("ignore")
def test_a_recipe_runs_from_clips_to_adapters_samples_and_scores(
    recipe: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = partial(TinyTraining, num_steps=2, batch_size=8)
    monkeypatch.setattr("evaluation.own_clips.TinyTraining", quick)
    for split in ("train", "test"):
        _rename(Path(f"clips/{split}.jsonl"))
    pipeline_folder(RECIPES[recipe], Path("models", recipe))
    config, run = f"experiments/finetune/{recipe}.yaml", Path("runs/finetune", recipe)
    frames, height, width = {"ltx": (9, 64, 64), "i2vgen_xl": (4, 32, 32)}.get(recipe, (9, 32, 32))
    callbacks = yaml.safe_load(Path(config).read_text())["trainer"]["callbacks"]
    for sampled in callbacks[1:]:
        sampled["init_args"]["size"] = f"{frames}x{height}x{width}"
        sampled["init_args"]["sampling"]["num_steps"] = 2
    Path("small.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    small = (
        f"--data.batching.sizes=[{frames}x{height}x{width}]",
        f"--data.batching.pixels_per_batch={frames * height * width}",
        "--data.fps=8",
        "--trainer.max_steps=3",
        "--trainer.val_check_interval=12",
        "--trainer.precision=32-true",
        "--trainer.log_every_n_steps=1",
    )
    both = ("--config", config, "--config", "small.yaml", *small)
    assert main(["predict", *both]) == 0
    assert main(["fit", *both, f"--data.latents={run}/latents"]) == 0
    checkpoint = ("--checkpoint", f"{run}/checkpoints/last.ckpt")
    size = (f"--size={height}x{width}", f"--num-frames={frames}", "--num-steps=2")
    sample = ("--prompt", "a red circle moves left", *size, "--output=video.mp4")
    image = ("--task=animate", "--video=clips/test/00000.mp4") if recipe == "i2vgen_xl" else ()
    assert main(["sample", *checkpoint, *sample, *image]) == 0
    assert read_frames(Path("video.mp4"))[0].shape == (frames, height, width, 3)
    scored = ("--reference=clips/train.jsonl", "--output=report")
    assert evaluate([*checkpoint, *scored]) == 0
    scores = json.loads(Path("report/report.json").read_text())["scores"]
    assert {"fvd-tiny", "clip_score-tiny", "flicker", "tokenizer/psnr"} <= scores.keys()
    convert = ("--source=sora-lightning", "--target=diffusers", "--output=lora")
    assert main(["convert", *convert, "--input", checkpoint[1]]) == 0
    if recipe == "i2vgen_xl":  # diffusers loads no adapters of it: they are merged
        kind = diffusers.I2VGenXLUNet
        written = kind.from_pretrained("lora/unet").state_dict()
        before = kind.from_pretrained(f"models/{recipe}/unet").bfloat16().float().state_dict()
        changed = {name for name in before if not torch.equal(written[name], before[name])}
        assert {name.split(".to_")[-1] for name in changed} == TARGETS
        return
    pipeline = getattr(diffusers, f"{RECIPES[recipe]}Pipeline").from_pretrained(f"models/{recipe}")
    pipeline.load_lora_weights("lora")
    assert pipeline.get_list_adapters()["transformer"]
