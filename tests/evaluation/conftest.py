"""Rendered scenes whose content is known, and a small dataset with a networks trained on it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from jaxtyping import UInt8

from evaluation.__main__ import main
from evaluation.inputs import cover, nearest_size, read_entries, read_video
from evaluation.protocol import Protocol, load_protocol
from evaluation.train_tiny import TinyTraining, train_tiny
from sora_lightning.cli.training import run_training
from sora_lightning.data.decoding.encode import write_video
from sora_lightning.data.synthetic.render import render, write_dataset
from sora_lightning.data.synthetic.scenes import (
    Scene,
    Triple,
    can_share,
    captions,
    random_scene,
    triples,
)

SIZES = ((32, 32), (24, 40), (40, 24))


@dataclass(frozen=True)
class Known:
    """A rendered clip of 17 frames at 8 fps, its prompt, and the truth about it."""

    video: UInt8[np.ndarray, "F H W 3"]
    prompt: str
    scene: Scene


def draw(content: Sequence[Triple], rng: np.random.Generator) -> Known:
    scene = random_scene(content, rng)
    frames = render(scene)
    video = frames[(np.arange(17) * scene.fps / 8).astype(int).clip(max=len(frames) - 1)]
    wordings = captions(scene, rng)
    prompt = wordings[rng.integers(len(wordings))]
    return Known(cover(video, *nearest_size(video.shape[1:3], SIZES)), prompt, scene)


@pytest.fixture(scope="session")
def known() -> list[Known]:
    """Every combination of shape, colour and direction alone, and 28 clips of two shapes."""
    rng = np.random.default_rng(0)
    content = triples(held_out=True) + triples(held_out=False)
    pairs = []
    while len(pairs) < 28:
        first, second = (content[i] for i in rng.integers(len(content), size=2))
        if can_share(first, second):
            pairs.append([first, second])
    return [draw(shapes, rng) for shapes in [[triple] for triple in content] + pairs]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("dataset")
    return write_dataset(root, num_train=16, num_val=8, num_test=20, num_workers=1)


@pytest.fixture(scope="session")
def networks(dataset: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a networks that has hardly been trained."""
    path = tmp_path_factory.mktemp("networks") / "networks.pt"
    training = TinyTraining(num_steps=2, batch_size=8)
    train_tiny(dataset["train"], path, dataset["val"], load_protocol("demo").clips, training)
    return path


def write_samples(folder: Path, reference: Path, backwards: int) -> Path:
    """Real clips in the place of generated ones, the first few of them playing backwards."""
    folder.mkdir()
    rows = []
    for index, entry in enumerate(read_entries(reference)):
        video = read_video(entry.file, 17, 8.0)
        video = cover(video, *nearest_size(video.shape[1:3], SIZES))
        write_video(folder / f"{index}.mp4", video[::-1] if index < backwards else video, 8)
        row = {"path": f"{index}.mp4", "prompt": entry.prompt, "seed": index}
        rows.append(row | {"num_steps": 7, "checkpoint_sha256": "0" * 64})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def samples(dataset: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_samples(tmp_path_factory.mktemp("samples") / "s", dataset["test"], backwards=4)


@pytest.fixture(scope="session")
def evaluate(
    dataset: dict[str, Path], networks: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, dict[str, Any]]]:
    def run(*arguments: object) -> tuple[Path, dict[str, Any]]:
        """The folder of the report, a new one unless ``--output`` is given, and what it holds."""
        given = list(arguments)
        if "--output" not in given:
            given += ["--output", tmp_path_factory.mktemp("report")]
        places = ["--reference", dataset["test"], "--networks", networks]
        assert main([str(part) for part in [*places, *given]]) == 0
        output = Path(str(given[given.index("--output") + 1]))
        return output, json.loads((output / "report.json").read_text())

    return run


@pytest.fixture(scope="session")
def checkpoint(dataset: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-to-video model after one step, on a tokenizer after one step."""
    root = tmp_path_factory.mktemp("model")

    def fit(name: str, system: str, **init_args: Any) -> Path:
        clips = str(dataset["train"])
        batching = {"sizes": ["17x32x32"], "pixels_per_batch": 2 * 17 * 32 * 32}
        data = {"manifest": clips, "val_manifest": clips, "fps": 8, "batching": batching}
        trainer = {"logger": False, "max_steps": 1, "limit_val_batches": 1, "accelerator": "cpu"}
        config = {
            "run_dir": str(root / name),
            "data": data,
            "trainer": trainer | {"enable_progress_bar": False, "enable_model_summary": False},
            "model": part(f"systems.{system}", optimizer=optimizer, **init_args),
        }
        (root / f"{name}.yaml").write_text(yaml.safe_dump(config))
        run_training(["fit", "--config", str(root / f"{name}.yaml")])
        return root / name / "checkpoints" / "last.ckpt"

    def part(class_path: str, **init_args: Any) -> dict[str, Any]:
        return {"class_path": f"sora_lightning.{class_path}", "init_args": init_args}

    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}
    space = {"widths": [8, 16], "down_space": [True], "patch": 4, "blocks_per_level": 1}
    tokenizer = part("tokenizers.ConvTokenizer", latent_channels=4, down_time=[True], **space)
    trained = fit("tokenizer", "TokenizerSystem", tokenizer=tokenizer)
    return fit(
        "text_to_video",
        "DiffusionSystem",
        tokenizer=part("checkpoints.load_tokenizer", checkpoint=str(trained)),
        conditioner=part("conditioning.TextConditioner", width=16, depth=1, num_heads=2),
        denoiser=part(
            "denoisers.DiT", size={"depth": 1, "width": 16, "num_heads": 2}, patch=[1, 1, 1]
        ),
    )


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with random weights and a tokenizer of single letters."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{one}</w>" for one in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.save_pretrained(folder)
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    marks = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = small | {"vocab_size": len(words), "max_position_embeddings": 12} | marks
    vision = small | {"image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def protocol() -> Protocol:
    return load_protocol("demo")
