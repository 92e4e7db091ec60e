"""The objective and the times of a public model are those of its scheduler's configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sora_lightning.configuration import configuration
from sora_lightning.diffusion import (
    Epsilon,
    LogitNormal,
    Process,
    RectifiedFlow,
    Uniform,
    V,
    VariancePreserving,
    Velocity,
    pretrained_objective,
    pretrained_times,
)

diffusers = pytest.importorskip("diffusers")

LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
COG = {**LATENT, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
DISCRETE: list[tuple[str, dict[str, Any], type]] = [
    ("DDIMScheduler", LATENT, Epsilon),
    ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2"}, Epsilon),
    ("CogVideoXDDIMScheduler", COG, V),
    ("CogVideoXDPMScheduler", {**COG, "snr_shift_scale": 1.0}, V),
]


@pytest.mark.parametrize(("name", "config", "prediction"), DISCRETE)
def test_alphas_and_prediction_of_discrete_schedulers(
    name: str, config: dict[str, Any], prediction: type, tmp_path: Path
) -> None:
    scheduler = getattr(diffusers, name)(**config)
    scheduler.save_pretrained(tmp_path)
    objective = pretrained_objective(tmp_path)
    path = objective.process.path
    assert isinstance(path, VariancePreserving)
    assert type(objective.process.prediction) is prediction
    t = torch.tensor([1, 200, 999], dtype=torch.float64) / 1000
    theirs = scheduler.alphas_cumprod[[0, 199, 998]].double()
    torch.testing.assert_close(path.alpha(t).square(), theirs, rtol=1e-4, atol=1e-7)
    assert pretrained_times(tmp_path) == Uniform(num_values=1000)
    configuration(objective, "objective")  # a checkpoint can describe it


def test_cogvideoxs_shift_divides_the_signal_to_noise_ratio(tmp_path: Path) -> None:
    snr = []
    for shift in (1.0, 3.0):
        scheduler = diffusers.CogVideoXDDIMScheduler(**LATENT, snr_shift_scale=shift)
        scheduler.save_pretrained(tmp_path)
        path = pretrained_objective(tmp_path).process.path
        t = torch.tensor([0.1, 0.5], dtype=torch.float64)
        snr.append((path.alpha(t) / path.sigma(t)).square())
    torch.testing.assert_close(snr[0] / snr[1], torch.full_like(snr[0], 3.0), rtol=1e-6, atol=0)


FLOWS: list[tuple[str, dict[str, Any]]] = [
    ("FlowMatchEulerDiscreteScheduler", {"shift": 5.0}),
    (
        "UniPCMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0},
    ),
]


@pytest.mark.parametrize(("name", "config"), FLOWS)
def test_schedulers_of_flow_matching(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    getattr(diffusers, name)(**config).save_pretrained(tmp_path)
    assert pretrained_objective(tmp_path).process == Process(RectifiedFlow(), Velocity())
    assert pretrained_times(tmp_path) == LogitNormal(shift=5.0)


def test_a_shift_by_the_number_of_tokens(tmp_path: Path) -> None:
    from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift

    sizes = {"base_image_seq_len": 1024, "max_image_seq_len": 4096}
    shifts = {"base_shift": 0.95, "max_shift": 2.05}
    made = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **sizes, **shifts)
    made.save_pretrained(tmp_path)
    times = pretrained_times(tmp_path)
    for num_tokens in (100, 1024, 3000):
        mu = calculate_shift(num_tokens, *sizes.values(), *shifts.values())
        expected = torch.tensor(mu).exp().item()
        assert times.sampling_shift(num_tokens) == pytest.approx(expected)
    normal = torch.zeros(2)
    ours = times(normal, torch.tensor([1024.0, 3000.0]))
    theirs = made.time_shift(0.95, 1.0, torch.tensor(0.5))
    assert ours[0].item() == pytest.approx(float(theirs))
    assert ours[1] > ours[0]
    configuration(times, "time")
    with pytest.raises(ValueError, match="takes the place of shift and base_tokens"):
        LogitNormal(shift=2.0, by_size=times.by_size)
    with pytest.raises(ValueError, match="asks for the clips' num_tokens"):
        times(normal)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no scheduler_config\.json here; give the fol"):
        pretrained_objective(tmp_path)
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="'UNet2DModel' is no scheduler of diffusers"):
        pretrained_times(tmp_path)
    diffusers.DDPMScheduler(beta_schedule="sigmoid").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="beta_schedule = sigmoid: must be one of linear, scaled_"):
        pretrained_objective(tmp_path)
    diffusers.DDIMScheduler(trained_betas=[0.01] * 1000).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the alphas of DDIMScheduler are not those of its linear"):
        pretrained_objective(tmp_path)
