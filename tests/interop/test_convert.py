"""The command ``convert``: a public file to ours and back, and what it refuses."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sora_lightning.__main__ import main
from sora_lightning.interop import Pretrained
from tests.interop.golden import Golden


def convert(source: str, target: str, before: Path, after: Path, *more: str) -> int:
    files = ["--input", str(before), "--output", str(after)]
    return main(["convert", "--source", source, "--target", target, *files, *more])


@pytest.mark.parametrize("key", [None, "ema"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_there_and_back_through_files(tmp_path: Path, key: str | None, suffix: str) -> None:
    weights = Golden.load("uvit_label").weights
    theirs, ours, back = tmp_path / "in.pth", tmp_path / "ours.safetensors", tmp_path / "back"
    torch.save(weights if key is None else {key: weights, "model": {}, "steps": 3}, theirs)
    assert convert("uvit", "sora-lightning", theirs, ours, "--num-heads=2") == 0
    built = Pretrained.load(ours).build()
    assert {name: type(module).__name__ for name, module in built.items()} == {
        "denoiser": "UViT",
        "conditioner": "LabelConditioner",
    }
    back = back.with_suffix(suffix)
    assert convert("sora-lightning", "uvit", ours, back) == 0
    returned = load_file(back) if suffix == ".safetensors" else torch.load(back)
    assert returned.keys() == weights.keys()
    assert all(torch.equal(returned[name], weights[name]) for name in weights)


def test_a_trainings_checkpoint_is_read_and_so_are_ddp_and_half_precision(tmp_path: Path) -> None:
    """As DiT's and SiT's ``train.py`` write them."""
    weights = Golden.load("dit").weights
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.pt"
    training = {
        "model": {},
        "ema": weights,
        "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "args": argparse.Namespace(model="DiT-S/2", global_batch_size=256),
    }
    files: list[tuple[dict, float]] = [
        (training, 0.0),
        ({f"module.{name}": tensor for name, tensor in weights.items()}, 0.0),
        ({f"module._orig_mod.{name}": tensor for name, tensor in weights.items()}, 0.0),
        ({name: tensor.half() for name, tensor in weights.items()}, 1e-3),
        ({name: tensor.bfloat16() for name, tensor in weights.items()}, 1e-2),
    ]
    for held, tolerance in files:
        torch.save(held, theirs)
        assert convert("dit", "sora-lightning", theirs, ours, "--num-heads=2") == 0
        network = Pretrained.load(ours).build()["denoiser"].state_dict()
        torch.testing.assert_close(
            network["blocks.0.mlp.0.weight"],
            weights["blocks.0.mlp.fc1.weight"],
            atol=tolerance,
            rtol=tolerance,
        )
    torch.save({**weights, "pos_embed": weights["pos_embed"].half() + 0.01}, theirs)
    assert convert("dit", "sora-lightning", theirs, ours, "--num-heads=2") == 2


def test_what_is_refused_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, ours = tmp_path / "in.pth", tmp_path / "ours.safetensors"

    def refusal(*arguments: object) -> str:
        assert convert(*arguments) == 2
        return capsys.readouterr().err

    assert "--source uvitt: Did you mean uvit?" in refusal("uvitt", "sora-lightning", file, ours)
    assert "nothing to convert" in refusal("uvit", "uvit", file, ours)
    assert "ends in .safetensors" in refusal("uvit", "sora-lightning", file, tmp_path / "a.pt")
    assert "no such file" in refusal("uvit", "sora-lightning", file, ours)
    file.write_bytes(b"no weights")
    assert "holds more than weights, or none" in refusal("uvit", "sora-lightning", file, ours)
    weights = Golden.load("uvit_label").weights
    torch.save({**weights, "extra.weight": torch.zeros(1)}, file)
    message = refusal("uvit", "sora-lightning", file, ours, "--num-heads=2")
    assert f"{file} as uvit: no rule takes: extra.weight" in message
    assert not ours.exists()
    save_file(weights, ours)
    assert "does not say which" in refusal("sora-lightning", "uvit", ours, file)
    ours.write_bytes(b"no weights")
    assert "not a safetensors file" in refusal("sora-lightning", "uvit", ours, file)


def test_a_file_cannot_ask_for_code_of_another_house() -> None:
    part = {"class_path": "os.system", "init_args": {"command": "true"}}
    with pytest.raises(ValueError, match=r"denoiser: os\.system is not built: a file may name"):
        Pretrained({"denoiser": part}, {}).build()
