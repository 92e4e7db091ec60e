"""Scores of a real training on two ranks (gloo), started by the command line as a user starts it:
they are those of one rank, and so is every video that they are made of.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from evaluation.features import TinyFile
from evaluation.training_scores import FVD
from sora_lightning.data.synthetic.render import write_dataset

pytestmark = pytest.mark.slow
PROMPTS = [f"a red circle moves left {word}" for word in "abcdefghi"]


class Kept(FVD):
    """Writes every video that it is given, by its id and the rank that made it."""

    def __init__(self, folder: str, reference: str) -> None:
        super().__init__(TinyFile("random"), Path(reference), cache=Path(folder) / "features")
        self.folder = Path(folder)
        self.name = "kept"

    def update(self, videos: Tensor, ids: Sequence[int]) -> None:
        super().update(videos, ids)
        rank = os.environ.get("LOCAL_RANK", "0")
        for index, video in zip(ids, videos, strict=True):
            torch.save(video, self.folder / f"{index}-{rank}.pt")


def part(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": init_args}


def config(folder: Path, clips: Path, devices: int, strategy: Any) -> dict[str, Any]:
    """One step at rate 0: the weights that are scored are those that the seed drew."""
    lightning = "sora_lightning"
    scored = part(
        f"{lightning}.callbacks.ScoreVideos",
        scores=[
            part(
                "tests.callbacks.test_scores_two_ranks.Kept",
                folder=str(folder / "videos"),
                reference=str(clips),
            )
        ],
        prompts=PROMPTS,
        size="5x16x16",
        sampling={"num_steps": 2},
        batch_size=2,
    )
    tokenizer = part(
        f"{lightning}.tokenizers.ConvTokenizer",
        latent_channels=4,
        widths=[8, 16],
        down_time=[True],
        down_space=[True],
        patch=4,
        blocks_per_level=1,
    )
    small: dict[str, Any] = {"width": 16, "depth": 1, "num_heads": 2}
    model = part(
        f"{lightning}.systems.DiffusionSystem",
        tokenizer=tokenizer,
        conditioner=part(f"{lightning}.conditioning.TextConditioner", **small),
        denoiser=part(f"{lightning}.denoisers.DiT", patch=[1, 1, 1], size=small),
        optimizer=part("torch.optim.SGD", lr=0.0),
    )
    trainer = {
        "max_steps": 1,
        "val_check_interval": 1,
        "num_sanity_val_steps": 0,
        "accelerator": "cpu",
        "devices": devices,
        "strategy": strategy,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [scored],
    }
    data = {
        "manifest": str(clips),
        "val_manifest": str(clips),
        "fps": 8,
        "batching": {"sizes": ["5x16x16"], "pixels_per_batch": 5 * 16 * 16},
    }
    return {
        "seed_everything": 3,
        "run_dir": str(folder / "run"),
        "data": data,
        "trainer": trainer,
        "model": model,
    }


def trained(
    folder: Path, clips: Path, devices: int, strategy: Any = "auto"
) -> tuple[float, dict[str, Tensor]]:
    """The score in the log, and the videos by id and rank."""
    (folder / "videos").mkdir(parents=True)
    (folder / "experiment.yaml").write_text(
        yaml.safe_dump(config(folder, clips, devices, strategy))
    )
    command = [sys.executable, "-m", "sora_lightning", "fit", "--config"]
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE")}
    root = str(Path.cwd())
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(folder / "experiment.yaml"), "--trust", "tests"],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    events = EventAccumulator(str(folder / "run"), size_guidance={"scalars": 0})
    events.Reload()
    (score,) = [event.value for event in events.Scalars("scores/kept")]
    videos = {path.stem: torch.load(path) for path in (folder / "videos").glob("*.pt")}
    return score, videos


def by_id(videos: dict[str, Tensor]) -> dict[int, Tensor]:
    return {int(name.split("-")[0]): video for name, video in videos.items()}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("clips"), 8, 0, 0, num_workers=1)["train"]


@pytest.fixture(scope="module")
def one(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[float, dict[str, Tensor]]:
    return trained(tmp_path_factory.mktemp("runs") / "one", clips, devices=1)


def test_two_ranks_of_lightning_score_as_one(
    one: tuple[float, dict[str, Tensor]], clips: Path, tmp_path: Path
) -> None:
    alone, of_one = one
    score, of_two = trained(tmp_path / "two", clips, devices=2)
    assert {name[-1] for name in of_two} == {"0", "1"}  # both ranks made some of them
    assert {name[-1] for name in of_one} == {"0"}
    made, shared = by_id(of_one), by_id(of_two)
    assert made.keys() == shared.keys() == set(range(len(PROMPTS)))
    for index, video in made.items():
        # Other batches, other rounding: a level of 255 at most.
        assert int((video.int() - shared[index].int()).abs().max()) <= 1, index
    assert not torch.equal(made[0], made[1])
    assert score == pytest.approx(alone, rel=1e-3)


@pytest.mark.parametrize("kind", ["tensor", "context"])
def test_ranks_that_share_a_network_sample_the_same_prompts(
    kind: str, one: tuple[float, dict[str, Tensor]], clips: Path, tmp_path: Path
) -> None:
    alone, of_one = one
    sharded = "sora_lightning.systems.parallel.ShardedStrategy"
    strategy = part(sharded, **{f"{kind}_parallel_size": 2})
    score, of_two = trained(tmp_path / "two", clips, 2, strategy)
    assert of_two.keys() == {f"{index}-{rank}" for index in range(len(PROMPTS)) for rank in "01"}
    made = by_id(of_one)
    for name, video in of_two.items():
        same = made[int(name.split("-")[0])]
        assert int((video.int() - same.int()).abs().max()) <= 1, name
    assert score == pytest.approx(alone, rel=1e-3)
