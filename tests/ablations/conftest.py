"""A place with rendered clips, a base YAML whose trainings take seconds, and two deltas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sora_lightning.data.synthetic import write_dataset

DENOISER = "model.init_args.denoiser.init_args"
_LAYOUTS = "sora_lightning.layers.partitions"


def base() -> dict[str, Any]:
    tokenizer = {"latent_channels": 4, "widths": [4, 4], "blocks_per_level": 1, "patch": 4}
    return {
        "model": {
            "class_path": "sora_lightning.systems.DiffusionSystem",
            "init_args": {
                "tokenizer": {
                    "class_path": "sora_lightning.tokenizers.ConvTokenizer",
                    "init_args": {**tokenizer, "down_time": [True], "down_space": [True]},
                },
                "conditioner": {
                    "class_path": "sora_lightning.conditioning.TextConditioner",
                    "init_args": {"width": 16, "depth": 0, "num_rows": 64},
                },
                "denoiser": {
                    "class_path": "sora_lightning.denoisers.DiT",
                    "init_args": {
                        "size": {"depth": 2, "width": 32, "num_heads": 2},
                        "patch": [1, 1, 1],
                    },
                },
            },
        },
        "data": {
            "manifest": "data/train.jsonl",
            "val_manifest": "data/val.jsonl",
            "batching": {"sizes": ["9x32x32"], "pixels_per_batch": 19000},
            "fps": 8,
        },
        "trainer": {
            "max_steps": 2,
            "val_check_interval": 2,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
        },
    }


def ablation(**changes: Any) -> dict[str, Any]:
    arms = {name: {"configs": [f"{name}.yaml"]} for name in ("joint", "factorised")}
    return {"base": "base.yaml", "output": "out", "arms": arms, "seeds": [0, 1], **changes}


def write(name: str, values: dict[str, Any]) -> Path:
    path = Path(name)
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_dataset(folder, num_train=4, num_val=6, num_test=0)
    return folder


@pytest.fixture
def place(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("data").symlink_to(clips)
    write("base.yaml", base())
    for name, layout in (("joint", "Joint"), ("factorised", "FactorisedSelfAttention")):
        part = {"layout": {"class_path": f"{_LAYOUTS}.{layout}"}}
        write(f"{name}.yaml", {"model": {"init_args": {"denoiser": {"init_args": part}}}})
    return tmp_path
