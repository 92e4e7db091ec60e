"""A checkpoint says what made it, without running anything of its own."""

from __future__ import annotations

import json
import pickle
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml

from sora_lightning.__main__ import main
from sora_lightning.checkpoints import load_tokenizer


def test_inspect_prints_what_made_a_checkpoint(
    tokenizer_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(tokenizer_checkpoint), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    content = torch.load(tokenizer_checkpoint, weights_only=True)
    assert found["system"].endswith(".TokenizerSystem")
    assert (found["step"], found["bytes"]) == (
        content["global_step"],
        tokenizer_checkpoint.stat().st_size,
    )
    assert found["tokenizer"] == load_tokenizer(tokenizer_checkpoint).fingerprint()
    values = sum(x.numel() for x in content["state_dict"].values() if isinstance(x, torch.Tensor))
    assert sum(found["values"].values()) == values
    assert found["versions"]["torch"] == version("torch")
    config = yaml.safe_load((tokenizer_checkpoint.parents[1] / "config.yaml").read_text())
    assert found["configuration"] == config
    assert found["seed"] == config["seed_everything"]
    assert found["data"]["data.fps"] == "8.0"
    assert len(found["data"]["fingerprint"]) >= 16
    assert main(["inspect", str(tokenizer_checkpoint)]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == found


class Evil:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("ran"),)


def test_inspect_unpickles_no_object_and_builds_no_foreign_class(
    tokenizer_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    content = torch.load(tokenizer_checkpoint, weights_only=True)
    torch.save({**content, "more": Evil()}, "pickle.ckpt", pickle_module=pickle)
    popen = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "ran"]}}
    content["hyper_parameters"]["tokenizer"] = popen
    torch.save(content, "class.ckpt")
    for name in ("pickle.ckpt", "class.ckpt"):
        assert main(["inspect", name]) == 2
        assert name in capsys.readouterr().err
    assert not Path("ran").exists()
