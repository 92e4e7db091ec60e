"""Sizes of transformers at which arms have equal parameters or FLOPs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

from sora_lightning.ablations.spec import SIZE_KEY
from sora_lightning.cli.training_cost import Training, num_parameters, step_flops
from sora_lightning.denoisers.sizes import named_size
from sora_lightning.layers.transformer import TransformerSize

TOLERANCE = 0.02


def differs(value: float, target: float) -> bool:
    """Return True if ``value`` is further than 2 % from ``target``."""
    return abs(value / target - 1) > TOLERANCE


def matched_size(
    training: Training, target: float, quantity: str, width_keys: Sequence[str]
) -> TransformerSize:
    """Return the size at which a training's ``parameters`` or ``flops`` are nearest to ``target``.

    Depth and heads stay. Of the two widths between which the target lies at the arm's own
    ``mlp_ratio``, each with the hidden width of its feed-forward layers that meets the target, the
    one with the nearer ``mlp_ratio`` is taken: the arm keeps its proportions. Counts are linear in
    the hidden width, so that two counts give it.

    Raises ``ValueError`` if the model has no such size, or none meets the target within 2 %.
    """
    own = _size_of(training.model)

    def count(size: TransformerSize) -> float:
        resized = training.with_model(resized_model(training.model, size, width_keys))
        return float(num_parameters(resized) if quantity == "parameters" else step_flops(resized))

    step = 2 * own.num_heads  # rotary positions need heads of even width
    # Counts grow about as the square of the width; the widths around are solved exactly.
    near = max(1, math.floor(own.width * math.sqrt(target / count(own)) / step))
    found = [_with_hidden(own, width * step, target, count) for width in (near, near + 1)]
    fitting = [size for size in found if size is not None and not differs(count(size), target)]
    if not fitting:
        raise ValueError(
            f"neither width {near * step} nor {(near + 1) * step} has {target:.4g} {quantity} "
            f"within {TOLERANCE:.0%} at depth {own.depth}: change the arm's depth"
        )
    return min(fitting, key=lambda size: abs(math.log(size.mlp_ratio / own.mlp_ratio)))


def resized_model(
    model: dict[str, Any], size: TransformerSize, width_keys: Sequence[str]
) -> dict[str, Any]:
    """Return the model of a YAML with another size of its denoiser; ``width_keys`` get its
    width."""
    model = copy.deepcopy(model)
    for key, value in resized_values(size, width_keys).items():
        *owners, last = key.split(".")[1:]
        node = model
        for owner in owners:
            if not isinstance(node.get(owner), dict):
                raise ValueError(f"{key}: there is no {owner} in the model")
            node = node[owner]
        node[last] = value
    return model


def resized_values(size: TransformerSize, width_keys: Sequence[str]) -> dict[str, Any]:
    """Return the values by dotted key that set a size."""
    return {SIZE_KEY: dict(vars(size)), **dict.fromkeys(width_keys, size.width)}


def _size_of(model: dict[str, Any]) -> TransformerSize:
    given = model["init_args"].get("denoiser", {}).get("init_args", {}).get("size")
    if given is None:
        raise ValueError(f"{SIZE_KEY} is missing: it is what matching changes")
    return named_size(TransformerSize(**given) if isinstance(given, dict) else given)


def _with_hidden(
    own: TransformerSize, width: int, target: float, count: Callable[[TransformerSize], float]
) -> TransformerSize | None:
    """Return the size of this width that meets the target; ``None`` if no hidden width does."""
    one, two = (TransformerSize(own.depth, width, own.num_heads, ratio) for ratio in (1.0, 2.0))
    at_one, at_two = count(one), count(two)
    hidden = round(width * (1 + (target - at_one) / (at_two - at_one)))
    if hidden < width // 2:
        return None
    # int(width * ratio) is the hidden width.
    return TransformerSize(own.depth, width, own.num_heads, (hidden + 0.5) / width)
