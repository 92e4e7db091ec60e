"""A name on the hub stands for a pipeline: what is downloaded, and what is said offline."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sora_lightning.denoisers import pretrained_denoiser
from sora_lightning.systems import DiffusionSystem, Pipeline, PretrainedSystem

pytest.importorskip("diffusers")
hub = pytest.importorskip("huggingface_hub")
peft = pytest.importorskip("peft")
from tests.denoisers.pipelines import pipeline_folder  # noqa: E402

NAME = Path("owner/tiny-wan")
NEVER = ("pickled.bin", "code.py", "root.safetensors", "transformer/other.fp16.safetensors")
NEVER += ("text_encoder/pytorch_model.bin", "notes/config.json", "vae/code.py")


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where a stub of the hub puts what is asked for of its one repository."""
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    pipeline_folder("Wan", remote)
    shutil.rmtree(remote / "all", ignore_errors=True)
    (remote / "notes").mkdir()
    for name in NEVER:
        (remote / name).write_bytes(b"never asked for")

    def snapshot_download(name: str, *, allow_patterns: Any, ignore_patterns: Any) -> str:
        if name != str(NAME):
            raise hub.errors.LocalEntryNotFoundError("no connection\nand more")
        files = [str(path.relative_to(remote)) for path in remote.rglob("*") if path.is_file()]
        patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        for file in hub.utils.filter_repo_objects(files, **patterns):
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(remote / file, cache / file)
        return str(cache)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return cache


def _held(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_system_is_built_from_a_name_and_again_from_its_checkpoint(fetched: Path) -> None:
    lora = peft.LoraConfig(r=2, target_modules=["to_q"])
    system = PretrainedSystem(Pipeline(NAME, lora))
    parts = {"transformer", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json"}
    assert {name.partition("/")[0] for name in _held(fetched)} == parts
    assert not _held(fetched) & {*NEVER}
    content: dict[str, Any] = {"state_dict": system.state_dict(), "hyper_parameters": {}}
    system.on_save_checkpoint(content)
    assert content["hyper_parameters"]["pipeline"]["folder"] == str(NAME)
    torch.save(content, "last.ckpt")
    again = DiffusionSystem.from_checkpoint("last.ckpt")
    torch.testing.assert_close(again.state_dict(), system.state_dict())


def test_one_part_is_downloaded_alone_and_no_weights_for_a_plan(fetched: Path) -> None:
    with torch.device("meta"):
        pretrained_denoiser(NAME)
    assert _held(fetched) == {"model_index.json", "transformer/config.json"}
    denoiser = pretrained_denoiser(NAME, lora=peft.LoraConfig(r=2, target_modules=["to_q"]))
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert _held(fetched) == {"model_index.json", "transformer/config.json", weights}
    assert denoiser.specification["init_args"]["folder"] == str(NAME)


def test_offline_the_name_the_cache_and_the_remedy_are_said(fetched: Path) -> None:
    with pytest.raises(ValueError, match="neither in the cache") as caught:
        Pipeline(Path("Wan-AI/Wan2.1-T2V-1.3B-Diffusers"))
    said = str(caught.value)
    assert said.startswith("Wan-AI/Wan2.1-T2V-1.3B-Diffusers: no such folder, and as a name on the")
    assert f"cache {hub.constants.HF_HUB_CACHE} nor to be had (no connection): give a" in said
    assert said.endswith("by `hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers`")
    assert "\n" not in said


def test_a_path_below_a_folder_that_exists_is_no_name(fetched: Path) -> None:
    """A slip of the pen in a local path asks the hub for nothing."""
    Path("owner").mkdir()
    with pytest.raises(ValueError, match=r"tiny-wan': holds no model_index\.json of a diffusers"):
        Pipeline(NAME)
    assert not fetched.exists()
