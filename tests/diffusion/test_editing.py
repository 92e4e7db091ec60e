"""Between two Gaussians of one standard deviation an edit is exactly the way from mean to mean."""

from __future__ import annotations

import torch

from sora_lightning.diffusion import Process, flow_edit, uniform_times
from tests.diffusion.gaussian import Gaussian, condition


def test_an_edit_moves_the_data_from_mean_to_mean():
    torch.manual_seed(0)
    process, x_0 = Process(), torch.randn(4, 2, 1, 2, 2, dtype=torch.float64)
    denoisers = (Gaussian(0.4, 0.5).denoiser(process), Gaussian(-0.6, 0.5).denoiser(process))
    conditions = condition(4), condition(4)
    for num_steps in (3, 50):
        times = uniform_times(num_steps).double()
        edited = flow_edit(denoisers, conditions, x_0, times, process, torch.randn_like)
        torch.testing.assert_close(edited, x_0 - 1)
    last = uniform_times(10).double()[5:]
    part = flow_edit(denoisers, conditions, x_0, last, process, torch.randn_like)
    moved = (x_0 - part).mean()
    assert 0.1 < moved < 0.9  # the less strength, the less of the way
