"""Two-way renaming of weights by rules that cover every weight on both sides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sora_lightning.layers.transformer import TransformerSize

Weights = Mapping[str, Tensor]
Change = Callable[..., tuple[Tensor, ...]]


def unchanged(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors


@dataclass(frozen=True)
class Rule:
    """Foreign names and ours of the same weights, and their conversions.

    ``to_ours`` takes the foreign tensors in order and returns ours in order; ``to_theirs`` is its
    inverse. A side is empty for a table that the other side computes.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    to_ours: Change = unchanged
    to_theirs: Change = unchanged


def same(theirs: str, ours: str) -> Rule:
    """Return the rule for one tensor under two names."""
    return Rule((theirs,), (ours,))


def linear(theirs: str, ours: str, bias: bool = True) -> list[Rule]:
    """Return the rules for weight and bias of a layer (linear, norm, convolution)."""
    return [same(f"{theirs}.{part}", f"{ours}.{part}") for part in ("weight", "bias")[: 1 + bias]]


def joined(theirs: tuple[str, ...], ours: str, bias: bool = True) -> list[Rule]:
    """Return the rules for foreign layers that are one layer here, stacked in order: q, k, v."""
    return [
        Rule(
            tuple(f"{one}.{part}" for one in theirs),
            (f"{ours}.{part}",),
            lambda *tensors: (torch.cat(tensors),),
            lambda tensor: tensor.chunk(len(theirs)),
        )
        for part in ("weight", "bias")[: 1 + bias]
    ]


def apply_rules(weights: Weights, rules: Iterable[Rule], *, to_ours: bool) -> dict[str, Tensor]:
    """Return the weights under the names of the other side.

    Raises:
        ValueError: Weights that no rule takes, missing weights, or weights that a rule refuses.
    """
    left = dict(weights)
    renamed: dict[str, Tensor] = {}
    missing: list[str] = []
    for rule in rules:
        sources, targets = (rule.theirs, rule.ours) if to_ours else (rule.ours, rule.theirs)
        absent = [name for name in sources if name not in left]
        if absent:
            missing += absent
            continue
        change = rule.to_ours if to_ours else rule.to_theirs
        tensors = change(*(left.pop(name) for name in sources))
        renamed.update(zip(targets, tensors, strict=True))
    if left or missing:
        raise ValueError(_leftovers(sorted(left), missing))
    return {name: tensor.contiguous() for name, tensor in renamed.items()}


def _leftovers(left: list[str], missing: list[str]) -> str:
    parts = [
        f"{what}: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if names[5:] else "")
        for what, names in (("no rule takes", left), ("missing", missing))
        if names
    ]
    return "; ".join(parts)


def require_names(weights: Weights, names: Iterable[str], owner: str) -> None:
    """Raise ``ValueError`` for the first of the names that the weights of ``owner`` lack."""
    for name in names:
        if name not in weights:
            raise ValueError(f"missing: {name}; these are not {owner}'s weights")


def published_heads(width: int, sizes: Iterable[TransformerSize]) -> int:
    """Return the number of attention heads of the published size of this width."""
    for size in sizes:
        if size.width == width:
            return size.num_heads
    raise ValueError(f"width {width} is none of the paper's: say num_heads")


def count(weights: Weights, pattern: str) -> int:
    """Return how many consecutive numbers from 0 can replace ``{}`` in a pattern to give an
    existing name.
    """
    number = 0
    while pattern.format(number) in weights:
        number += 1
    return number
