"""The folder of a diffusers pipeline gives a whole system, and keeps what does not train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sora_lightning.conditioning import (
    CachedText,
    ConcatConditioning,
    FirstFrameThenGrey,
    HunyuanVideoText,
    PretrainedText,
    TextConditioner,
    TimeZeroConditioning,
)
from sora_lightning.diffusion import Epsilon, LogitNormal, SquaredError, Uniform, V, Velocity
from sora_lightning.interop.finetuned import write_diffusers
from sora_lightning.systems import DiffusionSystem, Pipeline, PretrainedSystem
from sora_lightning.systems.draws import GroupDraws, make_rng
from sora_lightning.types import VideoBatch

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
from tests.denoisers.pipelines import PARTS, pipeline_folder  # noqa: E402

QUICK = ("LTX", "I2VGenXL", "WanImageToVideo")
SIZES = {
    "Wan": (9, 16, 16),
    "WanImageToVideo": (9, 16, 16),
    "LTX": (9, 64, 64),
    "CogVideoX": (9, 16, 16),
}
SIZES |= {"HunyuanVideo": (9, 64, 64), "Latte": (3, 16, 16)}
# Most tokens, whether padding is read, and layers of CLIP that are skipped.
TEXT = {
    "Wan": (512, False, 0),
    "WanImageToVideo": (512, False, 0),
    "LTX": (128, True, 0),
    "CogVideoX": (226, True, 0),
}
TEXT |= {"Latte": (120, False, 0), "TextToVideoSD": (77, True, 0), "I2VGenXL": (77, True, 1)}
FRAMES = {"I2VGenXL": ConcatConditioning, "WanImageToVideo": FirstFrameThenGrey}
PREDICTIONS = {"CogVideoX": V, "Latte": Epsilon, "TextToVideoSD": Epsilon, "I2VGenXL": V}


def _system(folder: Path, **pipeline: Any) -> PretrainedSystem:
    lora = peft.LoraConfig(r=2, target_modules=["to_q"])
    torch.manual_seed(0)
    return PretrainedSystem(Pipeline(folder, lora=lora, **pipeline))


def _save(system: DiffusionSystem, file: Path) -> Path:
    content: dict[str, Any] = {"state_dict": system.state_dict(), "hyper_parameters": {}}
    system.on_save_checkpoint(content)
    torch.save(content, file)
    return file


def _batch(name: str) -> VideoBatch:
    video = torch.rand(1, 3, *SIZES.get(name, (3, 16, 16))) * 2 - 1
    return VideoBatch(["a red circle"], 8.0, ["0"], video=video)


def _slow(name: str) -> Any:
    return pytest.param(name, marks=[pytest.mark.slow] if name not in QUICK else [])


@pytest.mark.parametrize("name", map(_slow, PARTS))
def test_a_folder_gives_every_part_and_keeps_what_does_not_train(name: str, tmp_path: Path) -> None:
    pipeline_folder(name, tmp_path)
    system = _system(tmp_path)
    text = system.conditioner
    if name == "HunyuanVideo":
        assert isinstance(text, HunyuanVideoText)
        assert (text.max_tokens, text.skipped_layers) == (256, 2)
    else:
        assert isinstance(text, PretrainedText)
        assert (text.max_tokens, text.padded, text.skipped_layers) == TEXT[name]
    assert isinstance(system.objective, SquaredError)
    prediction = PREDICTIONS.get(name, Velocity)
    assert isinstance(system.objective.process.prediction, prediction)
    assert type(system.time) is (LogitNormal if prediction is Velocity else Uniform)
    assert type(system.known_frames) is FRAMES.get(name, TimeZeroConditioning)
    system.losses(_batch(name), GroupDraws([make_rng(torch.device("cpu"), 0)], 1)).sum().backward()
    trained = {n for n, p in system.named_parameters() if p.grad is not None}
    assert trained
    assert all(".lora_" in n for n in trained)
    held = set(system.state_dict())
    digests = {n for n in held if n.endswith(".digest")}
    assert held == trained | digests
    again = DiffusionSystem.from_checkpoint(_save(system, tmp_path / "last.ckpt"))
    assert isinstance(again, PretrainedSystem)
    video = _batch(name).pixels
    torch.testing.assert_close(again.tokenizer.encode(video), system.tokenizer.encode(video))
    torch.testing.assert_close(again.state_dict(), system.state_dict())


def test_parts_are_exchanged_and_described_by_the_checkpoint(tmp_path: Path) -> None:
    pipeline_folder("Wan", tmp_path)
    words = TextConditioner(16, depth=0)
    system = PretrainedSystem(Pipeline(tmp_path), conditioner=words, time=Uniform(), fps=12.0)
    assert system.conditioner is words
    assert all(parameter.requires_grad for parameter in system.denoiser.parameters())
    content = torch.load(_save(system, tmp_path / "last.ckpt"), weights_only=True)
    parts = content["hyper_parameters"]
    missing = {name for name, value in parts.items() if value is None}
    assert missing == {"objective", "known_frames", "tokenizer", "denoiser"}
    assert {"conditioner.embedding.weight", "tokenizer.digest"} < content["state_dict"].keys()
    again = DiffusionSystem.from_checkpoint(tmp_path / "last.ckpt")
    assert isinstance(again.conditioner, TextConditioner)
    assert again.time == Uniform()
    assert again.fps == 12
    torch.testing.assert_close(again.state_dict(), system.state_dict())
    cached = Pipeline(tmp_path, embeddings=tmp_path / "embeddings").conditioner()
    assert isinstance(cached, CachedText)


@torch.no_grad()
def test_adapters_that_diffusers_does_not_load_are_written_merged(tmp_path: Path) -> None:
    pipeline_folder("Latte", tmp_path)
    system = _system(tmp_path)
    for parameter in system.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=0.3)
    checkpoint = _save(system, tmp_path / "last.ckpt")
    write_diffusers(checkpoint, tmp_path / "out")
    inputs = torch.randn(1, 4, 3, 4, 4), torch.tensor([499]), torch.randn(1, 5, 16)
    kind = diffusers.LatteTransformer3DModel
    written, before = (
        kind.from_pretrained(tmp_path / one) for one in ("out/transformer", "transformer")
    )
    expected = system.eval().denoiser.network(*inputs).sample
    assert (expected - before(*inputs).sample).abs().max() > 1e-3
    torch.testing.assert_close(written(*inputs).sample, expected, atol=1e-5, rtol=1e-5)


def test_a_pipeline_of_two_transformers_is_refused(tmp_path: Path) -> None:
    second = '"transformer_2": ["diffusers", "WanTransformer3DModel"]'
    (tmp_path / "model_index.json").write_text(f'{{"_class_name": "WanPipeline", {second}}}')
    with pytest.raises(ValueError, match="holds a WanPipeline of two transformers for early and"):
        Pipeline(tmp_path)
