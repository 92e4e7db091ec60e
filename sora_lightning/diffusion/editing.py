"""Editing without inversion, from the data of one condition to those of another."""

from __future__ import annotations

import itertools

from jaxtyping import Float
from torch import Tensor

from sora_lightning.diffusion.paths import RectifiedFlow
from sora_lightning.diffusion.predictions import Process
from sora_lightning.diffusion.samplers import NoiseFunction
from sora_lightning.types import Condition, DenoiserFunction


def flow_edit(
    denoisers: tuple[DenoiserFunction, DenoiserFunction],
    conditions: tuple[Condition, Condition],
    x_0: Float[Tensor, "b c f h w"],
    times: Float[Tensor, " s"],
    process: Process,
    noise_fn: NoiseFunction,
) -> Float[Tensor, "b c f h w"]:
    """FlowEdit (arXiv 2412.08629, algorithm 1, with one noise sample a step).

    ``x_0`` moves by the difference between the velocities under the second and the first
    condition, at equal noise. Raises ``ValueError`` for a path that is not a rectified flow.
    """
    if not isinstance(process.path, RectifiedFlow):
        raise ValueError(f"path = {process.path}: an edit by two prompts is for a RectifiedFlow")
    (source, target), (source_condition, target_condition) = denoisers, conditions
    z = x_0
    for t, s in itertools.pairwise(times):
        noisy = process.path.perturb(x_0, noise_fn(x_0), t.expand(len(x_0)).to(x_0))
        now = process.denoise(source, noisy, t, source_condition)
        then = process.denoise(target, z + noisy - x_0, t, target_condition)
        z = z + (s - t).to(z) * ((then.noise - then.x_0) - (now.noise - now.x_0))
    return z
