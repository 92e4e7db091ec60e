"""Rendered scenes whose content is known, and a small dataset with a judge trained on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import UInt8

from evaluation.protocol import Protocol, load_protocol
from evaluation.train_tiny import TinyTraining, train_tiny
from evaluation.videos import cover, nearest_size
from sora_lightning.data.scenes import Scene, Triple, can_share, captions, random_scene, triples
from sora_lightning.data.synthetic import render, write_dataset

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
    return Known(cover(video, *nearest_size(video, SIZES)), prompt, scene)


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
def judge(dataset: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a judge that has hardly been trained."""
    path = tmp_path_factory.mktemp("judge") / "judge.pt"
    training = TinyTraining(num_steps=2, batch_size=8)
    train_tiny(dataset["train"], path, dataset["val"], load_protocol("demo").clips, training)
    return path


@pytest.fixture
def protocol() -> Protocol:
    return load_protocol("demo")
