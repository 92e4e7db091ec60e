"""Maximal update parametrisation (muP, arXiv 2203.03466) for DiT: the learning rate that is best at
one width is near the best at every width.

Initial weights of a DiT already scale with the width as muP asks: variance 1 / fan-in in the blocks
and at the inputs, zero at the outputs; but for its ``TimeEmbedding``, whose ``base_width`` sets it.
Heads keep their width and grow in number, so that attention logits keep their scale. What is left
are the learning rates of the weights, which are set here (arXiv 2505.15270 does so for DiT).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sora_lightning.checks import naming, require_at_least
from sora_lightning.configuration import KeepsArguments
from sora_lightning.denoisers import DiT
from sora_lightning.denoisers.blocks import TimeEmbedding
from sora_lightning.denoisers.sizes import named_size
from sora_lightning.systems.optimizers.muon import MuonAdamW
from sora_lightning.systems.optimizers.parameters import OptimizerFactory, adamw


class MaximalUpdate(KeepsArguments):
    """Optimizer factory whose learning rate was chosen for a DiT of ``base_width``.

    With ``r_in`` and ``r_out`` the ratios of a weight's fan-in and fan-out to those at
    ``base_width``, AdamW's rate is divided by ``r_in`` (arXiv 2203.03466, table 8). Muon's update,
    whose spectral norm grows as the square root of the larger side, is scaled to grow as
    ``sqrt(r_out / r_in)`` (arXiv 2310.17813, condition 1). Biases, gains and weights of other parts
    keep their rate. Weight decay a step stays as it is.

    Args:
        base_width: Width of the DiT that the learning rate was chosen for.
        optimizer: Factory of an optimizer whose updates do not depend on the gradient's scale:
            Adam's kind, or ``MuonAdamW``.
    """

    def __init__(self, base_width: int, optimizer: OptimizerFactory = adamw):
        require_at_least(1, base_width=base_width)
        self.base_width = base_width
        self.optimizer = optimizer

    def for_module(self, module: nn.Module) -> OptimizerFactory:
        """Return the factory for a module that holds one DiT.

        Raises ``ValueError`` for a module without one, and for a DiT that cannot be built at
        ``base_width``.
        """
        found = [m for m in module.modules() if isinstance(m, DiT)]
        if len(found) != 1:
            raise ValueError(f"MaximalUpdate scales one DiT, and the model has {len(found)}")
        ratios = width_ratios(found[0], self.base_width)

        def build(groups: Iterable[dict[str, Any]]) -> Optimizer:
            built = self.optimizer([part for group in groups for part in _split(group, ratios)])
            for group in built.param_groups:
                is_muon = isinstance(built, MuonAdamW) and group["is_matrix"]
                fan_in, fan_out, largest = group.pop("width_ratios")
                factor = (fan_out / fan_in / largest) ** 0.5 if is_muon else 1 / fan_in
                group["lr"] *= factor
                group["weight_decay"] = group.get("weight_decay", 0.0) / factor
            return built

        return build


Ratios = tuple[float, float, float]  # of fan-in, fan-out, and the larger of both


def width_ratios(denoiser: DiT, base_width: int) -> dict[nn.Parameter, Ratios]:
    """Return the ratios of each weight matrix to the same one at ``base_width``.

    Raises ``ValueError`` where no such network can be built, or initial weights do not follow muP.
    """
    size = named_size(denoiser.arguments.get("size", "S"))
    if base_width % size.head_width:
        raise ValueError(
            f"base_width = {base_width} is not a multiple of the heads' width {size.head_width}, "
            "which has to stay"
        )
    time = denoiser.time
    if isinstance(time, TimeEmbedding) and time.base_width != base_width:
        raise ValueError(
            f"denoiser.parts.time.base_width = {time.base_width}: must be MaximalUpdate's "
            f"base_width = {base_width}"
        )
    base_size = replace(size, width=base_width, num_heads=base_width // size.head_width)
    with naming(f"base_width = {base_width}:"), torch.device("meta"):
        base = type(denoiser)(**denoiser.arguments | {"size": base_size})
    ratios = {}
    for (_, weight), (_, other) in zip(
        denoiser.named_parameters(), base.named_parameters(), strict=True
    ):
        if weight.ndim > 1:
            sides, base_sides = _sides(weight), _sides(other)
            fan_in, fan_out = (s / b for s, b in zip(sides, base_sides, strict=True))
            ratios[weight] = fan_in, fan_out, max(sides) / max(base_sides)
    return ratios


def _sides(weight: torch.Tensor) -> tuple[int, int]:
    return weight[0].numel(), len(weight)


def _split(group: dict[str, Any], ratios: dict[nn.Parameter, Ratios]) -> Sequence[dict[str, Any]]:
    """Return a group for each triple of ratios. Only matrices are scaled; rows of tables are
    vectors by themselves.
    """
    of_ratios: dict[Ratios, list[nn.Parameter]] = {}
    for parameter in group["params"]:
        ours = ratios.get(parameter) if group.get("is_matrix") else None
        of_ratios.setdefault(ours or (1.0, 1.0, 1.0), []).append(parameter)
    return [group | {"params": held, "width_ratios": key} for key, held in of_ratios.items()]
