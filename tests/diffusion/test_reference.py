"""Every sampler against diffusers' scheduler of the same kind: whole trajectories with the same
network, noise and sigmas.
"""

from __future__ import annotations

import math

import pytest
import torch

from sora_lightning.diffusion import (
    DDIM,
    DDPM,
    Epsilon,
    Preconditioned,
    Process,
    RectifiedFlow,
    ScaledLinearBetas,
    UniPC,
    V,
    VarianceExploding,
    VariancePreserving,
    Velocity,
    dpm_solver,
    euler,
    heun,
    karras_times,
    uniform_times,
)
from tests.diffusion.gaussian import condition

diffusers = pytest.importorskip("diffusers")

N, SHAPE = 20, (2, 3, 2, 4, 4)
LINEAR = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VP, SD = VariancePreserving(), VariancePreserving(ScaledLinearBetas())
ZERO = VariancePreserving(zero_terminal_snr=True)


def network(channels: int = 3):
    """Some smooth function of latents and time, on diffusers' and on our side."""
    mix = torch.randn(channels, SHAPE[1], generator=torch.Generator().manual_seed(0)) / 2

    def predict(x: torch.Tensor, t: torch.Tensor | float) -> torch.Tensor:
        mixed = torch.einsum("oc,bcfhw->bofhw", mix, x)
        return torch.tanh(mixed + torch.as_tensor(t).reshape(-1, 1, 1, 1, 1) * 0.7 - 0.2)

    return predict


def ours(sampler, process, times, x, predict, draw=None):
    return sampler(
        lambda x_t, t, _: predict(x_t, t),
        x,
        times,
        condition(SHAPE[0]),
        process,
        draw or (lambda like: torch.zeros_like(like)),
    )


def theirs(scheduler, x, predict, to_time, **step):
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(predict(seen, float(to_time(t))), t, x, **step).prev_sample
    return x


def discrete(t: torch.Tensor) -> torch.Tensor:
    return (t + 1) / 1000


def start() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("path", "config"),
    [(VP, LINEAR), (SD, SCALED), (ZERO, {**LINEAR, "rescale_betas_zero_snr": True})],
    ids=["linear", "scaled_linear", "zero_terminal_snr"],
)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddim(path, config, prediction):
    if path is ZERO and prediction == "epsilon":
        pytest.skip("noise says nothing of the data at time 1")
    scheduler = diffusers.DDIMScheduler(
        **config,
        prediction_type=prediction,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
    scheduler.set_timesteps(N)
    process = Process(path, Epsilon() if prediction == "epsilon" else V())
    predict = network()
    mine = ours(DDIM(), process, uniform_times(N).double(), start(), predict)
    torch.testing.assert_close(
        mine, theirs(scheduler, start(), predict, discrete, eta=0.0), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_ddpm(variance, monkeypatch):
    from diffusers.schedulers import scheduling_ddpm

    fixed = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) for i in range(N)]
    their_queue, queue = iter(fixed), iter(fixed)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: next(their_queue))
    scheduler = diffusers.DDPMScheduler(
        **LINEAR, variance_type=variance, clip_sample=False, timestep_spacing="leading"
    )
    scheduler.set_timesteps(N)
    # Their last step is at the first timestep: only there do they, too, add no noise.
    times = torch.cat([discrete(scheduler.timesteps.double()), torch.zeros(1).double()])
    predict = network(6 if variance == "learned_range" else 3)
    sampler = DDPM(large_variance=variance == "fixed_large")
    mine = ours(
        sampler,
        Process(VP, Epsilon()),
        times,
        start(),
        predict,
        lambda like: next(queue),
    )
    torch.testing.assert_close(
        mine, theirs(scheduler, start(), predict, discrete), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(("sampler", "name"), [(euler, "Euler"), (heun, "Heun")])
def test_euler_and_heun_on_the_preserving_path(sampler, name):
    scheduler = getattr(diffusers, f"{name}DiscreteScheduler")(
        **LINEAR, prediction_type="epsilon", timestep_spacing="trailing"
    )
    scheduler.set_timesteps(N)
    predict = network()
    alpha = VP.alpha(torch.ones((), dtype=torch.float64)).item()
    mine = ours(sampler, Process(VP, Epsilon()), uniform_times(N).double(), start(), predict)
    # Theirs walks x / alpha.
    reference = theirs(scheduler, start() / alpha, predict, discrete)
    torch.testing.assert_close(mine, reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("sampler", "name"), [(euler, "Euler"), (heun, "Heun")])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_and_heun_on_the_flow(sampler, name, shift):
    scheduler = getattr(diffusers, f"FlowMatch{name}DiscreteScheduler")(shift=shift)
    if name == "Euler":
        # Its own grid is shifted twice; ours is given in the place of it.
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
        scheduler.set_timesteps(sigmas=uniform_times(N, shift)[:-1].tolist())
    else:
        scheduler.set_timesteps(N)
    predict = network()
    grid = (
        scheduler.sigmas
        if name == "Euler"
        else torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]])
    )
    times = grid.double()
    if name == "Euler":
        torch.testing.assert_close(times.float(), uniform_times(N, shift))
    mine = ours(sampler, Process(), times, start(), predict)
    reference = theirs(scheduler, start(), predict, lambda t: t / 1000)
    torch.testing.assert_close(mine, reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("flow", [False, True], ids=["preserving", "flow"])
@pytest.mark.parametrize(
    ("sampler", "name", "config"),
    [
        (dpm_solver, "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
        (UniPC(2), "UniPCMultistepScheduler", {"solver_order": 2}),
        (UniPC(3), "UniPCMultistepScheduler", {"solver_order": 3}),
    ],
)
def test_multistep(sampler, name, config, flow):
    config = {**config, "final_sigmas_type": "zero"}
    if flow:
        config.update(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0)
    else:
        config.update(**LINEAR, prediction_type="epsilon", timestep_spacing="trailing")
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(N)
    predict = network()
    if flow:
        process, times = Process(RectifiedFlow(), Velocity()), scheduler.sigmas.double()
        # The network is asked at their sigmas, which their timesteps round to thousandths.
        sigmas = iter(scheduler.sigmas.tolist())
        reference = theirs(scheduler, start(), predict, lambda t: next(sigmas))
    else:
        process, times = Process(VP, Epsilon()), uniform_times(N).double()
        reference = theirs(scheduler, start(), predict, discrete)
    mine = ours(sampler, process, times, start(), predict)
    torch.testing.assert_close(mine, reference, atol=1e-4, rtol=1e-4)


def test_preconditioned_euler_on_the_exploding_path():
    scheduler = diffusers.EDMEulerScheduler(sigma_data=0.5)
    scheduler.set_timesteps(N)
    path = VarianceExploding()
    process = Process(path, Preconditioned(0.5))
    predict = network()
    times = karras_times(N, path)
    torch.testing.assert_close(path.sigma(times).float(), scheduler.sigmas, atol=1e-4, rtol=1e-4)
    sigmas = iter(scheduler.sigmas.tolist())

    def to_time(_):
        return math.pow(next(sigmas) / 80, 1 / 7)

    mine = ours(euler, process, times, 80 * start(), predict)
    reference = theirs(scheduler, 80 * start(), predict, to_time)
    torch.testing.assert_close(mine, reference, atol=1e-4, rtol=1e-4)
