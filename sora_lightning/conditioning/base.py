"""The interface of conditioners: captions in, the denoiser's condition out."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence

from jaxtyping import Bool
from torch import Tensor, nn

from sora_lightning.configuration import KeepsArguments
from sora_lightning.types import Condition


class Conditioner(KeepsArguments, nn.Module, ABC):
    """Turns captions into a ``Condition``, whose tokens have this ``width``. The pooled vector has
    the same width, unless ``pooled_width`` is set.
    """

    def __init__(self, width: int):
        super().__init__()
        self.width = self.pooled_width = width
        self._has_warned = False

    @abstractmethod
    def forward(self, captions: list[str], drop: Bool[Tensor, " b"] | None = None) -> Condition:
        """Return the condition of each caption; where ``drop`` is True, that of no caption."""

    def null(self, num_clips: int) -> Condition:
        """Return the condition of no caption, for classifier-free guidance."""
        return self([""] * num_clips)

    def unseen_words(self, captions: Sequence[str]) -> list[str]:
        """Return the words that no training caption has; an empty list if these are unknown."""
        return []

    def warn_of_cut(self, lengths: Sequence[int], most: int, rule: str) -> None:
        """Warn, once, of the captions in a batch that are longer than ``most``. ``rule`` ends "have
        more than ..."."""
        num_cut = sum(length > most for length in lengths)
        if num_cut and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{num_cut} of {len(lengths)} captions of this batch ({num_cut / len(lengths):.0%})"
                f" have more than {rule}, up to {max(lengths)}: the rest is not read",
                stacklevel=4,
            )


def without_dropped(captions: list[str], drop: Bool[Tensor, " b"] | None) -> list[str]:
    """Return the captions, empty where ``drop`` is True."""
    if drop is None:
        return captions
    return ["" if gone else text for text, gone in zip(captions, drop.tolist(), strict=True)]
