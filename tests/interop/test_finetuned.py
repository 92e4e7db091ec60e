"""What a fine-tuned public model is written as: its pipeline samples from it what we do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from sora_lightning.conditioning import PretrainedText, TextConditioner
from sora_lightning.diffusion import ClassifierFreeGuidance, euler
from sora_lightning.generation import SamplingConfig
from sora_lightning.generation.generator import seeded_noise
from sora_lightning.generation.sampling_config import GuidanceConfig
from sora_lightning.interop.finetuned import write_diffusers
from sora_lightning.systems import DiffusionSystem, Pipeline, PretrainedSystem
from sora_lightning.types import TokenGrid

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
from tests.denoisers.pipelines import pipeline_folder  # noqa: E402

PROMPTS = ["a red circle moves left", "a blue square"]
# Pixels and latents of a clip that each network takes.
CLIPS = {
    "Wan": ((9, 16, 32), TokenGrid(3, 4, 8)),
    "LTX": ((17, 64, 96), TokenGrid(3, 2, 3)),
    "CogVideoX": ((9, 16, 16), TokenGrid(3, 4, 4)),
}
TOKENS = {"Wan": 512, "LTX": 128, "CogVideoX": 226}
LORA = {"r": 4, "target_modules": ["to_q", "to_out.0"]}
RANKS = {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 16}}


def _trained(folder: Path, lora: dict[str, Any] | None = None, **parts: Any) -> Path:
    """Return the checkpoint of a system whose weights are others than those of the folder."""
    made = None if lora is None else peft.LoraConfig(**lora)
    system = PretrainedSystem(Pipeline(folder, made), fps=25.0, **parts)
    torch.manual_seed(1)
    for name, parameter in system.denoiser.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    content: dict[str, Any] = {"state_dict": system.state_dict(), "hyper_parameters": {}}
    system.on_save_checkpoint(content)
    torch.save(content, folder / "last.ckpt")
    return folder / "last.ckpt"


def _loaded(name: str, folder: Path) -> Any:
    """diffusers' pipeline, whose text encoder has weights in bfloat16 as ours has."""
    pipeline = getattr(diffusers, f"{name}Pipeline").from_pretrained(folder)
    pipeline.text_encoder.bfloat16().float()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _theirs(pipeline: Any, name: str) -> Tensor:
    """Return the latents that a pipeline samples from our noise."""
    (frames, height, width), grid = CLIPS[name]
    noise, shape = seeded_noise([1, 2], 4, grid), {"f": grid.f, "h": grid.h, "w": grid.w}
    given = {
        "Wan": noise,
        "LTX": rearrange(noise, "b c f h w -> b (f h w) c"),
        "CogVideoX": rearrange(noise, "b c f h w -> b f c h w"),
    }
    latents = pipeline(
        PROMPTS, num_frames=frames, height=height, width=width, num_inference_steps=4,
        guidance_scale=3.0, latents=given[name], output_type="latent",
        max_sequence_length=TOKENS[name],
    ).frames  # fmt: skip
    if name == "CogVideoX":
        return rearrange(latents, "b f c h w -> b c f h w")
    return rearrange(latents, "b (f h w) c -> b c f h w", **shape) if name == "LTX" else latents


def _ours(system: DiffusionSystem, name: str, pipeline: Any) -> Tensor:
    generator = system.video_generator(
        SamplingConfig(num_steps=4, guidance=GuidanceConfig(scale=3.0))
    )
    assert isinstance(system.conditioner, PretrainedText)
    system.conditioner.network.float()
    if name != "Wan":
        return generator.latents(PROMPTS, CLIPS[name][1], [1, 2])
    text, noise = system.conditioner, seeded_noise([1, 2], 4, CLIPS[name][1])
    guided = ClassifierFreeGuidance(system.denoiser, text.null(2), 3.0)
    times = pipeline.scheduler.sigmas  # diffusers shifts them twice
    return euler(guided, noise, times, text(PROMPTS), system.objective.process)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("Wan", None),
        ("CogVideoX", None),
        ("Wan", LORA | RANKS | {"use_dora": True}),
        ("LTX", LORA | RANKS),
        pytest.param("LTX", None, marks=pytest.mark.slow),
        pytest.param("CogVideoX", LORA | {"use_dora": True}, marks=pytest.mark.slow),
    ],
)
def test_the_pipeline_samples_what_we_do(
    name: str, lora: dict[str, Any] | None, tmp_path: Path
) -> None:
    """A model that trained whole is the folder of a pipeline, adapters a file for one."""
    pipeline_folder(name, tmp_path / "public")
    checkpoint, written = _trained(tmp_path / "public", lora), tmp_path / "written"
    assert f"{name}Pipeline" in write_diffusers(checkpoint, written)
    pipeline = _loaded(name, tmp_path / "public" if lora else written)
    without = _theirs(_loaded(name, tmp_path / "public"), name)
    if lora:
        pipeline.load_lora_weights(written)
    theirs = _theirs(pipeline, name)
    ours = _ours(DiffusionSystem.from_checkpoint(checkpoint), name, pipeline)
    assert (theirs - without).abs().max() > 1e-2
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_weights_that_did_not_train_are_linked(tmp_path: Path) -> None:
    pipeline_folder("Wan", tmp_path / "public")
    (tmp_path / "public/original.safetensors").write_bytes(b"what no part names")
    blob = tmp_path / "blob"  # as in the hub's cache
    weights = tmp_path / "public/text_encoder/model.safetensors"
    weights.rename(blob)
    weights.symlink_to(blob)
    write_diffusers(_trained(tmp_path / "public"), tmp_path / "out")
    linked = tmp_path / "out/text_encoder/model.safetensors"
    assert os.path.samefile(linked, blob)
    trained = next((tmp_path / "out/transformer").glob("*.safetensors"))
    (readable := tmp_path / "readable").touch()
    assert trained.stat().st_mode == readable.stat().st_mode
    assert not linked.is_symlink()
    config = Path("vae/config.json")
    assert not os.path.samefile(tmp_path / "out" / config, tmp_path / "public" / config)
    folders = {"scheduler", "text_encoder", "tokenizer", "transformer", "vae", "model_index.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == folders


def test_beside_another_text_encoder_the_network_alone_is_written(tmp_path: Path) -> None:
    """The pipeline could not use it."""
    pipeline_folder("Wan", tmp_path)
    checkpoint = _trained(tmp_path, conditioner=TextConditioner(16, depth=0))
    line = write_diffusers(checkpoint, tmp_path / "out")
    assert "WanTransformer3DModel, in place of that in a pipeline's folder" in line
    assert diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "out").config.in_channels == 4
