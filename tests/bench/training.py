"""The demo's model, trained by the demo's own commands with fewer steps: a whole training step
beside its forward and backward passes, the share of it that waits for data, and sampling beside its
own forward passes and decoding.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import SimpleProfiler
from torch import Tensor
from torch.optim import Optimizer

from sora_lightning.__main__ import main
from sora_lightning.generation import SamplingConfig
from sora_lightning.systems import DiffusionSystem
from sora_lightning.types import Condition, VideoBatch, VideoSize
from sora_lightning.workflows.demo import demo_stages
from tests.bench.models import backward
from tests.bench.report import Report

# Of the demo's training: steps before the measured ones, and measured ones for a round.
WARM_UP_STEPS, STEPS_PER_ROUND = 5, 10
STAGES = ("clips", "tokenizer", "latents", "text_to_video")
SIZE, CLIPS, NUM_STEPS = "17x32x32", 4, 25


def run(report: Report) -> None:
    with tempfile.TemporaryDirectory() as folder:
        train(report, Path(folder))
        checkpoint = Path(folder) / "text_to_video" / "checkpoints" / "last.ckpt"
        sample(report, DiffusionSystem.from_checkpoint(checkpoint))


def train(report: Report, folder: Path) -> None:
    """Run the demo's stages from clips to a text-to-video model."""
    stages = {stage.name: stage for stage in demo_stages(folder, quick=True)}
    for name in STAGES:
        command, *arguments = stages[name].command[1:]
        if command == "fit":
            arguments += timed_steps(report, folder, name)
        if name == "text_to_video":
            turns = {"class_path": "tests.bench.training.Turns",
                     "init_args": {"path": str(folder / "turns.json")}}  # fmt: skip
            # The captions that people wrote: there is no captioner here.
            manifest = str(folder / "data" / "train.jsonl")
            arguments += ["--data.captions", "null", "--data.manifest", manifest]
            arguments += ["--trainer.callbacks+", json.dumps(turns)]
        if main([command, *arguments]):
            raise RuntimeError(f"the demo's stage {name} failed")
        if command == "fit":
            seconds = json.loads((folder / f"fit-{name}.txt").read_text())
            report.parts(f"a training step of the demo's {name}", waits_of(seconds))
    turns = json.loads((folder / "turns.json").read_text())
    case = "a training step of the demo's text_to_video model, beside its passes alone"
    report.measured(case, {name: one[WARM_UP_STEPS:] for name, one in turns.items()})


def timed_steps(report: Report, folder: Path, name: str) -> list[str]:
    """Return arguments of ``fit`` for a few steps, whose seconds go to ``fit-<name>.txt``."""
    profiler = {"class_path": "tests.bench.training.Durations",
                "init_args": {"dirpath": str(folder), "filename": name}}  # fmt: skip
    steps = str(WARM_UP_STEPS + report.min_rounds * STEPS_PER_ROUND)
    return ["--trust", "tests.bench", "--trainer.profiler", json.dumps(profiler),
            "--trainer.max_steps", steps]  # fmt: skip


def waits_of(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Seconds of each step spent waiting for the batch, and in all, without the first few."""
    waited = seconds["[_TrainingEpochLoop].train_dataloader_next"]
    worked = seconds["run_training_batch"]
    steps = list(zip(waited, worked, strict=False))[WARM_UP_STEPS:]
    return {"whole step": [a + b for a, b in steps], "waiting for data": [a for a, _ in steps]}


class Durations(SimpleProfiler):
    """Writes how long each action took, each time, as JSON."""

    def summary(self) -> str:
        return json.dumps(self.recorded_durations)


class Turns(Callback):
    """After each training step, runs the denoiser's forward and backward passes of that batch
    alone; writes the seconds of both as JSON.

    A step lasts from the end of the passes to that of all other callbacks, and so holds data,
    draws, loss, optimizer, average and logs. What follows its own passes is written apart.
    """

    def __init__(self, path: str):
        self.path = Path(path)
        names = ("forward and backward", "whole step", "of it, clipping, optimizer, average, logs")
        self.seconds: dict[str, list[float]] = {name: [] for name in names}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = time.perf_counter()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        self._passed = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: VideoBatch,
        batch_idx: int,
    ) -> None:
        now_s, since_s = time.perf_counter(), self._since
        assert isinstance(pl_module, DiffusionSystem)
        x_0 = pl_module.latents(batch)
        condition = pl_module.conditioner(batch.captions)
        detached = Condition(condition.tokens.detach(), condition.mask, condition.pooled.detach())
        denoiser = pl_module.denoiser
        network = pl_module.network()  # with the pass of its own estimate
        step = backward(denoiser, partial(network, x_0, torch.rand(len(x_0)), detached))
        begun_s = time.perf_counter()
        step()
        self._since = time.perf_counter()
        spent_s = (self._since - begun_s, now_s - since_s, now_s - self._passed)
        for name, seconds in zip(self.seconds, spent_s, strict=True):
            self.seconds[name].append(seconds)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.path.write_text(json.dumps(self.seconds))


def sample(report: Report, system: DiffusionSystem) -> None:
    """Compare sampling with guidance with as many forward passes and one decoding."""
    prompts, seeds = ["a red circle moves left"] * CLIPS, list(range(CLIPS))
    size = VideoSize.parse(SIZE)
    grid = system.tokenizer.compression.grid(size)
    x_t = torch.randn(2 * CLIPS, system.tokenizer.latent_channels, grid.f, grid.h, grid.w)
    t, condition = torch.rand(2 * CLIPS), system.conditioner(2 * prompts)
    generator = system.video_generator(SamplingConfig(num_steps=NUM_STEPS))

    def passes() -> Tensor:
        for _ in range(NUM_STEPS):
            system.denoiser(x_t, t, condition)
        return system.tokenizer.decode(x_t[:CLIPS])

    calls: dict[str, Callable[[], object]] = {
        "passes and decoding": passes,
        "sampling": partial(generator.videos, prompts, size, seeds),
    }
    report.compare(
        f"{CLIPS} videos of {SIZE} of the demo's model, {NUM_STEPS} steps with guidance",
        {name: torch.no_grad()(call) for name, call in calls.items()},
        items=CLIPS,
        unit="videos",
    )
