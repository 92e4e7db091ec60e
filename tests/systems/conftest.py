from pathlib import Path

import pytest
import yaml

from sora_lightning.cli.sources import merge
from sora_lightning.cli.training import run_training
from sora_lightning.data.synthetic.render import write_dataset

TOKENIZER = {
    "class_path": "sora_lightning.tokenizers.ConvTokenizer",
    "init_args": {
        "latent_channels": 4,
        "widths": [8, 16],
        "down_time": [True],
        "down_space": [True],
        "patch": 4,
        "blocks_per_level": 1,
        "separable": True,
    },
}
MUON = {"class_path": "sora_lightning.systems.optimizers.MuonAdamW", "init_args": {"lr": 0.003}}
EMA = {"class_path": "sora_lightning.callbacks.EMA", "init_args": {"decay": 0.9}}


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """A handful of real mp4 files in several sizes, with their manifests."""
    return write_dataset(
        tmp_path_factory.mktemp("clips"), num_train=12, num_val=4, num_test=0, num_workers=1
    )


@pytest.fixture(scope="session")
def experiment(clips, tmp_path_factory):
    """Write the YAML of a run and return its path."""

    def write(config, run_dir):
        data = {
            "manifest": str(clips["train"]),
            "val_manifest": str(clips["val"]),
            "fps": 8,
            "batching": {
                "sizes": ["5x16x16", "5x24x16"],
                "pixels_per_batch": 4 * 5 * 16 * 16,
                "steps_per_epoch": 3,
            },
        }
        trainer = {
            "logger": False,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "accelerator": "cpu",
            "callbacks": [EMA],
        }
        config = {
            "run_dir": str(run_dir),
            "data": merge(data, config.get("data", {})),
            "trainer": trainer,
            "model": config["model"],
            "latents": {"root": str(Path(run_dir) / "latents")},
        }
        path = tmp_path_factory.mktemp("config") / "experiment.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return write


@pytest.fixture(scope="session")
def fit(experiment):
    """Run ``fit`` (or another command) on a configuration, as the command line does."""

    def run(config, run_dir, *arguments, command="fit"):
        run_training([command, "--config", str(experiment(config, run_dir)), *arguments])
        return Path(run_dir) / "checkpoints" / "last.ckpt"

    return run


@pytest.fixture(scope="session")
def tokenizer_model():
    return {
        "class_path": "sora_lightning.systems.TokenizerSystem",
        "init_args": {"tokenizer": TOKENIZER, "optimizer": MUON, "warmup_steps": 2},
    }


@pytest.fixture(scope="session")
def tokenizer_checkpoint(fit, tokenizer_model, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("tokenizer") / "run"
    return fit({"model": tokenizer_model}, run_dir, "--trainer.max_steps", "6")


@pytest.fixture(scope="session")
def diffusion_model(tokenizer_checkpoint):
    return {
        "class_path": "sora_lightning.systems.DiffusionSystem",
        "init_args": {
            "tokenizer": {
                "class_path": "sora_lightning.checkpoints.load_tokenizer",
                "init_args": {"checkpoint": str(tokenizer_checkpoint)},
            },
            "conditioner": {
                "class_path": "sora_lightning.conditioning.TextConditioner",
                "init_args": {"width": 16, "depth": 1, "num_heads": 2},
            },
            "denoiser": {
                "class_path": "sora_lightning.denoisers.DiT",
                "init_args": {
                    "size": {"depth": 2, "width": 24, "num_heads": 2},
                    "patch": [1, 1, 1],
                },
            },
            "optimizer": MUON,
            "warmup_steps": 2,
        },
    }
