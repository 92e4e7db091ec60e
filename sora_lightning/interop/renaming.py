"""Two-way renaming of weights by rules, with nothing left over on either side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
Change = Callable[..., tuple[Tensor, ...]]


def unchanged(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors


@dataclass(frozen=True)
class Rule:
    """Foreign names and the house's for the same weights, and how one becomes the other.

    ``to_ours`` takes the foreign tensors in order and gives ours in order, ``to_theirs`` is its
    inverse. A side may be empty: a table that the other side computes.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    to_ours: Change = unchanged
    to_theirs: Change = unchanged


def same(theirs: str, ours: str) -> Rule:
    """One tensor under two names."""
    return Rule((theirs,), (ours,))


def linear(theirs: str, ours: str, bias: bool = True) -> list[Rule]:
    """Weight and bias of a layer (linear, norm, convolution) under two names."""
    return [same(f"{theirs}.{part}", f"{ours}.{part}") for part in ("weight", "bias")[: 1 + bias]]


def joined(theirs: tuple[str, ...], ours: str, bias: bool = True) -> list[Rule]:
    """Foreign layers of one width that the house keeps as one, stacked in order: q, k, v."""
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
    """The weights under the names of the other side.

    Raises:
        ValueError: Weights that no rule takes, or that a rule needs and are not there, by name; or
            what a rule itself refuses.
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


def count(weights: Weights, pattern: str) -> int:
    """How many numbers from 0 on the ``{}`` of the pattern can be for a name that is there."""
    number = 0
    while pattern.format(number) in weights:
        number += 1
    return number
