"""Editing without inversion: from data of one condition to data of another."""

from __future__ import annotations

import itertools

from jaxtyping import Float
from torch import Tensor

from sora_lightning.diffusion.paths import RectifiedFlow
from sora_lightning.diffusion.predictions import Process
from sora_lightning.diffusion.samplers import Draw
from sora_lightning.types import Condition, DenoiserFunction


def flow_edit(
    denoisers: tuple[DenoiserFunction, DenoiserFunction],
    conditions: tuple[Condition, Condition],
    x_0: Float[Tensor, "b c f h w"],
    times: Float[Tensor, " s"],
    process: Process,
    draw: Draw,
) -> Float[Tensor, "b c f h w"]:
    """FlowEdit (arXiv 2412.08629, algorithm 1, one draw of noise a step): ``x_0`` moves by what the
    velocity under the second condition differs from that under the first, at equal noise.

    Where both are the same nothing changes. ``ValueError`` for another path than a rectified flow.
    """
    if not isinstance(process.path, RectifiedFlow):
        raise ValueError(f"path = {process.path}: an edit by two prompts is for a RectifiedFlow")
    (source, target), (was, told) = denoisers, conditions
    z = x_0
    for t, s in itertools.pairwise(times):
        noisy = process.path.perturb(x_0, draw(x_0), t.expand(len(x_0)).to(x_0))
        now = process.estimate(source, noisy, t, was)
        then = process.estimate(target, z + noisy - x_0, t, told)
        z = z + (s - t).to(z) * ((then.noise - then.x_0) - (now.noise - now.x_0))
    return z
