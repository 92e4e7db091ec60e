"""How often a generated caption names what the caption by people names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric


class NamedWords(Metric):
    """Share of captions that name the words of an attribute as the right caption does.

    The words of an attribute, in their order, must be equal. Forms in ``-ward`` and ``-wards`` are
    equal to the word. Captions count for the attributes of which the right caption names a word.

    Args:
        words: The words of each attribute, such as ``{"colour": ["red", "blue"]}``.
    """

    full_state_update = False
    right: Tensor
    counted: Tensor

    def __init__(self, words: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        for name, of_name in words.items():
            if not of_name or isinstance(of_name, str):
                raise ValueError(f"words.{name} = {of_name!r}: must be a list of words")
        self.patterns = {
            name: re.compile(rf"\b({'|'.join(map(re.escape, of_name))})(?:wards?)?\b")
            for name, of_name in words.items()
        }
        for state in ("right", "counted"):
            self.add_state(state, torch.zeros(len(words)), dist_reduce_fx="sum")

    def update(self, generated: Sequence[str], right: Sequence[str]) -> None:
        for caption, other in zip(generated, right, strict=True):
            for index, pattern in enumerate(self.patterns.values()):
                named = pattern.findall(other.lower())
                self.counted[index] += bool(named)
                self.right[index] += bool(named) and pattern.findall(caption.lower()) == named

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Return shares from 0 to 1 by attribute; an attribute that nothing named is left out."""
        pairs = zip(self.patterns, self.right, self.counted, strict=True)
        return {name: right / counted for name, right, counted in pairs if counted}
