"""Checkpoints, converted files and YAMLs build classes of known packages and run nothing else."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from evaluation.__main__ import main as evaluate
from evaluation.features.tiny import TinyConfig, TinyNetwork, save_tiny
from sora_lightning.__main__ import main
from sora_lightning.checkpoints import load_tokenizer
from sora_lightning.interop.pretrained import converted_tokenizer
from sora_lightning.systems import DiffusionSystem, TokenizerSystem
from sora_lightning.trust import check_evaluation, pop_trusted

Payload = Callable[[Path], dict[str, Any]]
_slow = pytest.mark.slow


def run(marker: Path) -> dict[str, Any]:
    """A configuration that makes ``marker`` when it is built."""
    init_args = {"args": f"touch {marker}", "shell": True}
    return {"class_path": "subprocess.Popen", "init_args": init_args}


def nested(marker: Path) -> dict[str, Any]:
    part = "sora_lightning.tokenizers.pretrained.ImageTokenizer"
    return {"tokenizer": {"class_path": part, "init_args": {"config": {"x": run(marker)}}}}


def reexported(marker: Path) -> dict[str, Any]:
    path = "sora_lightning.workflows.stages.subprocess.Popen"
    return {"tokenizer": run(marker) | {"class_path": path}}


def imported(marker: Path) -> dict[str, Any]:
    """A module in the current folder makes the file as soon as it is imported."""
    Path("payload.py").write_text(f"open({str(marker)!r}, 'w')\nclass Any: ...\n")
    return {"_class_path": "payload.Any", "tokenizer": {"class_path": "payload.Any"}}


def as_function(marker: Path) -> dict[str, Any]:
    imported(marker)
    return {"optimizer": "payload.Any"}


PAYLOADS: dict[str, Payload] = {
    "any": nested,
    "direct": lambda marker: {"tokenizer": run(marker)},
    "reexported": reexported,
    "imported": imported,
    "imported by a string": lambda marker: imported(marker) | {"tokenizer": "payload.Any"},
    "a string for a function": as_function,
}


def _name(request: pytest.FixtureRequest) -> str:
    return request.node.callspec.params["marker"]


@pytest.fixture(params=PAYLOADS)
def marker(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "payload", raising=False)
    return tmp_path / "ran"


@pytest.fixture
def spoil(marker: Path, request: pytest.FixtureRequest) -> Callable[[Path], Path]:
    def spoiled(checkpoint: Path) -> Path:
        content = torch.load(checkpoint, weights_only=True)
        payload = PAYLOADS[_name(request)]
        content["hyper_parameters"] |= payload(marker)
        path = marker.parent / f"spoiled{len(list(marker.parent.glob('*.ckpt')))}.ckpt"
        torch.save(content, path)
        return path

    return spoiled


@pytest.fixture(scope="module")
def diffusion_checkpoint(fit: Any, diffusion_model: Any, tmp_path_factory: Any) -> Path:
    run_dir = tmp_path_factory.mktemp("diffusion") / "run"
    return fit({"model": diffusion_model}, run_dir, "--trainer.max_steps", "2")


def test_a_checkpoint_runs_no_program_when_it_is_loaded(
    tokenizer_checkpoint: Path,
    diffusion_checkpoint: Path,
    spoil: Callable[[Path], Path],
    marker: Path,
    request: pytest.FixtureRequest,
) -> None:
    bad, bad_diffusion = spoil(tokenizer_checkpoint), spoil(diffusion_checkpoint)
    for load, path in (
        (load_tokenizer, bad),
        (TokenizerSystem.from_checkpoint, bad),
        (DiffusionSystem.from_checkpoint, bad_diffusion),
    ):
        sound = load is load_tokenizer and "optimizer" in PAYLOADS[_name(request)](marker)
        with nullcontext() if sound else pytest.raises(ValueError, match=str(path)):
            load(path)
        assert not marker.exists()


# Each way of loading meets all payloads above; the commands, which load by those, two of them.
_OTHERS = [name for name in PAYLOADS if name not in ("reexported", "imported by a string")]


@pytest.mark.parametrize(
    "marker",
    ["reexported", "imported by a string", *(pytest.param(one, marks=_slow) for one in _OTHERS)],
    indirect=True,
)
def test_no_command_runs_a_program_from_a_checkpoint(
    fit: Any,
    clips: dict[str, Path],
    tokenizer_model: Any,
    tokenizer_checkpoint: Path,
    diffusion_checkpoint: Path,
    spoil: Callable[[Path], Path],
    marker: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad, bad_diffusion = spoil(tokenizer_checkpoint), spoil(diffusion_checkpoint)
    prompt = ["--prompt", "a", "--size", "16x16", "--num-frames", "5", "--num-steps", "1"]
    sample = ["sample", *prompt, "--output", "x.mp4", "--checkpoint"]
    assert main([*sample, str(bad_diffusion)]) == 2
    assert (
        main([*sample, str(diffusion_checkpoint), "--guidance-weak-model", str(bad_diffusion)]) == 2
    )
    save_tiny(TinyNetwork(TinyConfig()), Path("tiny.pt"), {})
    evaluated = ["--checkpoint", str(bad_diffusion), "--protocol", "demo", "--networks", "tiny.pt"]
    assert evaluate([*evaluated, "--output", "report", "--reference", str(clips["train"])]) == 2
    assert capsys.readouterr().err.count(str(bad_diffusion)) >= 3
    few = ("--trainer.max_steps", "7")
    for command, *arguments in (
        ("validate", "--ckpt_path", str(bad)),
        ("fit", "--ckpt_path", str(bad), *few),
        ("fit", "--checkpoint.start_from", str(bad), *few),
    ):
        run_dir = marker.parent / f"{command}{arguments[0]}"
        with suppress(ValueError):  # refused, or only weights are taken from the file
            fit({"model": tokenizer_model}, run_dir, *arguments, command=command)
    assert not marker.exists()


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize(
    "file", ["checkpoint", *(pytest.param(one, marks=_slow) for one in ("weights", "pickle"))]
)
def test_every_command_refuses_a_file_that_unpickles_a_program(
    file: str,
    fit: Any,
    clips: dict[str, Path],
    tokenizer_model: Any,
    diffusion_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    marker, bad = tmp_path / "ran", tmp_path / "bad.ckpt"
    content = {"state_dict": {}, "hyper_parameters": {"x": Bomb(marker)}}
    if file == "pickle":
        bad.write_bytes(pickle.dumps(content))
    else:
        torch.save(content if file == "checkpoint" else {"x": Bomb(marker)}, bad)
    prompt = ["--prompt", "a", "--output", "x.mp4", "--num-steps", "1"]
    good = ["--checkpoint", str(diffusion_checkpoint)]
    scored = ["--protocol", "demo", "--reference", str(clips["train"]), "--output", "report"]
    for command, *arguments in (
        (main, "sample", *prompt, "--checkpoint", str(bad)),
        (main, "sample", *prompt, *good, "--guidance-weak-model", str(bad)),
        (main, "inspect", str(bad)),
        (main, "convert", "--input", str(bad), "--target", "diffusers", "--output", "out"),
        (evaluate, "--checkpoint", str(bad), *scored),
        (evaluate, *good, "--networks", str(bad), *scored),
    ):
        assert command(arguments) in (1, 2), arguments
        capsys.readouterr()
    for index, (command, *arguments) in enumerate(
        (
            ("validate", "--ckpt_path", str(bad)),
            ("predict", "--ckpt_path", str(bad)),
            ("fit", "--ckpt_path", str(bad)),
            ("fit", "--checkpoint.start_from", str(bad)),
        )
    ):
        with pytest.raises(ValueError, match=r"bad\.ckpt"):
            fit({"model": tokenizer_model}, tmp_path / str(index), *arguments, command=command)
    with pytest.raises(ValueError, match=r"bad\.ckpt"):
        load_tokenizer(bad)
    assert not marker.exists()


def test_a_converted_file_runs_no_program(marker: Path, request: pytest.FixtureRequest) -> None:
    payload = PAYLOADS[_name(request)](marker)
    parts = {"tokenizer": payload.get("tokenizer", "payload.Any")}
    metadata = {"sora_lightning": json.dumps({"parts": parts, "grid": None})}
    save_file({"x": torch.zeros(1)}, "converted.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="tokenizer"):
        converted_tokenizer(Path("converted.safetensors"))
    assert not marker.exists()


def test_a_yaml_runs_no_program_unless_its_author_is_trusted(
    fit: Any, tokenizer_model: Any, marker: Path, request: pytest.FixtureRequest
) -> None:
    payload = PAYLOADS[_name(request)](marker)
    class_path = payload.pop("_class_path", tokenizer_model["class_path"])
    model = {"class_path": class_path, "init_args": tokenizer_model["init_args"] | payload}
    # Where any value fits, the payload stays the plain dict that it is.
    plain = payload.get("tokenizer", {}) == nested(marker)["tokenizer"]
    with nullcontext() if plain else pytest.raises(ValueError, match="model"):
        fit({"model": model}, marker.parent / "run", "--trainer.max_steps", "1")
    assert not marker.exists()


def test_a_trusted_package_is_built(
    tmp_path: Path, tokenizer_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sentence names the flag, and with the flag it works."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    own = "from sora_lightning.tokenizers import ConvTokenizer\nclass Own(ConvTokenizer): ...\n"
    Path("my_models.py").write_text(own)
    content = torch.load(tokenizer_checkpoint, weights_only=True)
    content["hyper_parameters"]["tokenizer"]["class_path"] = "my_models.Own"
    torch.save(content, "own.ckpt")
    with pytest.raises(ValueError, match=r"own\.ckpt: my_models\.Own is not .* --trust my_models"):
        load_tokenizer(Path("own.ckpt"))
    assert pop_trusted(["sample", "--trust", "my_models", "--seed=1"]) == ["sample", "--seed=1"]
    assert type(load_tokenizer(Path("own.ckpt"))).__name__ == "Own"


def test_another_package_named_evaluation_is_refused_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_evaluation()
    other = tmp_path / "evaluation" / "__init__.py"
    other.parent.mkdir()
    other.write_text("raise RuntimeError('imported')")
    monkeypatch.delitem(sys.modules, "evaluation")
    monkeypatch.syspath_prepend(tmp_path)
    root = Path(__file__).parents[2]
    configs = ("demo/text_to_video", "text_to_video/scored")
    assert main(["fit", *(f"--config={root}/experiments/{name}.yaml" for name in configs)]) == 2
    said = f"the package evaluation that Python finds is {other}, not {root}/evaluation"
    assert said in capsys.readouterr().err
    monkeypatch.setattr("sora_lightning.trust.PACKAGE", tmp_path / "sora_lightning")
    with pytest.raises(ValueError, match="was overwritten by another distribution"):
        check_evaluation()
