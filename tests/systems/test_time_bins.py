"""The validation loss by time: by hand, the same however clips are shared out, and logged."""

from __future__ import annotations

import hashlib
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sora_lightning.conditioning import TextConditioner
from sora_lightning.denoisers import DiT
from sora_lightning.layers.transformer import TransformerSize
from sora_lightning.systems import DiffusionSystem
from sora_lightning.systems.time_bins import NUM_BINS, LossPerTime, fixed_draws
from sora_lightning.tokenizers import ConvTokenizer
from sora_lightning.types import VideoBatch

NAMES = [hashlib.sha256(str(i).encode()).hexdigest()[:16] for i in range(24)]


def test_means_of_bins_by_hand() -> None:
    metric = LossPerTime(num_bins=4)
    metric.update(torch.tensor([0.1, 0.2, 0.5]), torch.tensor([1.0, 3.0, 5.0]))
    metric.update(torch.tensor([0.6, 1.0]), torch.tensor([7.0, 9.0]))
    found = {name: float(value) for name, value in metric.compute().items()}
    assert found == {"0-0.25": 2.0, "0.5-0.75": 6.0, "0.75-1": 9.0}
    metric.reset()
    metric.update(torch.tensor([0.3]), torch.tensor([1.0]))
    assert list(metric.compute()) == ["0.25-0.5"]


def test_draws_belong_to_the_clip_and_to_nothing_else() -> None:
    x_0 = torch.zeros(24, 2, 1, 3, 3)
    t, noise = fixed_draws(NAMES, x_0, seed=0)
    order = torch.randperm(24)
    parts = [fixed_draws([NAMES[i] for i in part], x_0[part], 0) for part in order.split(5)]
    assert torch.equal(torch.cat([times for times, _ in parts]), t[order])
    assert torch.equal(torch.cat([drawn for _, drawn in parts]), noise[order])
    assert not torch.equal(fixed_draws(NAMES, x_0, seed=1)[0], t)
    many, _ = fixed_draws([f"{i:x}" for i in range(4000)], x_0.new_zeros(4000, 1, 1, 1, 1), 0)
    share = torch.histc(many, NUM_BINS, 0, 1) / 4000
    assert bool(((share - 1 / NUM_BINS).abs() < 4 * (0.125 * 0.875 / 4000) ** 0.5).all())


@pytest.fixture(scope="module")
def system() -> DiffusionSystem:
    torch.manual_seed(0)
    one = DiffusionSystem(
        ConvTokenizer(4, [8, 16], [True], [True], patch=4, blocks_per_level=1),
        TextConditioner(width=16, depth=1, num_heads=2),
        lambda channels, width: DiT(channels, width, TransformerSize(1, 16, 2), patch=(1, 1, 1)),
    )
    for parameter in one.parameters():  # zero-initialised, it would predict nothing at any time
        parameter.data.normal_(std=0.1)
    return one


def batches(latents: Tensor, size: int) -> DataLoader:
    parts = [
        VideoBatch(["a red circle"] * len(part), 8.0, part, latents=x)
        for part, x in (
            (NAMES[i : i + size], latents[i : i + size]) for i in range(0, len(NAMES), size)
        )
    ]
    return DataLoader(parts, batch_size=None)  # type: ignore[arg-type]


def validated(system: DiffusionSystem, loader: DataLoader) -> dict[str, float]:
    settings: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    trainer = L.Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, **settings
    )
    trainer.validate(system, loader, verbose=False)
    return {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith("val/loss_t/")
    }


def test_a_validation_logs_what_the_objective_says_however_clips_are_batched(
    system: DiffusionSystem,
) -> None:
    latents = torch.randn(24, 4, 3, 2, 2)
    logged = validated(system, batches(latents, 8))
    assert validated(system, batches(latents, 3)) == pytest.approx(logged, rel=1e-5)
    t, noise = fixed_draws(NAMES, latents, system.seed)
    with torch.no_grad():
        condition = system.conditioner(["a red circle"] * 24)
        losses = system.objective(system.denoiser, latents, noise, t, condition)
    expected = LossPerTime()
    expected.update(t, losses)
    assert {f"val/loss_t/{k}": float(v) for k, v in expected.compute().items()} == pytest.approx(
        logged, rel=1e-5
    )
    assert not any("loss_per_time" in name for name in system.state_dict())
