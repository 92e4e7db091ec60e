"""Agreement of generated captions with those by people in named words, such as colours."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric


class NamedWords(Metric):
    """Share of captions that name the words of an attribute as the right caption does, in any
    order, and of those that name the words of ``all`` attributes together.

    Forms in ``-ward`` and ``-wards`` are equal to the word. Captions count for the attributes of
    which the right caption names a word. ``all`` takes the first words of each attribute as those
    of one thing, the second ones as those of another: things must be equal, in any order. Only
    captions count for it of which every attribute is named.

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
            self.add_state(state, torch.zeros(len(words) + 1), dist_reduce_fx="sum")

    def update(self, generated: Sequence[str], right: Sequence[str]) -> None:
        for caption, other in zip(generated, right, strict=True):
            found, expected = self._found(caption), self._found(other)
            named = [bool(words) for words in expected]
            equal = [sorted(a) == sorted(b) for a, b in zip(found, expected, strict=True)]
            equal.append(_things(found) == _things(expected))
            counted = torch.tensor([*named, all(named)])
            self.counted += counted.to(self.counted)
            self.right += (counted & torch.tensor(equal)).to(self.right)

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Return shares from 0 to 1 by attribute; an attribute that nothing named is left out."""
        scores = zip([*self.patterns, "all"], self.right, self.counted, strict=True)
        return {name: right / counted for name, right, counted in scores if counted}

    def _found(self, caption: str) -> list[list[str]]:
        return [pattern.findall(caption.lower()) for pattern in self.patterns.values()]


def _things(found: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    return sorted(zip_longest(*found, fillvalue=""))
