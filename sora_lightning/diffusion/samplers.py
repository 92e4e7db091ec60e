"""From noise to data along the flow ``dx / dt = v(x, t)``: one flat loop a sampler, one
signature.
"""

import itertools
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from sora_lightning.diffusion.paths import shift_time
from sora_lightning.types import Condition, DenoiserFunction

Sampler = Callable[
    [DenoiserFunction, Float[Tensor, "b c f h w"], Float[Tensor, " s"], Condition],
    Float[Tensor, "b c f h w"],
]


def uniform_times(num_steps: int, shift: float = 1.0) -> Float[Tensor, " s"]:
    """``num_steps + 1`` times from 1 to 0, shifted towards noise for ``shift`` > 1."""
    if num_steps < 1:
        raise ValueError(f"num_steps = {num_steps}: must be at least 1")
    return shift_time(torch.linspace(1, 0, num_steps + 1), shift)


def euler(
    denoiser: DenoiserFunction,
    noise: Float[Tensor, "b c f h w"],
    times: Float[Tensor, " s"],
    condition: Condition,
) -> Float[Tensor, "b c f h w"]:
    """Euler's method: one call a step, first order."""
    x = noise
    for t, t_next in itertools.pairwise(times):
        v = denoiser(x, t.expand(len(x)).to(x), condition)
        x = x + (t_next - t) * v
    return x


def heun(
    denoiser: DenoiserFunction,
    noise: Float[Tensor, "b c f h w"],
    times: Float[Tensor, " s"],
    condition: Condition,
) -> Float[Tensor, "b c f h w"]:
    """Heun's method: two calls a step, second order; the last step, which ends at data, is
    Euler's.
    """
    x = noise
    for t, t_next in itertools.pairwise(times):
        v = denoiser(x, t.expand(len(x)).to(x), condition)
        x_next = x + (t_next - t) * v
        if t_next > 0:
            v_next = denoiser(x_next, t_next.expand(len(x)).to(x), condition)
            x_next = x + (t_next - t) * (v + v_next) / 2
        x = x_next
    return x
